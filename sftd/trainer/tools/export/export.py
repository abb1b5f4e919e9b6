"""Converts a verified checkpoint of any layout to a Hugging Face folder, with one copy of the model in memory."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from sftd.domain.data.chat_template import ChatTemplate
from sftd.domain.model import peft
from sftd.domain.model.shape import ModelShape
from sftd.domain.spec.model_section import Lora
from sftd.domain.spec.spec import Spec
from sftd.trainer.checkpoint.folder_swap import fsync_file
from sftd.trainer.errors import UserError
from sftd.trainer.model import weights
from sftd.trainer.model.families.seam import family_of
from sftd.trainer.model.quantize.products import values_of
from sftd.trainer.runtime import session as sessions
from sftd.trainer.tools.export import adapter
from sftd.trainer.tools.export.shards import write_shards
from sftd.trainer.tools.export.template_files import write_template
from sftd.trainer.tools.load_model import one_rank, read_model
from sftd.trainer.tools.protocol import EventWriter
from sftd.wire.attempt.directory import fsync_dir
from sftd.wire.checkpoint import manifest as manifests
from sftd.wire.model.digest import kept_files
from sftd.wire.model.folder import exported_config, is_language_part, read_shape


def export(
    spec: Spec,
    checkpoint: Path,
    out: Path,
    digest: str | None,
    shard_bytes: int,
    events: EventWriter,
    template: ChatTemplate | None = None,
    *,
    merge: bool = False,
) -> dict[str, Any]:
    """Write `checkpoint` of a run with `spec` as the Hugging Face folder `out`, in the trained dtype.

    A run of adapters (LoRA) becomes a PEFT folder, or with `merge` the model whose weights they change.

    `digest`: sha256 of the checkpoint's manifest. The manifest and all of its files are verified before anything is
    unpickled. The folder is created beside `out` and renamed when it is complete. Weight files hold at most `shard_bytes`.
    If `template` has its own text, it replaces the model folder's chat template.
    Returns `path`, `step`, `files` (number), `bytes` (total), `parameters`, `dtype` and `digest`: sha256 of the output of
    `sha256sum` for the files in the order of their names.
    Raises `UserError`, `Refused`, `CheckpointInvalid` or `OSError`, and then leaves no files.
    """
    out = out.resolve()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} already exists: give a new or an empty folder")
    events.progress("verify", path=str(checkpoint))
    manifest = manifests.verify(checkpoint, digest)
    folder, override = spec.model.partial_pretrain, spec.model.override_config
    shape = read_shape(folder, override)
    is_inside, is_adapter = is_language_part(folder), bool(spec.model.lora.rank) and not merge
    if is_adapter:
        adapter.check(shape, spec.model)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    partial.chmod(0o755)
    try:
        if not is_adapter:
            config = exported_config(folder, override, manifest.dtype)
            (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for name, path in kept_files(Path(folder)).items():
            # The config of an adapter's model is in that model's folder.
            if name != "config.json" and not (is_adapter and name == "generation_config.json"):
                (partial / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(path, partial / name)
        if is_inside and not is_adapter:
            for path in Path(folder).glob("*processor_config.json"):
                shutil.copyfile(path, partial / path.name)
        write_template(partial, template)
        session = one_rank(spec, device="cpu", dtype=manifest.dtype)
        try:
            events.progress("load", path=str(checkpoint))
            (model,) = read_model(spec, shape, session, checkpoint)
            _check_space(model, partial, is_adapter=is_adapter)
            if is_adapter:
                parameters = adapter.write(partial, model, shape, spec.model, is_inside=is_inside)
            else:
                tensors = _tensors(model, shape, spec.model.lora, events)
                if is_inside:
                    tensors = _with_others(tensors, folder, shape)
                parameters = write_shards(partial, tensors, shard_bytes)
        finally:
            sessions.close()
        events.progress("digest", path=str(partial))
        entries = manifests.describe(partial, manifests.list_files(partial))
        for entry in entries:
            # safetensors creates its files with access for the owner only.
            shutil.copymode(partial / (peft.CONFIG if is_adapter else "config.json"), partial / entry.name)
            fsync_file(partial / entry.name)
        for below in {Path(entry.name).parent for entry in entries}:
            fsync_dir(partial / below)
        # Replaces an empty folder. Fails if files have appeared in it meanwhile.
        partial.rename(out)
        fsync_dir(out.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    lines = "".join(f"{entry.sha256}  {entry.name}\n" for entry in entries)
    return {
        "path": str(out),
        "step": manifest.step,
        "files": len(entries),
        "bytes": sum(entry.bytes for entry in entries),
        "parameters": parameters,
        "dtype": manifest.dtype,
        "digest": hashlib.sha256(lines.encode()).hexdigest(),
    }


def _check_space(model: torch.nn.Module, partial: Path, *, is_adapter: bool) -> None:
    own = model.named_parameters()
    need = sum(parameter.nbytes for name, parameter in own if (".adapters." in name) == is_adapter)
    if (free := shutil.disk_usage(partial).free) < need:
        raise UserError(
            f"{partial} has {free} bytes free, the weights need {need}: make room, or export elsewhere"
        )


def _with_others(
    tensors: Iterator[tuple[str, torch.Tensor]], folder: str, shape: ModelShape
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a language model under their names inside the model of `folder`, and its other tensors as they are."""
    with ExitStack() as stack:
        source = weights.Folder(folder, stack)
        # Also those that are not exported: they are no other tensors.
        inside = {family_of(shape).output}
        for name, tensor in tensors:
            inside |= {name, weights.joined_name(name)}
            yield source.stored_name(name), tensor
        for name in sorted(source.names - inside):
            if source.stored_name(name) == name:
                yield name, source.read(name)


@torch.no_grad()
def _tensors(
    model: torch.nn.Module, shape: ModelShape, spec: Lora, events: EventWriter
) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and value of every tensor of the Hugging Face folder. Empties the model's parameters on the way."""
    own = weights.tensors_of(model)
    layers, all_experts = range(shape.num_hidden_layers), range(shape.num_experts)
    output = "shared" if shape.tie_word_embeddings else "own"
    parts = list(weights.model_rules(shape, layers, all_experts, is_first=True, output=output))
    # Name → experts' parts of a tensor that holds all experts.
    experts: dict[str, list[torch.Tensor]] = {}
    for number, rules in enumerate(parts, 1):
        events.progress("write", part=number, parts=len(parts))
        for rule in rules:
            parameter = own.pop(rule.target)
            # The model that was trained has the quantised weights.
            value = values_of(parameter).detach()
            # The memory is freed with the last tensor that is cut from it.
            parameter.data = parameter.data.new_empty(0)
            if rule.cut == "vocabulary":
                value = value[: shape.vocab_size]
            changes = adapter.changes(rule, own, shape, spec)
            for name, tensor in zip(rule.sources, rule.split(value, shape), strict=True):
                merged = (tensor.float() + changes[name]).to(tensor.dtype) if name in changes else tensor
                if rule.expert is None:
                    yield name, merged.contiguous()
                    continue
                experts.setdefault(name, []).append(merged)
                if len(experts[name]) == shape.num_experts:
                    yield name, torch.stack(experts.pop(name))
    assert not own, f"no weight mapping for {sorted(own)}"
