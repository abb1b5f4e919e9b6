"""Run by test_kernels.py: compiles the kernels that `kernels_interpreted` has launched for a Hopper GPU, which takes none."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

HOPPER = GPUTarget("cuda", 90, 32)

for launch in json.loads(Path(sys.argv[1]).read_text()):
    kernel = getattr(import_module(launch["module"]), launch["name"])
    names, fixed = kernel.arg_names, launch["fixed"]
    source = ASTSource(
        fn=kernel,
        signature={name: launch["kinds"].get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in fixed.items()},
    )
    compiled = triton.compile(source, target=HOPPER, options=launch["options"])
    assert compiled.asm["cubin"]
    print(launch["name"], flush=True)
