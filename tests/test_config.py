"""`QAdapterConfig`: presets, illegal values, and the sidecar file."""

from __future__ import annotations

import dataclasses
import json
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest

import fastqadapter
from fastqadapter.config import CONFIG_NAME, FORMAT, PRESETS, QAdapterConfig, read_sidecar, write_sidecar

BASE = {"name_or_path": "some/model", "hidden_size": 576}


def test_documented_defaults():
    assert QAdapterConfig().to_dict() == {
        "alpha_0": 1.0,
        "alpha_tilde": 1.0,
        "gamma": 1.0,
        "beta": 0.01,
        "kv_mode": "shared",
        "preset": "default",
        "q_head": "difference",
        "scored_states": "response",
        "value_state": "next",
        "divisor": "8",
        "regularizer": "pair",
    }


@pytest.mark.parametrize(
    ("preset", "fields"),
    [
        ("default", ("difference", "response", "next", "8", "pair")),
        ("paper", ("logits", "response", "next", "1", "pair")),
        ("reference", ("logits", "shifted", "current", "padded_length", "batch")),
    ],
)
def test_presets_as_in_the_design(preset: str, fields: tuple[str, ...]):
    config = QAdapterConfig(preset=preset)
    assert (config.q_head, config.scored_states, config.value_state, config.divisor, config.regularizer) == fields


@pytest.mark.parametrize("preset", PRESETS)
def test_any_field_of_a_preset_can_be_set_by_itself(preset: str):
    other = PRESETS["reference" if preset == "default" else "default"]
    for name, value in other.items():
        config = QAdapterConfig(preset=preset, **{name: value})
        assert getattr(config, name) == value
        assert all(getattr(config, rest) == PRESETS[preset][rest] for rest in PRESETS[preset] if rest != name)


@pytest.mark.parametrize(
    ("value", "stored", "number"),
    [(8, "8", 8.0), (0.5, "0.5", 0.5), ("16", "16", 16.0), ("max_length", "max_length", None)],
)
def test_divisor_is_a_name_or_a_number(value: Any, stored: str, number: float | None):
    config = QAdapterConfig(divisor=value)
    assert (config.divisor, config.fixed_divisor) == (stored, number)


NUMBERS: dict[str, tuple[str, list[Any], list[Any]]] = {  # legal range, illegal values, legal borders
    "alpha_0": (r"\[0, inf\)", [-0.1, nan, inf, "1.0", None, True], [0.0, 0, 1e9]),
    "alpha_tilde": (r"\(0, inf\)", [0.0, 0, -1.0, nan, inf, "1.0", None, False], [1e-9, 5]),
    "gamma": (r"\[0, 1\]", [-0.1, 1.0001, nan, inf, "1", None], [0.0, 1, 0.9]),
    "beta": (r"\[0, inf\)", [-1e-9, nan, inf, "0.1", None], [0.0, 3]),
    "divisor": (r"\(0, inf\)", [0, -1, "0", "-3", nan, inf, "nan"], [1e-3, "7"]),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_number_outside_its_range_is_named_with_the_range(name: str):
    legal_range, illegal, legal = NUMBERS[name]
    for value in illegal:
        with pytest.raises(ValueError, match=f"^{name}=.* is outside its legal range {legal_range}$"):
            QAdapterConfig(**{name: value})
    for value in legal:
        QAdapterConfig(**{name: value})


@pytest.mark.parametrize("name", ["kv_mode", "preset", "q_head", "scored_states", "value_state", "regularizer"])
def test_unknown_choice_is_named_beside_the_known_ones(name: str):
    for value in ("Shared", "", 1, ["default"], nan):
        with pytest.raises(ValueError, match=rf"^{name}=.* is not one of '") as caught:
            QAdapterConfig(**{name: value})
        assert repr(value) in str(caught.value)
    for name in ("kv_mode", "preset"):  # no preset to take these from
        with pytest.raises(ValueError, match=f"{name}=None is not one of"):
            QAdapterConfig(**{name: None})


@pytest.mark.parametrize("value", ["length", "", True, [8], "8 tokens"])
def test_unknown_divisor_is_named(value: Any):
    with pytest.raises(ValueError, match="divisor=.* is not one of 'max_length', 'padded_length' or a number > 0"):
        QAdapterConfig(divisor=value)


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        QAdapterConfig().alpha_0 = 2.0


@pytest.mark.parametrize("preset", PRESETS)
def test_round_trip_through_a_dict(preset: str):
    for config in (QAdapterConfig(preset=preset), QAdapterConfig(preset=preset, divisor=8, q_head="logits", beta=0)):
        assert QAdapterConfig.from_dict(config.to_dict()) == config
        assert QAdapterConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_unknown_key_is_named():
    with pytest.raises(ValueError, match=r"unknown QAdapterConfig fields \['alpha', 'zeta'\].*alpha_0"):
        QAdapterConfig.from_dict({"zeta": 1.0, "alpha": 1.0, "alpha_0": 1.0})


def test_every_field_has_a_help_text():
    """The command line shows it."""
    assert all(field.metadata["help"] for field in dataclasses.fields(QAdapterConfig))


def test_sidecar_round_trip(tmp_path: Path):
    config = QAdapterConfig(preset="paper", kv_mode="prompt", divisor=8)
    write_sidecar(tmp_path, config, BASE)
    assert [file.name for file in tmp_path.iterdir()] == [CONFIG_NAME] == ["qadapter_config.json"]
    assert read_sidecar(tmp_path / CONFIG_NAME) == (config, BASE)
    content = json.loads((tmp_path / CONFIG_NAME).read_text(encoding="utf-8"))
    assert content["format"] == FORMAT and content["fastqadapter_version"] == fastqadapter.__version__
    assert content["alpha_0"] == 1.0 and content["divisor"] == "8"


def test_sidecar_without_a_base_or_a_version_can_be_read(tmp_path: Path):
    path = tmp_path / CONFIG_NAME
    path.write_text(json.dumps({"format": FORMAT, "alpha_0": 0.5}))
    assert read_sidecar(path) == (QAdapterConfig(alpha_0=0.5), {})


BAD_FILES: dict[str, tuple[str | bytes, str]] = {
    "newer format": ('{"format": 2}', "format 2 is not 1.*upgrade"),
    "no format": ('{"alpha_0": 1.0}', "format None is not 1"),
    "unknown key": ('{"format": 1, "delta": 1.0}', r"unknown QAdapterConfig fields \['delta'\]"),
    "illegal value": ('{"format": 1, "alpha_tilde": 0.0}', r"alpha_tilde=0\.0 is outside its legal range \(0, inf\)"),
    "NaN": ('{"format": 1, "gamma": NaN}', "gamma=nan"),
    "text for a number": ('{"format": 1, "gamma": "1.0"}', r"gamma='1\.0'"),
    "base is no object": ('{"format": 1, "base": "some/model"}', "base"),
    "base is null": ('{"format": 1, "base": null}', "base"),
    "truncated": ('{"format": 1, "alpha_0"', "line 1"),
    "empty": ("", "line 1"),
    "list": ("[1, 2]", "list"),
    "number": ("1", "int"),
    "null": ("null", "NoneType"),
    "text": ('"format"', "str"),
    "binary": (b"\x80\x04\x95", "codec"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_sidecar_is_one_clear_line_with_its_path(case: str, tmp_path: Path):
    content, message = BAD_FILES[case]
    path = tmp_path / CONFIG_NAME
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as caught:
        read_sidecar(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ") and "\n" not in text
    for internal in ("object has no attribute", "expected at most", "must be str"):
        assert internal not in text  # the words of Python's own errors help no user
