"""Rules on the facts that submit reads: data files, tokenizer, checkpoint folder, devices. Rules on a spec only are in
`domain/spec/rules.py`, those on a model in `domain/model/rules.py`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from difflib import get_close_matches

from sftd.domain.data.facts import DataFacts
from sftd.domain.errors import Problem, several
from sftd.domain.model.families import keys_read
from sftd.domain.plan.disk import Storage, storage
from sftd.domain.plan.sizes import weights_dtype
from sftd.domain.rules import Rules
from sftd.domain.spec import rules as spec_rules
from sftd.domain.spec.launch.launchers import kind_of
from sftd.domain.spec.retention import best_rule
from sftd.domain.spec.spec import Spec
from sftd.domain.submit import adapter_rules
from sftd.domain.submit.facts import SubmitFacts
from sftd.domain.text.words import size

_TRAIN, _VAL = "data.train_files", "data.val_files"
_SAVE_DIR = "checkpoint.save_dir"


def _data(facts: SubmitFacts) -> Iterator[tuple[str, DataFacts]]:
    if facts.train is not None:
        yield "data.sources" if facts.train.sources else _TRAIN, facts.train
    if facts.val is not None:
        yield _VAL, facts.val


def fewer_gpus_than_ranks(spec: Spec, facts: SubmitFacts) -> Iterator[Problem]:
    """A run that starts on this host at once needs a GPU for each rank."""
    if facts.own_gpus is not None and facts.own_gpus < spec.nproc_per_node:
        what = f"{spec.launch.device}: each rank needs its own GPU, but this host has {facts.own_gpus}"
        fix = "start torchrun with fewer ranks (--nproc-per-node), or set launch.device=cpu"
        yield Problem("launch.device", what, fix)


def override_that_is_not_read(spec: Spec, facts: SubmitFacts) -> Iterator[Problem]:
    """An override of a key that the trainer does not read would have no effect."""
    known = keys_read()
    for key in spec.model.override_config:
        if key not in known:
            nearest = get_close_matches(key, known, n=1)
            fix = (
                f"did you mean `{nearest[0]}`?"
                if nearest
                else f"remove it; the trainer reads {', '.join(known)}"
            )
            yield Problem(f"model.override_config.{key}", "is not read by the trainer", fix)


def save_folder_not_writable(spec: Spec, facts: SubmitFacts) -> Iterator[Problem]:
    """Report an unwritable folder at submit rather than at the first save."""
    folder = facts.save_folder
    if folder is not None and folder.error:
        verb = "give" if spec.checkpoint.save_dir else "set SFTD_HOME to"
        fix = f"{verb} a folder that you may write to"
        yield Problem(_SAVE_DIR, f"{folder.path!r} cannot be written to: {folder.error}", fix)


def prompts_without_tokenizer(spec: Spec, facts: SubmitFacts) -> Iterator[Problem]:
    """Prompts need the model's tokenizer."""
    if facts.has_tokenizer is False and spec.trainer.sample_prompts:
        what = f"{spec.model.partial_pretrain} has no tokenizer for the prompts"
        fix = "put the model's tokenizer there, or remove the prompts"
        yield Problem("trainer.sample_prompts", what, fix)


def nothing_to_train(spec: Spec, facts: SubmitFacts) -> Iterator[Problem]:
    """At least one row must have a trained label within the sequence length."""
    for where, data in _data(facts):
        if data.usable == 0:
            what = (
                f"{several(data.files)}: none of the {data.rows} rows has a trained label (≠ -100) within "
                f"{spec.data.sequence_length} tokens"
            )
            fix = "check the masks that `sftd prepare` made, or raise data.sequence_length"
            yield Problem(where, what, fix)


def source_without_rows(spec: Spec, facts: SubmitFacts) -> Iterator[Problem]:
    """Each source of a mixture must have rows to give."""
    for source in facts.train.sources if facts.train is not None else ():
        if not source.rows:
            what = f"no row of {source.name} has a trained label within {spec.data.sequence_length} tokens"
            yield Problem("data.sources", what, "remove the source, or raise data.sequence_length")


def _too_long(spec: Spec, data: DataFacts) -> str:
    length = spec.data.sequence_length
    return f"{data.truncated} of {data.rows} rows are longer than data.sequence_length {length}"


def rows_not_to_truncate(spec: Spec, facts: SubmitFacts) -> Iterator[Problem]:
    """The spec can forbid truncation."""
    for where, data in _data(facts):
        if data.truncated and spec.data.truncation == "error":
            fix = f"raise data.sequence_length to {data.longest}, or set data.truncation to right"
            yield Problem(where, _too_long(spec, data), fix)


def maybe_unmounted(spec: Spec, facts: SubmitFacts) -> Iterator[Problem]:
    """A missing path on the root file system may be a disk that is not mounted."""
    folder = facts.save_folder
    if folder is not None and folder.unmounted:
        what = f"{folder.path} and its parent folders are missing in {folder.unmounted}, which is on the root file system"
        yield Problem(_SAVE_DIR, what, "if it belongs on another disk, mount that first")


def no_tokenizer(spec: Spec, facts: SubmitFacts) -> Iterator[Problem]:
    """An export copies the tokenizer of the model folder."""
    if facts.has_tokenizer is False:
        folder = spec.model.partial_pretrain
        what = f"{folder} has no tokenizer: the run can train, but an export will lack a tokenizer too"
        yield Problem("model.partial_pretrain", what, "put the model's tokenizer there")


def remarks_on_data(spec: Spec, facts: SubmitFacts) -> Iterator[Problem]:
    """Remarks from reading the files."""
    for where, data in _data(facts):
        for remark in data.remarks:
            yield Problem(where, remark)


def dropped_rows(spec: Spec, facts: SubmitFacts) -> Iterator[Problem]:
    """Training drops rows without a trained label."""
    for where, data in _data(facts):
        if data.unusable:
            rows = ", ".join(map(str, data.unusable_rows))
            more = data.unusable - len(data.unusable_rows)
            which = f" (rows {rows}{f' and {more} more' if more > 0 else ''}, from 0)" if rows else ""
            what = f"{data.unusable} of {data.rows} rows have no trained label and are dropped{which}"
            yield Problem(where, what)


def answers_without_end(spec: Spec, facts: SubmitFacts) -> Iterator[Problem]:
    """A model learns to stop only from labels that end an answer."""
    for where, data in _data(facts):
        if data.stopping == 0 and data.usable:
            what = "no row trains a token that ends an answer: the model will not learn to stop"
            fix = "include the end of each answer in the labels, as `sftd prepare` does"
            yield Problem(where, what, fix)


def truncated_rows(spec: Spec, facts: SubmitFacts) -> Iterator[Problem]:
    """Rows longer than the sequence length are truncated."""
    for where, data in _data(facts):
        if data.truncated:
            yield Problem(where, f"{_too_long(spec, data)} and are truncated ({spec.data.truncation})")


def different_templates(spec: Spec, facts: SubmitFacts) -> Iterator[Problem]:
    """Samples, answers and exports can use only one chat template."""
    if facts.rendered_differently is not None:
        first, other = facts.rendered_differently
        what = f"{first} and {other} were rendered with different chat templates, dates or template arguments"
        fix = "prepare all files in the same way; samples, answers and exports use the template of the first file"
        yield Problem(_TRAIN, what, fix)


def batch_larger_than_data(spec: Spec, facts: SubmitFacts) -> Iterator[Problem]:
    """A step should not have more samples than there are rows."""
    batch, rows = spec.data.train_batch_size, facts.train.usable if facts.train else 0
    if 0 < rows < batch:
        least, most = batch // rows, -(-batch // rows)
        times = f"{least} times" if least == most else f"{least} to {most} times"
        what = f"a step has {batch} samples, but the data has {rows} rows: every step sees each row {times}"
        yield Problem("data.train_batch_size", what, f"set it to {rows} or less")


def validation_on_training_data(spec: Spec, facts: SubmitFacts) -> Iterator[Problem]:
    """Validation rows should not be training rows."""
    fix = "validate on other rows: `sftd prepare --val-fraction F --val-out FILE` separates some"
    if facts.train and facts.val and facts.train.digest == facts.val.digest:
        what = "is the training data: the validation loss will not measure generalization, nor will keep_best"
        yield Problem(_VAL, what, fix)
    elif facts.trained_on:
        yield Problem(_VAL, f"contains training files: {several(facts.trained_on)}", fix)


def devices_that_no_host_has(spec: Spec, facts: SubmitFacts) -> Iterator[Problem]:
    """Without enough devices the run waits for another host, or its ranks share cores. Only known hosts are checked."""
    hosts = facts.hosts
    if not kind_of(spec.launch.launcher).uses_host_devices or not hosts:
        return
    ranks, gpus, cpus = spec.nproc_per_node, max(h.gpus for h in hosts), max(h.cpus for h in hosts)
    known = hosts[0].name if len(hosts) == 1 else f"the {len(hosts)} known hosts"
    on_gpus = spec.launch.device == "cuda" or (spec.launch.device == "auto" and gpus > 0)
    if on_gpus and not gpus:
        fix = "start a daemon where there are GPUs, or set launch.device to auto"
        yield Problem("launch.device", f"is cuda, but {known} has no GPU: the run waits for one", fix)
    elif on_gpus and ranks > gpus:
        what = f"{ranks} ranks need a GPU each, but {known} has at most {gpus}: the run waits for more"
        fix = f"set it to {gpus} or less, or start a daemon on a host that has more"
        yield Problem("launch.nproc_per_node", what, fix)
    elif not on_gpus and ranks > cpus:
        what = f"{ranks} ranks share the {cpus} cores of {known} and will be slow"
        yield Problem("launch.nproc_per_node", what, f"set it to {cpus} or less")


FACTS = Rules(
    refuse=(
        override_that_is_not_read,
        fewer_gpus_than_ranks,
        save_folder_not_writable,
        prompts_without_tokenizer,
        nothing_to_train,
        source_without_rows,
        rows_not_to_truncate,
        *adapter_rules.ADAPTERS.refuse,
    ),
    warn=(
        maybe_unmounted,
        no_tokenizer,
        remarks_on_data,
        dropped_rows,
        answers_without_end,
        truncated_rows,
        different_templates,
        batch_larger_than_data,
        validation_on_training_data,
        devices_that_no_host_has,
    ),
)


def warm_up_longer_than_run(spec: Spec, facts: SubmitFacts) -> Iterator[Problem]:
    """The rule of `domain/spec/rules.py`, with the number of steps from the data."""
    yield from spec_rules.warm_up_longer_than_run(spec, facts.planned_steps)


def _space(spec: Spec, facts: SubmitFacts) -> tuple[int, Storage, str] | None:
    """(free bytes, disk use of the checkpoints, free bytes as text); None if the free bytes are unknown."""
    folder = facts.save_folder
    if folder is None or folder.free is None or facts.shape is None:
        return None
    # With `auto` the device decides. Assume a CPU, which gives the smallest checkpoint.
    need = storage(spec, facts.shape, facts.planned_steps, weights_dtype(spec, "cpu"), facts.first_step)
    return folder.free, need, f"{size(folder.free)} are free in {folder.above}"


_MORE_SPACE = "make room, or name a folder on another disk: checkpoint.save_dir"


def no_space_for_one_checkpoint(spec: Spec, facts: SubmitFacts) -> Iterator[Problem]:
    """At least one checkpoint must fit on the disk."""
    if space := _space(spec, facts):
        free, need, words = space
        if free < need.one_save:
            what = f"{words}, but one checkpoint needs {size(need.one_save)}"
            yield Problem(_SAVE_DIR, what, _MORE_SPACE)


def no_space_for_all_checkpoints(spec: Spec, facts: SubmitFacts) -> Iterator[Problem]:
    """All checkpoints that exist at the same time should fit on the disk."""
    if space := _space(spec, facts):
        free, need, words = space
        if free < need.needed:
            what = f"{words}, but the run's checkpoints take up to {size(need.needed)} at a time"
            fix = f"{_MORE_SPACE}; or keep fewer (checkpoint.keep_last, keep_best, keep_every)"
            yield Problem(_SAVE_DIR, what, fix)


def saves_without_validation(spec: Spec, facts: SubmitFacts) -> Iterator[Problem]:
    """Checkpoints without a validation cannot be the best."""
    save, check = spec.trainer.save_interval, spec.trainer.val_check_interval
    best = best_rule(spec.checkpoint)
    if facts.val is None or best is None or best.metric != "val_loss" or not (save and check):
        return
    if save % check and save < facts.planned_steps:
        both = math.lcm(save, check)
        which = (
            f"at each multiple of {both} and at the last step"
            if both < facts.planned_steps
            else "only at the last step"
        )
        what = (
            f"{save} is not a multiple of trainer.val_check_interval {check}: a checkpoint is validated {which}, "
            "and no other can be the best"
        )
        fix = f"set it to a multiple of {check}, or checkpoint.keep_best to 0"
        yield Problem("trainer.save_interval", what, fix)


# Rules that need `planned_steps`, which the judge adds if all files can be read.
PLANNED = Rules(
    refuse=(warm_up_longer_than_run, no_space_for_one_checkpoint),
    warn=(no_space_for_all_checkpoints, saves_without_validation),
)
