"""Tiny random models, data and attempts; `launch` trains them with the real trainer under the real torchrun."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sftd.domain.log.events import Event, StepCompleted, ValidationCompleted
from sftd.domain.spec.parse import parse
from sftd.domain.spec.spec import Spec
from sftd.wire.attempt import journal
from sftd.wire.attempt.directory import AttemptDir, Order
from tests.holds import Holds
from tests.patience import PATIENCE
from tests.warm import Fault, Ranks, WarmTrainer
from tests.warm_client import VARIABLE

VOCAB = 250
TRAIN_ROWS = 37
PROMPT = "abc"
E = TypeVar("E", bound=Event)
_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "eos_token_id": 0,
    "bos_token_id": 1,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# Name → (transformers model, config, what its config gets besides the sizes).
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama_tied": ("LlamaForCausalLM", "LlamaConfig", {"tie_word_embeddings": True}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", {"tie_word_embeddings": False}),
    "llama3_rope": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {"tie_word_embeddings": False, "rope_parameters": _LLAMA3},
    ),
    "mistral": ("MistralForCausalLM", "MistralConfig", {"sliding_window": None, "head_dim": 32}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {"tie_word_embeddings": False, "head_dim": 32}),
    # Llama 2 has a key and a value for every head; the odd vocabulary is padded when two ranks share it.
    "llama2": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {"tie_word_embeddings": False, "num_key_value_heads": 4, "vocab_size": VOCAB + 1},
    ),
    "qwen2_untied": ("Qwen2ForCausalLM", "Qwen2Config", {"tie_word_embeddings": False}),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 2, "initializer_range": 0.1},
    ),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 32,
            "head_dim": 32,
            "norm_topk_prob": True,
            "num_hidden_layers": 2,
            "initializer_range": 0.1,
        },
    ),
    # Weights of the taken experts that do not sum to one.
    "qwen3_moe_plain": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "norm_topk_prob": False,
            "initializer_range": 0.1,
        },
    ),
}


@pytest.fixture(scope="session")
def models(made_once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """Folder of the tiny models of `MODELS`, in FP32, each with a tokenizer of one token per character."""
    return made_once("models", write_models)


def write_models(folder: Path) -> None:
    """Write the tiny models into a folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        import transformers
        from tokenizers import Tokenizer, decoders, pre_tokenizers
        from tokenizers.models import WordLevel

        words = {"<eos>": 0, "<bos>": 1, "<unk>": 2} | {chr(33 + i): 3 + i for i in range(VOCAB - 3)}
        tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        tokenizer.decoder = decoders.Fuse()
        fast = transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
        )
        fast.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}!"
        for name, (model, config, extra) in MODELS.items():
            torch.manual_seed(7)
            network = getattr(transformers, model)(getattr(transformers, config)(**_SIZES | extra)).float()
            with torch.no_grad():
                # Norms start at one and biases at zero, which would hide a wrong mapping.
                for parameter in network.parameters():
                    if parameter.dim() == 1:
                        parameter.add_(torch.randn_like(parameter) * 0.1)
            network.save_pretrained(folder / name)
            fast.save_pretrained(folder / name)


def write_rows(path: Path, rows: int, seed: int, row_group_size: int = 10) -> None:
    """Random rows of 6 to 60 tokens, each with a prompt that is not trained."""
    rng = np.random.default_rng(seed)
    ids, labels = [], []
    for _ in range(rows):
        tokens = rng.integers(3, VOCAB, int(rng.integers(6, 61)))
        trained = tokens.copy()
        trained[: int(rng.integers(1, tokens.size - 1))] = -100
        ids.append(tokens.tolist())
        labels.append(trained.tolist())
    table = pa.table({"input_ids": ids, "attention_mask": [[1] * len(i) for i in ids], "labels": labels})
    pq.write_table(table, path, row_group_size=row_group_size)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with train.parquet and val.parquet (whose 11 rows no batch size divides)."""
    folder = tmp_path_factory.mktemp("data")
    write_rows(folder / "train.parquet", TRAIN_ROWS, seed=1)
    write_rows(folder / "val.parquet", 11, seed=2)
    return folder


@dataclass(frozen=True)
class Run:
    """An attempt that has ended."""

    attempt: AttemptDir
    code: int
    output: str

    def events(self, kind: type[E]) -> list[E]:
        """Its events of one type, in order."""
        return [e for e in self.all_events() if isinstance(e, kind)]

    def all_events(self) -> list[Event]:
        """Its events in order."""
        return [line.event for line in journal.read(self.attempt.journal)[0]]

    def steps(self) -> dict[int, StepCompleted]:
        """Its steps by number."""
        return {e.step: e for e in self.events(StepCompleted)}

    def validations(self) -> dict[int, ValidationCompleted]:
        """Its validations by step."""
        return {e.step: e for e in self.events(ValidationCompleted)}

    def checkpoint(self, step: int) -> Path:
        """Folder of a published checkpoint."""
        return Path(self.attempt.order().checkpoint_dir) / f"step-{step:08d}"

    def errors(self) -> str:
        """What the ranks wrote into torchelastic's error files."""
        return "\n".join(p.read_text() for p in self.attempt.ranks_dir.rglob("error.json"))


class Trainer:
    """Prepares and runs attempts of the tiny Llama."""

    def __init__(
        self,
        root: Path,
        models: Path,
        data: Path,
        *,
        device: str = "cpu",
        strict: bool = True,
        warm: str | None = None,
    ) -> None:
        """`strict`: warnings are errors; not on a GPU machine, whose libraries and their warnings are its own. `warm`: what the
        fixture `warm_python` is; without it every torchrun and rank is an interpreter of its own."""
        self._root = root
        self._device = device
        self._strict = strict
        self._warm = warm
        self._models = models
        self._data = data
        self._done: dict[str, Run] = {}
        self.holds = Holds(root / "holds")

    def spec(self, ranks: int = 1, **overrides: Any) -> Spec:
        """Six steps of eight samples; `overrides` are dotted keys with __ for the dot."""
        config = {
            "model": {"partial_pretrain": str(self._models / "llama_tied")},
            "data": {
                "train_files": [str(self._data / "train.parquet")],
                "val_files": [str(self._data / "val.parquet")],
                "train_batch_size": 8,
                "sequence_length": 64,
            },
            "optimizer": {"lr": 1e-3},
            "scheduler": {"warmup_steps": 2, "min_lr_ratio": 0.1},
            "trainer": {"max_steps": 6, "save_interval": 3, "val_check_interval": 2},
            "launch": {"nproc_per_node": ranks, "device": self._device},
        }
        return parse(config, [(key.replace("__", "."), value) for key, value in overrides.items()])[0]

    def prepare(self, name: str, spec: Spec, **order: Any) -> AttemptDir:
        """Write the order of an attempt."""
        attempt = AttemptDir(self._root / name)
        shutil.rmtree(attempt.path, ignore_errors=True)
        fields = {
            "checkpoint_dir": str(attempt.path / "checkpoints"),
            "planned_steps": spec.planned_steps(TRAIN_ROWS),
        }
        attempt.create(Order(run_id="run", attempt=1, token="token", spec=spec, **fields | order))
        return attempt

    def start(
        self,
        attempt: AttemptDir,
        *,
        largest_file: int | None = None,
        script: Path | None = None,
        cold: bool = False,
    ) -> subprocess.Popen[bytes]:
        """torchrun on an attempt, warnings being errors. `script` takes the trainer's place. `cold`: all imports are its own.

        Writing past `largest_file` bytes of a file fails with EFBIG, like a full disk.
        """
        ranks = attempt.order().spec.world_size
        argv = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nnodes",
            "1",
            "--nproc-per-node",
            str(ranks),
        ]
        argv += ["--standalone", "--max-restarts", "0", "--log-dir", str(attempt.ranks_dir)]
        argv += [str(script)] if script else ["-m", "sftd.trainer"]

        def limit() -> None:
            if largest_file is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

        with open(attempt.output_log, "wb") as log:
            return subprocess.Popen(
                [*argv, str(attempt.path)],
                env=self.environment(cold=cold),
                stdout=log,
                stderr=log,
                preexec_fn=limit,
            )

    def environment(self, *, cold: bool = False) -> dict[str, str]:
        """Of processes that train, or work on what was trained."""
        environment = dict(os.environ, OMP_NUM_THREADS="1")
        if self._strict:
            environment["PYTHONWARNINGS"] = "error"
        if self._device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        environment |= self.holds.environment(environment)
        if self._warm is not None and not cold:
            environment[VARIABLE] = self._warm
        return environment

    def held(self, attempt: AttemptDir, process: subprocess.Popen[bytes]) -> psutil.Process:
        """Wait until an attempt stands still where `holds` has said. Returns the rank that reports."""
        return self.holds.wait(attempt.path, lambda: process.poll() is not None)

    def finish(self, attempt: AttemptDir, process: subprocess.Popen[bytes], *, expect: int | None = 0) -> Run:
        """Wait for the end; anything but the expected exit code fails the test with the output."""
        code = process.wait(timeout=PATIENCE)
        output = attempt.output_log.read_text(errors="replace")
        if expect is not None and code != expect:
            pytest.fail(f"exit code {code}\n{output[-6000:]}")
        return Run(attempt, code, output)

    def train(
        self, warm: WarmTrainer, attempt: AttemptDir, *, expect: int = 0, faults: Sequence[Fault] = ()
    ) -> Run:
        """Train an attempt to its end without torchrun."""
        return self.ended(attempt, self.start_warm(warm, attempt, faults), expect=expect)

    def start_warm(self, warm: WarmTrainer, attempt: AttemptDir, faults: Sequence[Fault] = ()) -> Ranks:
        """The ranks of an attempt without torchrun."""
        return warm.attempt(attempt.path, attempt.order().spec.world_size, attempt.output_log, faults)

    def ended(self, attempt: AttemptDir, ranks: Ranks, *, expect: int = 0) -> Run:
        """Wait for the end; anything but the expected exit code of a rank fails the test with the output."""
        codes = ranks.wait()
        run = Run(attempt, codes[0], attempt.output_log.read_text(errors="replace"))
        if any(code != expect for code in codes):
            pytest.fail(f"exit codes {codes}\n{run.output[-6000:]}")
        return run

    def run(self, name: str, ranks: int = 1, **overrides: Any) -> Run:
        """Train an attempt from the pretrained model to its end, once per name in the whole test session."""
        if name not in self._done:
            attempt = self.prepare(name, self.spec(ranks, **overrides))
            self._done[name] = self.finish(attempt, self.start(attempt))
        return self._done[name]


@pytest.fixture(scope="session")
def trainer(tmp_path_factory: pytest.TempPathFactory, models: Path, data: Path, warm_python: str) -> Trainer:
    """Runs attempts, and keeps those that have ended for other tests to compare with."""
    return Trainer(tmp_path_factory.mktemp("attempts"), models, data, warm=warm_python)


@pytest.fixture(scope="module")
def forked(warm_python: str) -> Iterator[None]:
    """What a module's tests start without a daemon is forked, unless they clear the variable."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, warm_python)
        yield


@pytest.fixture(scope="session")
def warm(warm_python: str) -> Iterator[WarmTrainer]:
    """Starts ranks without torchrun, in a fraction of its time."""
    process = WarmTrainer(warm_python)
    yield process
    process.close()


@pytest.fixture(scope="session")
def base(trainer: Trainer) -> Run:
    """One rank, micro-batches of one sample, padded, with sample prompts: what the other runs are compared with."""
    return trainer.run("base", trainer__sample_prompts=[PROMPT], trainer__sample_max_tokens=8)
