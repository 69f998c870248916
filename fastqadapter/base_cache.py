"""The base's hidden states and lse of every training pair, computed once and kept on disk.

Training in `separate` mode needs nothing else of the frozen base, so that with them a step is the Q pass alone. A
folder holds shards of PAIRS_PER_SHARD pairs each, `base-00000.safetensors` with `hidden` (S, D) and `lse` (S,), and in
their metadata a fingerprint of model and data. A shard is written whole or not at all; those that a killed run has left
are kept.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from fastqadapter import ops
from fastqadapter.data import TokenizedRows
from fastqadapter.models import QAdapterModel
from fastqadapter.models.base import lm_head_of
from fastqadapter.models.streams import lock_of
from fastqadapter.packing import BaseStates, PackedPairs, pack_pairs
from fastqadapter.rows import TOKENIZED_KEYS

FORMAT = 1
PAIRS_PER_SHARD = 256
TOKENS_AT_ONCE = 4096
FINGERPRINT = "fingerprint"
OF_NO_MATTER = ("_name_or_path", "transformers_version", "use_cache")  # in a model's config


class CachedRows(Dataset[dict[str, Any]]):
    """Tokenised rows, each with its `BaseStates` as `base`."""

    def __init__(self, rows: TokenizedRows, folder: Path, pad_action: int | None, fingerprint: str) -> None:
        self.rows, self.folder, self.fingerprint = rows, folder, fingerprint
        self.ends = [0, *itertools.accumulate(states_of(row, pad_action) for row in rows)]  # state rows before a pair
        self._open: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shards(self) -> range:
        return range(-(-len(self) // PAIRS_PER_SHARD))

    def __getitem__(self, index: int) -> dict[str, Any]:
        shard = index // PAIRS_PER_SHARD
        before = self.ends[shard * PAIRS_PER_SHARD]
        if shard not in self._open:  # in each worker of the DataLoader anew
            self._open[shard] = self._checked(shard)
        states = slice(self.ends[index] - before, self.ends[index + 1] - before)
        hidden, lse = (self._open[shard].get_slice(name)[states] for name in ("hidden", "lse"))
        return {**self.rows[index], "base": BaseStates(hidden, lse)}

    def _checked(self, shard: int) -> Any:
        """The open file of a shard; another run may have written it since the folder was looked at."""
        path = shard_path(self.folder, shard)
        if not is_whole(path, self.fingerprint):
            raise ValueError(f"cache_base: {path} is gone: start again to make it anew")
        file = safe_open(path, "pt")
        rows = {name: file.get_slice(name).get_shape()[0] for name in list(file.keys())}
        if rows != dict.fromkeys(("hidden", "lse"), self.states_in(shard)):
            raise ValueError(f"cache_base: {path} does not hold the states of its pairs: delete it")
        return file

    def missing(self) -> list[str]:
        """Names of the shards that are not there."""
        paths = (shard_path(self.folder, shard) for shard in self.shards)
        return [path.name for path in paths if not path.exists()]

    def states_in(self, shard: int) -> int:
        first, last = (min(pair, len(self)) for pair in (shard * PAIRS_PER_SHARD, (shard + 1) * PAIRS_PER_SHARD))
        return self.ends[last] - self.ends[first]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}


def cached_rows(
    model: QAdapterModel,
    rows: TokenizedRows,
    folder: Path,
    *,
    pad_action: int | None = None,
    precision: str = "no",
    process: int = 0,
    processes: int = 1,
) -> CachedRows:
    """The rows with what the base says of them; computes what the folder lacks, this process its share of the shards.

    Args:
        model: whose base it is, on the device that computes, unsharded.
        rows: of the training, in their order.
        folder: of the shards; shared by all processes.
        pad_action: as the collator's.
        precision: the autocast that this is called under, and training will be, as accelerate names it.
        process, processes: rank and number.

    Raises:
        ValueError: another KV mode than `separate`; the folder has shards of another model or data.
        OSError: the disk has no room for all of it, or runs full; no torn file is left.
    """
    if model.qadapter_config.kv_mode != "separate":
        raise ValueError(
            f"cache_base={str(folder)!r}: in kv_mode={model.qadapter_config.kv_mode!r} every step needs the K/V of the "
            "base pass too; leave it out, or train with kv_mode='separate'"
        )
    folder.mkdir(parents=True, exist_ok=True)
    fingerprint = fingerprint_of(model, rows, pad_action, precision)
    cached = CachedRows(rows, folder, pad_action, fingerprint)
    _remove_parts(folder)
    missing = [shard for shard in cached.shards if not is_whole(shard_path(folder, shard), fingerprint)]
    head = lm_head_of(model.get_base_model()).weight
    _check_room(folder, sum(cached.states_in(shard) for shard in missing), head)
    # By number, not by place in a list that each process finds at its own time.
    mine = [shard for shard in missing if shard % processes == process]
    with tqdm(total=len(mine) * PAIRS_PER_SHARD, desc="Base states", unit=" pairs", disable=None) as bar:
        for shard in mine:
            states = [base_states(model, batch) for batch in _batches(_rows_of(rows, shard), pad_action)]
            _write(shard_path(folder, shard), BaseStates.cat(states), fingerprint)
            bar.update(PAIRS_PER_SHARD)
    return cached


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"base-{shard:05d}.safetensors"


def states_of(row: dict[str, Any], pad_action: int | None) -> int:
    """State rows of a pair: the last prompt token, and the inputs of both responses."""
    extra = 0 if pad_action is None else 1
    return 1 + sum(len(row[name]) - 1 + extra for name in ("chosen_ids", "rejected_ids"))


def fingerprint_of(model: QAdapterModel, rows: TokenizedRows, pad_action: int | None, precision: str) -> str:
    """Of the base's weights and config wherever it lies, of dtypes, and of all token ids in their order."""
    base = model.get_base_model()
    identity = {name: value for name, value in model.base_identity.items() if name != "name_or_path"}
    config = {name: value for name, value in base.config.to_dict().items() if name not in OF_NO_MATTER}
    dtype = str(lm_head_of(base).weight.dtype)
    facts = [FORMAT, PAIRS_PER_SHARD, identity, config, dtype, precision, pad_action]
    digest = hashlib.sha256(json.dumps(facts, default=str, sort_keys=True).encode())
    for row in rows:
        digest.update(json.dumps([row[name] for name in TOKENIZED_KEYS]).encode())
    return digest.hexdigest()


def is_whole(path: Path, fingerprint: str) -> bool:
    """Whether the shard is there.

    Raises:
        ValueError: it is of another model or data, or no such file.
    """
    if not path.exists():
        return False
    try:
        with safe_open(path, "pt") as file:
            found = (file.metadata() or {}).get(FINGERPRINT)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cache_base: {path} cannot be read ({error}): delete it") from None
    if found != fingerprint:
        raise ValueError(
            f"cache_base: {path} is of another base model, other training data or another max_length: delete "
            f"{path.parent}, or name another folder"
        )
    return True


@torch.no_grad()
def base_states(model: QAdapterModel, batch: PackedPairs) -> BaseStates:
    """What the base says of a batch, on the CPU."""
    head = lm_head_of(model.get_base_model())
    with lock_of(model.streams.decoder):
        hidden, _ = model.streams.stream_states(batch.to(model.device), adapters=())
    _, lse = ops.soft_value(
        hidden,
        hidden,
        head.weight,
        alpha_0=1.0,
        alpha_tilde=1.0,
        bias=head.bias,
        logit_scale=head.logit_scale,
        softcap=head.softcap,
        return_base_lse=True,
    )
    return BaseStates(hidden, lse.float()).map(Tensor.cpu)


def _rows_of(rows: TokenizedRows, shard: int) -> list[dict[str, Any]]:
    return rows[shard * PAIRS_PER_SHARD : (shard + 1) * PAIRS_PER_SHARD]


def _batches(rows: Sequence[dict[str, Any]], pad_action: int | None) -> Iterator[PackedPairs]:
    """In their order, each of about so many tokens."""
    pairs: list[tuple[list[int], list[int], list[int]]] = []
    tokens = 0
    for row in rows:
        pairs.append((row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]))
        tokens += sum(map(len, pairs[-1]))
        if tokens >= TOKENS_AT_ONCE:
            yield pack_pairs(pairs, pad_action=pad_action)
            pairs, tokens = [], 0
    if pairs:
        yield pack_pairs(pairs, pad_action=pad_action)


def _check_room(folder: Path, states: int, head: Tensor) -> None:
    needed, free = states * (head.shape[1] * head.element_size() + 4), shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"cache_base={str(folder)!r}: the base states take {needed >> 20} MiB and {free >> 20} MiB are free: make "
            "room, or leave the option out"
        )


def _remove_parts(folder: Path) -> None:
    """Parts that runs of this machine left behind when they were killed."""
    for part in folder.glob("base-*.part"):
        host, _, pid = part.stem.partition(".")[2].rpartition("-")
        unused = time.time() - part.stat().st_mtime > 3600  # another container may have this name and other processes
        if host == socket.gethostname() and unused and not psutil.pid_exists(int(pid)):
            part.unlink(missing_ok=True)


def _write(path: Path, states: BaseStates, fingerprint: str) -> None:
    part = path.with_suffix(f".{socket.gethostname()}-{os.getpid()}.part")  # two runs may write one shard at once
    try:
        save_file({"hidden": states.hidden, "lse": states.lse}, part, {FINGERPRINT: fingerprint})
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        raise OSError(f"cache_base: {path} cannot be written ({error}): start again when it can be, to go on") from None
    finally:
        part.unlink(missing_ok=True)
