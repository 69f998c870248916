"""What a request may ask of a server of Q-Adapters, and the rows that a step gets for it; no vLLM needed."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from fastqadapter.integrations.vllm import NATIVE, served_architecture
from fastqadapter.integrations.vllm.rows import QRows, RowBuffers, rows_of_step
from fastqadapter.integrations.vllm.served import BASE, KEY, RequestDials, Served, ServedAdapter
from fastqadapter.loss import LMHead
from fastqadapter.models.dials import Dials

POLITE, SHORT = ServedAdapter(0.5, 2.0), ServedAdapter(1.0, 1.0)


def served(max_adapters: int = 2, **changes: Any) -> Served:
    fields: dict[str, Any] = {"kv_mode": "shared", "adapters": {"polite": POLITE, "brief": SHORT}}
    return Served("a base", **(fields | changes), max_adapters=max_adapters)


@pytest.mark.parametrize(
    ("extra", "base_share", "shares"),
    [
        (None, -0.25, {0: 0.5}),
        ({}, -0.25, {0: 0.5}),
        ({"adapters": "brief"}, 0.0, {1: 1.0}),
        ({"adapters": "brief", "alpha_tilde": 0.5}, 0.0, {1: 2.0}),
        ({"adapters": "brief=0.25"}, 0.75, {1: 0.25}),
        ({"adapters": ["brief=0.25", "polite=-1"], "alpha_0": 1, "alpha_tilde": 1}, 1.75, {1: 0.25, 0: -1.0}),
        ({"adapters": {"brief": 0.25, "polite": -1}, "alpha_0": "1", "alpha_tilde": "1"}, 1.75, {1: 0.25, 0: -1.0}),
        ({"adapters": "brief=0"}, 1.0, {}),
        ({"adapters": {"brief": 0}, "alpha_0": 3}, 3.0, {}),
        ({"kv_transfer_params": {"of": "another"}, 3: 4}, -0.25, {0: 0.5}),
        ({"adapters": ["polite=0", "brief"]}, 0.0, {1: 1.0}),  # brief's own alphas
    ],
)
def test_dials_of_a_request(extra: Any, base_share: float, shares: dict[int, float]) -> None:
    assert served().request(extra) == RequestDials(pytest.approx(base_share), pytest.approx(shares))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"alpha0": 1}, "alpha0: no such field; did you mean alpha_0?"),
        ({"adapter": "brief"}, "adapter: no such field; did you mean adapters?"),
        ({"ALPHA_0": 1}, "ALPHA_0: no such field; did you mean alpha_0?"),
        ({"tilde": 1}, "tilde: no such field; did you mean alpha_tilde?"),
        ([1], "extra_args=[1] is no mapping"),
        ({"adapters": [("brief", 0.5)]}, "the list holds other things than names and 'NAME=WEIGHT'"),
        ({"alpha_0": -1}, "alpha_0=-1 is not a finite number >= 0"),
        ({"alpha_tilde": 0}, "alpha_tilde=0 is not a finite number > 0"),
        ({"alpha_tilde": "warm"}, "alpha_tilde='warm' is not a finite number > 0"),
        ({"alpha_tilde": float("nan")}, "alpha_tilde=nan is not"),
        ({"alpha_0": True}, "alpha_0=True is not"),
        ({"alpha_0": None}, "alpha_0=None is not"),
        ({"alpha_0": 10**400}, "is not a finite number"),
        ({"alpha_tilde": 1e-9}, "a share above 100 overflows"),
        ({"adapters": "rude"}, "adapter 'rude' is not served; served are polite, brief"),
        ({"adapters": []}, "adapters is empty; give one of polite, brief"),
        ({"adapters": 3}, "adapters=3: give a name"),
        ({"adapters": ["brief", "brief"]}, "adapters names 'brief' twice"),
        ({"adapters": "brief=much"}, "adapters: brief='much' is not a finite number"),
        ({"adapters": "brief=inf"}, "adapters: brief='inf' is not a finite number"),
        ({"adapters": {"brief": [1]}}, "adapters: brief=[1] is not a finite number"),
    ],
)
def test_mistakes_are_one_line(extra: Any, message: str) -> None:
    with pytest.raises(ValueError) as error:
        served().request(extra)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_more_adapters_than_the_server_takes() -> None:
    with pytest.raises(ValueError, match="2 adapters in one request; this server takes 1"):
        served(max_adapters=1).request({"adapters": ["polite", "brief"]})
    assert served(max_adapters=1).request({"adapters": ["polite=0", "brief"]}).shares == {1: 1.0}  # brief's own alphas


def test_logits_head_is_used_alone_and_whole() -> None:
    whole = served(adapters={"whole": ServedAdapter(0.5, 1.0, "logits")})
    assert whole.request(None) == RequestDials(0.5, {0: 1.0})
    with pytest.raises(ValueError, match="'whole' has q_head='logits'"):
        whole.request({"adapters": "whole=0.5"})


def test_separate_mode_runs_the_stream_of_the_base_too() -> None:
    assert served(1, kv_mode="separate").request({"adapters": "brief=0", "alpha_0": 1}) == RequestDials(1.0, {1: 0.0})


def test_config_entry_survives_its_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", KEY: served().to_dict()}))
    assert Served.read(tmp_path) == served() == Served.from_json(served().to_json())
    for content in ("{", "[]", "{}"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match="is not a folder that `fastqadapter export-vllm` wrote"):
            Served.read(tmp_path)
    with pytest.raises(ValueError, match="has format 2, not 1"):
        Served.of(types.SimpleNamespace(**{KEY: {"format": 2}}))


def test_architectures() -> None:
    assert all(served_architecture(name) == f"QAdapter{name}" for name in NATIVE)
    assert served_architecture("GraniteForCausalLM") == "QAdapterTransformersForCausalLM"


# Rows


def expected_states(
    hidden_b: torch.Tensor, hidden: dict[int, torch.Tensor], dials: list[RequestDials], starts: list[int]
) -> torch.Tensor:
    """Token by token, by hand; `hidden[adapter]` (N, D)."""
    rows = []
    for number, request in enumerate(dials):
        for token in range(starts[number], starts[number + 1]):
            row = request.base_share * hidden_b[token]
            for adapter, share in request.shares.items():
                row = row + share * hidden[adapter][token]
            rows.append(row)
    return torch.stack(rows)


def run(rows: QRows, hidden_b: torch.Tensor, hidden: dict[int, torch.Tensor]) -> torch.Tensor:
    """What a model would give: the states of the tokens, behind them those of the Q rows."""
    behind = [hidden[int(adapter)][int(token)] for token, adapter in zip(rows.tokens, rows.adapters, strict=True)]
    return rows.combine(torch.cat([hidden_b, torch.stack(behind)]) if behind else hidden_b)


REQUESTS = [RequestDials(0.25, {0: 1.0}), BASE, RequestDials(-1.0, {1: 0.5, 0: 1.5}), RequestDials(2.0, {})]


@pytest.mark.parametrize("every_token", [False, True])
def test_rows_of_a_ragged_step(every_token: bool) -> None:
    torch.manual_seed(0)
    starts = [0, 3, 5, 9, 10]
    hidden_b, hidden = torch.randn(10, 4), {0: torch.randn(10, 4), 1: torch.randn(10, 4)}
    rows = rows_of_step(starts, REQUESTS, [every_token] * 4, torch.device("cpu"))
    assert rows is not None and not rows.in_order
    assert len(rows.tokens) == (3 + 2 * 4 if every_token else 1 + 2)
    found, expected = run(rows, hidden_b, hidden), expected_states(hidden_b, hidden, REQUESTS, starts)
    last = [end - 1 for end in starts[1:]]
    chosen = slice(None) if every_token else last
    torch.testing.assert_close(found[chosen], expected[chosen])
    if not every_token:
        others = [token for token in range(10) if token not in last]
        assert torch.equal(found[others], hidden_b[others])
    ids = torch.arange(10)
    assert rows.behind(ids).tolist() == [*range(10), *rows.tokens.tolist()]
    assert rows.behind(ids.expand(3, 10), dim=-1).shape == (3, 10 + len(rows.tokens))
    assert rows.streams.max() == 2 and set(rows.streams[rows.tokens == 0].tolist()) <= {1}


def test_base_alone_has_no_rows() -> None:
    assert rows_of_step([0, 3, 4], [BASE, BASE], [False, False], torch.device("cpu")) is None
    assert rows_of_step([0, 0], [REQUESTS[0]], [False], torch.device("cpu")) is None  # a padded place


def test_one_row_for_each_token_is_in_order() -> None:
    rows = rows_of_step([0, 1, 2], [REQUESTS[0]] * 2, [False] * 2, torch.device("cpu"))
    assert rows is not None and rows.in_order
    assert not rows_of_step([0, 1, 2], [REQUESTS[0], BASE], [False] * 2, torch.device("cpu")).in_order  # type: ignore[union-attr]
    assert not rows_of_step([0, 2], [REQUESTS[0]], [False], torch.device("cpu")).in_order  # type: ignore[union-attr]


@pytest.mark.parametrize("streams", [1, 2])
def test_buffers_give_what_rows_of_a_step_give(streams: int) -> None:
    """A step of decoding, with two places of padding, at addresses that stay."""
    torch.manual_seed(0)
    requests = [each for each in REQUESTS if len(each.shares) <= streams]
    count = len(requests)
    starts = list(range(count + 1))
    hidden_b, hidden = torch.randn(count + 2, 4), {0: torch.randn(count + 2, 4), 1: torch.randn(count + 2, 4)}
    buffers = RowBuffers(8, streams, torch.device("cpu"))
    before = buffers.filled([], 8)
    rows = buffers.filled(requests, count + 2)
    assert rows.shares.data_ptr() == before.shares.data_ptr() and rows.tokens.data_ptr() == before.tokens.data_ptr()
    found = run(rows, hidden_b, hidden)
    torch.testing.assert_close(found[:count], expected_states(hidden_b, hidden, requests, starts))
    assert torch.isfinite(found).all() and torch.equal(found[count:], hidden_b[count:])
    assert rows.in_order == (streams == 1)


def test_shares_are_the_mixture_of_generate() -> None:
    """The same numbers as the dials of `model.generate`."""
    dials = Dials(alpha_0=0.5, alpha_tilde=2.0, weights={"polite": 1.5, "brief": -1.0})
    streams = torch.randn(3, 1, 1, 4, dtype=torch.float64)
    expected = dials.mixture(LMHead(torch.zeros(2, 4, dtype=torch.float64))).combine(streams)
    request = served().request({"adapters": {"polite": 1.5, "brief": -1.0}, "alpha_0": 0.5, "alpha_tilde": 2.0})
    found = request.base_share * streams[0] + sum(share * streams[1 + i] for i, share in request.shares.items())
    torch.testing.assert_close(found, expected)
