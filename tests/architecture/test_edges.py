"""Megatron-core and torch are patched in one place: `trainer/runtime/megatron_edges`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EDGES = ROOT / "sftd/trainer/runtime/megatron_edges"
ELSEWHERE = sorted(p for p in (ROOT / "sftd/trainer").rglob("*.py") if EDGES not in p.parents)
PATCHED = ("megatron", "torch")


def is_patched(module: str | None) -> bool:
    return (module or "").partition(".")[0] in PATCHED


def root_of(node: ast.expr) -> str:
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def edges(tree: ast.Module) -> Iterator[str]:
    """What a module does that only an edge may: sets attributes of what it imports from Megatron or torch, takes private names
    from there, or silences warnings."""
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {
        (alias.asname or alias.name).partition(".")[0]
        for node in imports
        for alias in node.names
        if is_patched(node.module if isinstance(node, ast.ImportFrom) else alias.name)
    }
    # An alias of one of them, such as `module: Any = layers`.
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value and root_of(node.value) in names:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {t.id for t in targets if isinstance(t, ast.Name) and isinstance(node.value, ast.Name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and is_patched(node.module):
            yield from (alias.name for alias in node.names if alias.name.startswith("_"))
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and root_of(node) in names:
            yield ast.unparse(node)
        elif isinstance(node, ast.Call):
            function = ast.unparse(node.func)
            if function == "warnings.filterwarnings" or (
                function == "setattr" and root_of(node.args[0]) in names
            ):
                yield ast.unparse(node)


@pytest.mark.parametrize("path", ELSEWHERE, ids=lambda path: str(path.relative_to(ROOT)))
def test_megatron_and_torch_are_patched_in_one_place(path: Path) -> None:
    assert list(edges(ast.parse(path.read_text()))) == []


def test_the_edges_are_found() -> None:
    found = [edge for path in sorted(EDGES.glob("*.py")) for edge in edges(ast.parse(path.read_text()))]
    assert "megatron_optimizer.USING_PYTORCH_OPTIMIZER" in found
    assert "module._grad_accum_fusion_available" in found
    assert "torch.utils.deterministic.fill_uninitialized_memory" in found
    assert any(edge.startswith("setattr(torch.cuda") for edge in found)
    assert any(edge.startswith("warnings.filterwarnings") for edge in found)
