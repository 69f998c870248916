"""The adapters of a served folder, and what a request asks of them."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any

from fastqadapter.config import KVMode, QHead

KEY = "fastqadapter"  # in config.json
FORMAT = 1
FIELDS = ("alpha_0", "alpha_tilde", "adapters")  # of a request
LARGEST_SHARE = 100.0  # of alpha_tilde: beyond, logits of a few hundred overflow fp16


NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


def check_name(name: str) -> None:
    """Raise a ValueError for what cannot be the name of an adapter, in requests and as a folder."""
    if not NAME.fullmatch(name):
        raise ValueError(f"adapter name {name!r}: use up to 100 letters, digits, '-', '_' and '.'")


@dataclasses.dataclass(frozen=True)
class ServedAdapter:
    """One adapter; the alphas are what a request gets that names none."""

    alpha_0: float
    alpha_tilde: float
    q_head: QHead = "difference"


@dataclasses.dataclass(frozen=True)
class Served:
    """What `export_for_vllm` writes into config.json under `fastqadapter`."""

    base: str
    kv_mode: KVMode
    adapters: Mapping[str, ServedAdapter]  # the first is the default
    max_adapters: int = 1  # of one request
    logit_scale: float = 1.0  # behind the LM head, as in Cohere and Granite

    @staticmethod
    def of(hf_config: Any) -> Served:
        """Read from a config of transformers.

        Raises:
            ValueError: there is none in it, or one of another version.
        """
        return Served.from_dict(getattr(hf_config, KEY, None))

    @staticmethod
    def from_dict(found: Any) -> Served:
        """Inverse of `to_dict`.

        Raises:
            ValueError: none was given, or one of another version.
        """
        if not isinstance(found, Mapping):
            raise ValueError(f"config.json has no {KEY!r} entry: make the folder with `fastqadapter export-vllm`")
        if found.get("format") != FORMAT:
            raise ValueError(
                f"config.json: {KEY} has format {found.get('format')!r}, not {FORMAT}: export it again with this "
                "version"
            )
        fields = {name: value for name, value in found.items() if name != "format"}
        try:
            fields["adapters"] = {name: ServedAdapter(**each) for name, each in fields["adapters"].items()}
            served = Served(**fields)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"config.json: {KEY} is damaged ({error}): export it again") from None
        for name in served.adapters:
            check_name(name)
        return served

    @staticmethod
    def read(folder: Path) -> Served:
        """What a folder of `fastqadapter export-vllm` serves.

        Raises:
            ValueError: it is no such folder.
        """
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            config = {}
        if not isinstance(config, dict) or KEY not in config:
            raise ValueError(f"{folder} is not a folder that `fastqadapter export-vllm` wrote")
        return Served.from_dict(config[KEY])

    def to_dict(self) -> dict[str, Any]:
        return {"format": FORMAT, **dataclasses.asdict(self)}

    def to_json(self) -> str:
        return json.dumps(self.to_dict())

    @staticmethod
    def from_json(text: str) -> Served:
        return Served.from_dict(json.loads(text))

    @property
    def names(self) -> list[str]:
        return list(self.adapters)

    def request(self, extra_args: Mapping[str, Any] | None) -> RequestDials:
        """The dials of a request, from `SamplingParams.extra_args`; what it leaves out is the sidecar's.

        `alpha_0`, `alpha_tilde`: numbers. `adapters`: a name, "NAME=WEIGHT", a list of those, or a dict of weights.

        Raises:
            ValueError: a name or value that cannot be; one line, with the remedy.
        """
        if not isinstance(extra_args, Mapping | None):
            raise ValueError(f"extra_args={extra_args!r:.100} is no mapping of names to values")
        given = dict(extra_args or {})
        for name in map(str, given):  # those of other plugins pass
            close = difflib.get_close_matches(name.lower(), FIELDS, n=1, cutoff=0.6)
            if name not in FIELDS and close:
                raise ValueError(f"{name:.100}: no such field; did you mean {close[0]}?")
        weights = self._weights(given.get("adapters"))
        active = {name: weight for name, weight in weights.items() if weight != 0.0}
        default = self.adapters[next(iter(active or weights)) if len(active or weights) == 1 else self.names[0]]
        alpha_0 = _number("alpha_0", given.get("alpha_0", default.alpha_0), low=0.0, open_low=False)
        alpha_tilde = _number("alpha_tilde", given.get("alpha_tilde", default.alpha_tilde), low=0.0, open_low=True)
        for name, weight in {"alpha_0": alpha_0, **active}.items():
            if abs(weight) > LARGEST_SHARE * alpha_tilde:
                raise ValueError(
                    f"{name}={weight:g} with alpha_tilde={alpha_tilde:g}: a share above {LARGEST_SHARE:g} overflows; "
                    "that large is the plain argmax: use temperature=0"
                )
        whole = [name for name in active if self.adapters[name].q_head == "logits"]
        if whole and active != {whole[0]: 1.0}:
            raise ValueError(
                f"adapters: {whole[0]!r} has q_head='logits' and holds the base logits too, so it can only be used "
                "alone and with weight 1"
            )
        indices = {self.names.index(name): weight / alpha_tilde for name, weight in active.items()}
        if self.kv_mode == "separate" and not indices:  # its K/V must be there for whom the blocks serve next
            indices = {self.names.index(next(iter(weights))): 0.0}
        base = alpha_0 - (0.0 if whole else sum(active.values()))
        return RequestDials(base / alpha_tilde, indices)

    def _weights(self, given: Any) -> dict[str, float]:
        if given is None:
            return {self.names[0]: 1.0}
        if isinstance(given, Mapping):
            pairs = [(str(name), weight) for name, weight in given.items()]
        elif isinstance(given, (str, list, tuple)):
            entries = [given] if isinstance(given, str) else list(given)
            if not all(isinstance(entry, str) for entry in entries):
                raise ValueError(f"adapters={given!r:.100}: the list holds other things than names and 'NAME=WEIGHT'")
            pairs = [(name, text if equals else 1.0) for name, equals, text in (e.partition("=") for e in entries)]
        else:
            raise ValueError(f"adapters={given!r:.100}: give a name, 'NAME=WEIGHT', or a list of those")
        if not pairs:
            raise ValueError(f"adapters is empty; give one of {', '.join(self.names)}, or NAME=0 for the base alone")
        weights: dict[str, float] = {}
        for name, weight in pairs:
            if name not in self.adapters:
                raise ValueError(f"adapter {name!r:.100} is not served; served are {', '.join(self.names)}")
            if name in weights:
                raise ValueError(f"adapters names {name!r} twice")
            weights[name] = _number(f"adapters: {name}", weight, low=-math.inf, open_low=True)
        active = sum(weight != 0.0 for weight in weights.values())
        if active > self.max_adapters:
            raise ValueError(
                f"{active} adapters in one request; this server takes {self.max_adapters} "
                "(`export-vllm --max_adapters`)"
            )
        return weights


def _number(name: str, value: Any, *, low: float, open_low: bool) -> float:
    legal = "a finite number" + ("" if low == -math.inf else f" {'>' if open_low else '>='} {low:g}")
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, (Real, str)) else float(value)
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number) or number < low or (open_low and number == low):
        raise ValueError(f"{name}={value!r:.100} is not {legal}")
    return number


@dataclasses.dataclass(frozen=True)
class RequestDials:
    """The combined state is `base_share h_b + sum_i shares[i] h_i`, over the indices i of adapters."""

    base_share: float
    shares: Mapping[int, float]

    @property
    def is_base(self) -> bool:
        """Nothing to do."""
        return not self.shares and self.base_share == 1.0


BASE = RequestDials(1.0, {})
