"""Compares an exported folder with the trainer's own model, as its users load it:
`python -m sftd.trainer.tools.export.prove FOLDER FILE`.

FOLDER is a Hugging Face or PEFT folder, FILE what `reference` has written. Nothing of the trainer's model or of Megatron is
imported here. Both compute in FP32 on the CPU, with weights of the export's dtype. Writes JSON lines to standard output, the
last one `done`. Exit codes: 0, whatever the comparison finds; 2 with a message on standard error for a folder that cannot be
loaded; any other code is a defect.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from torch import Tensor

_USER_ERROR = 2
_KEY = "reference"


class Reference(msgspec.Struct, frozen=True):
    """What the trainer's model has computed. `dtype` is that of its weights; in `rounding` the export's may be rounded once
    more.

    Tensors, for each of `rows` rows: ids int64 [n]; places int64 [p], where logits are compared; logits FP32 [p, vocabulary];
    prompt int64 [], the number of ids before the first trained one; following FP32 [t, vocabulary], from which the t tokens
    after the prompt were chosen.
    """

    rows: int
    dtype: str
    rounding: str


def encode(reference: Reference) -> dict[str, str]:
    """The metadata of the file."""
    return {_KEY: msgspec.json.encode(reference).decode()}


def main(argv: Sequence[str] | None = None) -> int:
    """Compare and return the exit code."""
    # Before torch is imported: its output must not mix with the events.
    from sftd.trainer.tools.protocol import claim_stdout

    parser = argparse.ArgumentParser(
        prog="python -m sftd.trainer.tools.export.prove", description="Compare an export with the trainer."
    )
    parser.add_argument("folder", type=Path, help="the exported folder")
    parser.add_argument("file", type=Path, help="file of `reference`")
    arguments = parser.parse_args(argv)
    events = claim_stdout()
    # A model that is not on this host is an error here, and never fetched.
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    import torch

    if threads := os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))
    try:
        events.emit("done", **compare(arguments.folder, arguments.file, events))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        sys.stderr.write(f"{arguments.folder} cannot be loaded: {error}\n")
        return _USER_ERROR
    finally:
        events.close()
    return 0


def compare(folder: Path, file: Path, events: Any) -> dict[str, Any]:
    """What the `done` line holds. Raises what transformers, peft and safetensors raise for a folder that cannot be loaded."""
    import torch
    from safetensors import safe_open

    with safe_open(file, framework="pt") as stored, torch.no_grad():
        reference = msgspec.json.decode(stored.metadata()[_KEY], type=Reference)
        events.progress("loading the export")
        is_peft = (folder / "adapter_config.json").is_file()
        model = _load(folder, getattr(torch, reference.dtype), is_peft=is_peft)
        differences, scales = [], []
        for number in range(reference.rows):
            events.progress(f"the export's row {number + 1} of {reference.rows}")
            row = {name: stored.get_tensor(f"{name}.{number}") for name in ("ids", "places", "logits")}
            found = model(input_ids=row["ids"][None]).logits[0, row["places"]]
            differences.append((found - row["logits"]).abs().amax(-1))
            scales.append(row["logits"].abs().max())
        # NaN if one is.
        largest = float(torch.cat(differences).max())
        tolerance = _tolerance(
            reference.rounding, float(torch.stack(scales).max()), model.config.get_text_config()
        )
        tokens, difference = 0, ""
        for number in range(reference.rows):
            events.progress(f"the export's answer {number + 1} of {reference.rows}")
            prompt = stored.get_tensor(f"ids.{number}")[: int(stored.get_tensor(f"prompt.{number}"))]
            same, other = _same_tokens(model, prompt, stored.get_tensor(f"following.{number}"), tolerance)
            tokens += same
            difference = difference or (other and f"row {number + 1}: {other}")
    return {
        "rows": reference.rows,
        "positions": sum(map(len, differences)),
        # As text, since JSON has no NaN.
        "largest_difference": str(largest),
        "tolerance": str(tolerance),
        "rounding": reference.rounding,
        "tokens": tokens,
        "other_token": difference,
        "versions": {name: version(name) for name in _PACKAGES if is_peft or name != "peft"},
    }


_PACKAGES = ("torch", "transformers", "peft")


def _load(folder: Path, dtype: Any, *, is_peft: bool) -> Any:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    if not is_peft:
        return _load_model(str(folder), dtype=dtype).float().eval()
    import peft

    config = peft.PeftConfig.from_pretrained(str(folder))
    base = _load_model(config.base_model_name_or_path, revision=config.revision, dtype=dtype)
    return peft.PeftModel.from_pretrained(base, str(folder)).float().eval()


def _load_model(path: str, **options: Any) -> Any:
    import transformers

    config = transformers.AutoConfig.from_pretrained(
        path, revision=options.get("revision"), local_files_only=True
    )
    # A vision-language model gets text only.
    is_text = config.get_text_config() is config
    model = transformers.AutoModelForCausalLM if is_text else transformers.AutoModelForImageTextToText
    return model.from_pretrained(path, local_files_only=True, **options)


def _tolerance(dtype: str, largest: float, config: Any) -> float:
    """How far two correct computations of logits may be apart. `dtype` is that in which the weights were rounded once more.

    Each layer has four products, one after the other, whose relative rounding errors add up as a random walk. That of a sum
    of n terms in FP32 is u √n with u = 2^-24; rounded weights add the u of their dtype. The largest of many differences is
    five standard deviations.
    """
    import torch

    sums = torch.finfo(torch.float32).eps / 2 * math.sqrt(config.hidden_size)
    weights = torch.finfo(getattr(torch, dtype)).eps / 2
    return 5 * (sums + weights) * math.sqrt(4 * config.num_hidden_layers) * largest


def _same_tokens(model: Any, prompt: Tensor, wanted: Tensor, tolerance: float) -> tuple[int, str]:
    """Continue the prompt with the most probable tokens. Returns how many are those of `wanted` [tokens, vocabulary], and a
    text on the first other one. Behind a tie, which rounding decides, there is nothing to compare."""
    cache, feed = None, prompt[None]
    for count, scores in enumerate(wanted):
        output = model(input_ids=feed, past_key_values=cache, use_cache=True)
        cache, token, best = output.past_key_values, int(output.logits[0, -1].argmax()), int(scores.argmax())
        if token != best:
            behind = float(scores[best] - scores[token])
            if behind <= 2 * tolerance:
                return count, ""
            return count, f"token {count + 1} is {token}, not {best}, which is {behind:.3g} above it"
        feed = prompt.new_tensor([[token]])
    return len(wanted), ""


if __name__ == "__main__":
    sys.exit(main())
