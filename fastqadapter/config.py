"""`QAdapterConfig`: the hyper-parameters of a Q-Adapter, kept beside PEFT's own files as `qadapter_config.json`."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

CONFIG_NAME = "qadapter_config.json"
FORMAT = 1

KVMode = Literal["separate", "prompt", "shared"]
Preset = Literal["default", "paper", "reference"]
QHead = Literal["difference", "logits"]
ScoredStates = Literal["response", "shifted"]
ValueState = Literal["next", "current"]
Regularizer = Literal["pair", "batch"]

# What the three variants of the objective differ in; any of these fields can also be set by itself.
PRESETS: dict[str, dict[str, Any]] = {
    "default": {
        "q_head": "difference",
        "scored_states": "response",
        "value_state": "next",
        "divisor": "8",  # by the longer response an adapter learned "shorter is better" (benchmarks/QUALITY.md)
        "regularizer": "pair",
    },
    "paper": {
        "q_head": "logits",
        "scored_states": "response",
        "value_state": "next",
        "divisor": "1",
        "regularizer": "pair",
    },
    "reference": {
        "q_head": "logits",
        "scored_states": "shifted",
        "value_state": "current",
        "divisor": "padded_length",
        "regularizer": "batch",
    },
}
LEGAL: dict[str, tuple[str, ...]] = {
    "kv_mode": ("separate", "prompt", "shared"),
    "preset": tuple(PRESETS),
    "q_head": ("difference", "logits"),
    "scored_states": ("response", "shifted"),
    "value_state": ("next", "current"),
    "regularizer": ("pair", "batch"),
}


@dataclasses.dataclass(frozen=True)
class QAdapterConfig:
    """Hyper-parameters of a Q-Adapter (Li et al., ICLR 2025, https://arxiv.org/abs/2407.03856).

    Customised policy `pi~ = softmax((q + alpha_0 log pi) / alpha_tilde)`; reward `r_t = q_t[a_t] - gamma v(s_{t+1})`;
    loss of a pair `-log sigmoid((sum_t r_t^chosen - sum_t r_t^rejected) / divisor) + beta mean_t r_t^2`.

    The fields below `preset` are None for "as the preset says" and read back as the value in force.

    Raises:
        ValueError: a value outside its range; the message names the value and the range.
    """

    alpha_0: float = dataclasses.field(default=1.0, metadata={"help": "weight of the base policy, >= 0"})
    alpha_tilde: float = dataclasses.field(default=1.0, metadata={"help": "temperature of the customised policy, > 0"})
    gamma: float = dataclasses.field(default=1.0, metadata={"help": "discount, in [0, 1]"})
    beta: float = dataclasses.field(default=0.01, metadata={"help": "weight of the reward regulariser, >= 0"})
    kv_mode: KVMode = dataclasses.field(
        default="shared", metadata={"help": "which K/V the Q stream attends to: separate, prompt or shared"}
    )
    preset: Preset = dataclasses.field(
        default="default", metadata={"help": "variant of the objective: default, paper or reference"}
    )
    q_head: QHead | None = dataclasses.field(
        default=None, metadata={"help": "q = W (h_q - h_b) ('difference') or W h_q ('logits'); default: the preset's"}
    )
    scored_states: ScoredStates | None = dataclasses.field(
        default=None,
        metadata={"help": "'response': every response token; 'shifted': the published mask; default: the preset's"},
    )
    value_state: ValueState | None = dataclasses.field(
        default=None, metadata={"help": "value in r_t: of the 'next' or the 'current' state; default: the preset's"}
    )
    divisor: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": "divides the reward sums: a number > 0, 'max_length' (longer response) or 'padded_length' (longest "
            "sequence of the micro-batch - 1); default: the preset's"
        },
    )
    regularizer: Regularizer | None = dataclasses.field(
        default=None,
        metadata={"help": "mean of r^2 over the tokens of the 'pair' or of the micro-'batch'; default: the preset's"},
    )

    def __post_init__(self) -> None:
        _check_choice("preset", self.preset)
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for name in LEGAL:
            _check_choice(name, getattr(self, name))
        _check_number("alpha_0", self.alpha_0, low=0.0)
        _check_number("alpha_tilde", self.alpha_tilde, low=0.0, open_low=True)
        _check_number("gamma", self.gamma, low=0.0, high=1.0)
        _check_number("beta", self.beta, low=0.0)
        object.__setattr__(self, "divisor", str(self.divisor))  # a number is welcome too
        if self.fixed_divisor is not None:
            _check_number("divisor", self.fixed_divisor, low=0.0, open_low=True)

    @property
    def fixed_divisor(self) -> float | None:
        """The divisor where it is one number for all pairs, else None.

        Raises:
            ValueError: `divisor` is neither a number nor a known name.
        """
        if self.divisor in ("max_length", "padded_length"):
            return None
        try:
            return float(str(self.divisor))
        except ValueError:
            raise ValueError(
                f"divisor={self.divisor!r} is not one of 'max_length', 'padded_length' or a number > 0"
            ) from None

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain Python values, every preset field resolved."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QAdapterConfig:
        """Inverse of `to_dict`.

        Raises:
            ValueError: an unknown key (a typo, or a file of a newer version).
        """
        names = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - names)
        if unknown:
            raise ValueError(f"unknown QAdapterConfig fields {unknown}: the known ones are {sorted(names)}")
        return cls(**values)


def write_sidecar(folder: str | Path, config: QAdapterConfig, base: Mapping[str, Any]) -> None:
    """Write `folder/qadapter_config.json`: the config and what identifies the base model it belongs to."""
    from fastqadapter import __version__

    content = {"format": FORMAT, "fastqadapter_version": __version__, **config.to_dict(), "base": dict(base)}
    path = Path(folder) / CONFIG_NAME
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_sidecar(path: str | Path) -> tuple[QAdapterConfig, dict[str, Any]]:
    """Read a sidecar file: the config, and the identity of the base model it was trained on.

    Raises:
        ValueError: unreadable JSON, a newer format or an illegal value; the message names the file.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"expected a JSON object, not {json.dumps(content)[:40]} ({type(content).__name__})")
        found = content.pop("format", None)
        if found != FORMAT:
            raise ValueError(
                f"format {found!r} is not {FORMAT}: written by another version of fastqadapter, upgrade it"
            )
        content.pop("fastqadapter_version", None)
        base = content.pop("base", {})
        if not isinstance(base, dict):
            raise ValueError(f"base is not an object: {json.dumps(base)[:40]}")
        return QAdapterConfig.from_dict(content), base
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _check_choice(name: str, value: Any) -> None:
    if value not in LEGAL[name]:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, LEGAL[name]))}")


def _check_number(name: str, value: Any, *, low: float, high: float = math.inf, open_low: bool = False) -> None:
    legal = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if high == math.inf else ']'}"
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not low <= value <= high or (open_low and value == low):
        raise ValueError(f"{name}={value!r} is outside its legal range {legal}")
