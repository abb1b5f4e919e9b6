"""From a verified checkpoint of any layout to a Hugging Face folder, the model in memory once."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state

from sftd.domain.layout import ModelShape
from sftd.domain.spec import Megatron, Spec
from sftd.trainer import device_mode, experts, megatron_edges, weights
from sftd.trainer import manifest as manifests
from sftd.trainer import model as models
from sftd.trainer.errors import CheckpointInvalid, UserError
from sftd.trainer.export.shards import write_shards
from sftd.trainer.prepare.progress import EventWriter
from sftd.trainer.session import Layout, Session
from sftd.wire.attempt_dir import fsync_dir
from sftd.wire.model_folder import exported_config, read_shape

# What a model folder holds besides weights and config.json: tokenizer, chat template, generation config, the model's
# own code, and what its licence asks to be passed on.
_COPIED = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model"),
    *("chat_template*", "*.jinja", "generation_config.json", "*.py", "LICENSE*", "NOTICE*", "USE_POLICY*"),
)


def export(
    spec: Spec, checkpoint: Path, out: Path, digest: str | None, shard_bytes: int, events: EventWriter
) -> dict[str, Any]:
    """Write `checkpoint` of a run of `spec` as the Hugging Face folder `out`, in the dtype that was trained.

    `digest`: sha256 of the checkpoint's manifest. The manifest and every file it names are verified before anything is
    unpickled; the folder is made beside `out`, and renamed when it is whole. Weight files hold `shard_bytes` at most.
    Returns `path`, `step`, `files` (their number), `bytes` (of all), `parameters`, `dtype` and `digest`: sha256 of what
    `sha256sum` prints for the files in the order of their names.
    Raises `UserError`, `Refused`, `CheckpointInvalid` or `OSError`, and then leaves nothing behind.
    """
    out = out.absolute()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} is there already: give a new or an empty folder")
    events.progress("verify", path=str(checkpoint))
    manifest = manifests.read(checkpoint, digest)
    if damage := manifests.find_damage(checkpoint, manifest.files):
        raise CheckpointInvalid(f"{checkpoint}: {damage}")
    folder, override = spec.model.partial_pretrain, spec.model.override_config
    shape = read_shape(folder, override)
    partial = out.with_name(out.name + ".partial")
    # Left by an export that was killed.
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        config = exported_config(folder, override, manifest.dtype)
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for path in sorted({path for pattern in _COPIED for path in Path(folder).glob(pattern)}):
            if path.is_file():
                shutil.copyfile(path, partial / path.name)
        with _one_rank(getattr(torch, manifest.dtype)) as session:
            events.progress("load", path=str(checkpoint))
            model = _load(spec, shape, session, checkpoint, partial)
            parameters = write_shards(partial, _tensors(model, shape, events), shard_bytes)
        events.progress("digest", path=str(partial))
        entries = manifests.describe(partial, manifests.list_files(partial))
        for entry in entries:
            # safetensors makes its files unreadable for others.
            shutil.copymode(partial / "config.json", partial / entry.name)
            _fsync(partial / entry.name)
        fsync_dir(partial)
        # Takes the place of an empty folder, and fails if something has been put into it meanwhile.
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


@contextlib.contextmanager
def _one_rank(dtype: torch.dtype) -> Iterator[Session]:
    """A process group of this process alone, on the CPU."""
    device_mode.install()
    megatron_edges.install_for_cpu()
    experts.install_for_cpu(torch.cuda.current_stream())
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
        layout = Layout(tp=1, pp=1, vpp=1, cp=1, dp=1, tp_rank=0, pp_rank=0, dp_rank=0)
        yield Session(torch.device("cpu"), dtype, layout)
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _load(
    spec: Spec, shape: ModelShape, session: Session, checkpoint: Path, partial: Path
) -> torch.nn.Module:
    """The whole model out of a verified checkpoint of any layout, without its optimizer.

    Raises `UserError` when the disk is too small for the weights.
    """
    alone = msgspec.structs.replace(spec.model, megatron=Megatron())
    config = models.transformer_config(msgspec.structs.replace(spec, model=alone), shape, session)
    (model,) = models.build(config, shape, session)
    need = sum(parameter.nbytes for parameter in model.parameters())
    if (free := shutil.disk_usage(partial).free) < need:
        raise UserError(
            f"{partial} has {free} bytes free, the weights need {need}: make room, or export elsewhere"
        )
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    state = model.sharded_state_dict(metadata={"dp_cp_group": group, "singleton_local_shards": False})
    loaded = dist_checkpointing.load({"model": state}, str(checkpoint))["model"]
    model.load_state_dict({k: v for k, v in loaded.items() if not k.endswith("_extra_state")})
    return model


@torch.no_grad()
def _tensors(
    model: torch.nn.Module, shape: ModelShape, events: EventWriter
) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and value of every tensor of the Hugging Face folder. Takes the model apart on the way."""
    own = dict(model.named_parameters())
    layers, all_experts = range(shape.num_hidden_layers), range(shape.num_experts)
    output = "shared" if shape.tie_word_embeddings else "own"
    parts = list(weights.model_rules(shape, layers, all_experts, is_first=True, output=output))
    for number, rules in enumerate(parts, 1):
        events.progress("write", part=number, parts=len(parts))
        for rule in rules:
            parameter = own.pop(rule.target)
            value = parameter.detach()
            # Its memory goes with the last tensor that is cut from it.
            parameter.data = torch.empty(0)
            if rule.cut == "vocabulary":
                value = value[: shape.vocab_size]
            for name, tensor in zip(rule.sources, rule.how.split(value, shape), strict=True):
                yield name, tensor.contiguous()
    assert not own, f"no weight mapping for {sorted(own)}"


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
