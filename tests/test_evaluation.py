"""What evaluation measures, against the plain formulas; its command, its resuming, its errors."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from torch import Tensor
from transformers import AutoModelForCausalLM

import fastqadapter as fqa
from fastqadapter import cli
from fastqadapter.evaluation import run as evaluation_run
from fastqadapter.evaluation.capabilities import SHOTS, TASKS, Item, answer_right, capability_set, is_right
from fastqadapter.evaluation.forgetting import drifts, pack_texts
from fastqadapter.evaluation.intervals import bootstrap_mean
from fastqadapter.evaluation.learning import PairScores
from fastqadapter.evaluation.neutral import TEXTS
from fastqadapter.evaluation.report import format_report
from fastqadapter.evaluation.scores import Point, TokenScores, _score_rows, score_tokens
from fastqadapter.evaluation.sweep import Sweep, sweet_spot, swept
from fastqadapter.packing import pack
from tiny import PAIRS, make_twins, packed, randomise_adapter, tiny_base
from words import save_base, word_rows, word_tokenizer

POINTS = [Point(), Point(weight=0.0), Point(0.4, 1.3, 1.0), Point(0.4, 1.3, -0.5), Point(0.0, 0.5, 2.0)]


# Scores


def logits_of(model: torch.nn.Module, tokens: list[int], **dials: object) -> Tensor:
    """(L, V), fp64."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokens]), **dials).logits[0].double()


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "phi"])
@pytest.mark.parametrize("kv_mode", ["separate", "shared"])
def test_scores_are_those_of_the_policy(architecture: str, kv_mode: str) -> None:
    """At the dials of each point, from the logits that the model itself gives with its config at these dials; a
    soft-cap and a bias of the head are in them."""
    twins = make_twins(architecture, kv_mode)
    twins.model.eval()
    prompt, *answers = PAIRS[0]
    batch = pack([(prompt, answers)])
    found = score_tokens(twins.model, batch, POINTS)
    start = len(prompt) - 1
    base = torch.cat([logits_of(twins.base, prompt + each)[start:-1] for each in answers]).log_softmax(dim=-1)
    tokens = torch.tensor([token for each in answers for token in each])[:, None]
    torch.testing.assert_close(found.base, base.gather(1, tokens)[:, 0].float(), atol=2e-5, rtol=1e-5)
    for number, point in enumerate(POINTS):
        dials = point.generate_options("default")
        rows = [logits_of(twins.model, prompt + each, **dials)[start:-1] for each in answers]
        policy = torch.cat(rows).log_softmax(dim=-1)
        kl = (base.exp() * (base - policy)).sum(dim=-1)
        torch.testing.assert_close(found.policy[number], policy.gather(1, tokens)[:, 0].float(), atol=5e-5, rtol=1e-4)
        torch.testing.assert_close(found.kl[number], kl.float(), atol=5e-5, rtol=1e-4)


def test_weights_of_a_point_scale_the_residual() -> None:
    twins = make_twins("llama", "shared")
    batch = pack([(PAIRS[0][0], PAIRS[0][1:])])
    with torch.no_grad():
        q, b = (hidden.double() @ twins.base.lm_head.weight.double().T for hidden in twins.model.hidden_states(batch))
    states = torch.tensor([row for branch in range(2) for row in batch.layout[0].states_of(branch)])
    found = score_tokens(twins.model, batch, POINTS)
    for number, point in enumerate(POINTS):
        z = ((point.weight * (q - b) + point.alpha_0 * b) / point.alpha_tilde)[states].log_softmax(dim=-1)
        expected = z.gather(1, batch.actions[:, None])[:, 0]
        torch.testing.assert_close(found.policy[number], expected.float(), atol=5e-5, rtol=1e-4)
    assert (found.kl[1] == 0).all() and torch.equal(found.policy[1], found.base)  # weight 0: the base itself


@pytest.mark.parametrize("size", [1e-3, 1e-2, 1.0])
def test_a_small_kl_is_not_rounding(size: float) -> None:
    """Logits as a language model has them: an lse of 30, a few likely tokens, a large vocabulary."""
    generator = torch.Generator().manual_seed(0)
    b, q = (torch.randn(16, 49152, generator=generator) * each for each in (3.0, size))
    b += 15.0
    b[:, :3] += 14.0
    actions = torch.arange(16)[:, None]
    _, _, found = _score_rows(b, q, actions, POINTS[:2])
    _, _, expected = _score_rows(b.double(), q.double(), actions, POINTS[:2])
    torch.testing.assert_close(found.double().mean(dim=1), expected.mean(dim=1), rtol=1e-3, atol=1e-7)


def test_scores_that_are_not_finite_are_no_score() -> None:
    twins = make_twins("llama", "shared")
    with torch.no_grad():
        twins.model.get_base_model().lm_head.weight[3] = math.nan
    with pytest.raises(ValueError, match="log-probabilities at weight 1, alpha_0 1, alpha_tilde 1 are not finite"):
        score_tokens(twins.model, pack([(PAIRS[0][0], PAIRS[0][1:])]), [Point()])


def test_perplexity_beyond_the_largest_number() -> None:
    scores = TokenScores(torch.tensor([-1.0]), torch.tensor([[-800.0]]), torch.tensor([[799.0]]))
    [drift] = drifts([scores])
    assert drift.perplexity == math.inf and drift.base_perplexity == pytest.approx(math.e)


def test_dials_go_with_logits_alone() -> None:
    twins = make_twins("llama", "shared")
    with pytest.raises(ValueError, match="the loss has those of the config"):
        twins.model(packed(PAIRS, twins.model), alpha_0=0.5)
    with pytest.raises(ValueError, match="are not loaded"):
        logits_of(twins.model, PAIRS[0][0], adapters={"other": 1.0})


def test_a_plain_lora_adapter_is_a_logits_head_without_the_base() -> None:
    """So that other methods' adapters can be measured: `alpha_0 = 0`, `q = W h_q`."""
    config = fqa.QAdapterConfig(kv_mode="separate", q_head="logits", alpha_0=0.0)
    model = fqa.get_qadapter_model(tiny_base("llama"), config).eval()
    randomise_adapter(model)
    batch, tokens = pack([(PAIRS[0][0], [PAIRS[0][1]])]), PAIRS[0][0] + PAIRS[0][1]
    found = score_tokens(model, batch, [Point(0.0, 1.0, 1.0)])
    with torch.no_grad():
        logits = model.base_model.model(input_ids=torch.tensor([tokens])).logits[0]  # PEFT's own forward
    expected = logits[len(PAIRS[0][0]) - 1 : -1].log_softmax(dim=-1).gather(1, batch.actions[:, None])[:, 0]
    torch.testing.assert_close(found.policy[0], expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="needs q_head='difference'"):
        score_tokens(model, batch, [Point(0.0, 1.0, 0.5)])


@pytest.mark.parametrize("bad", [(-0.1, 1.0, 1.0), (1.0, 0.0, 1.0), (math.nan, 1.0, 1.0)])
def test_dials_outside_their_range(bad: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="alpha"):
        Point(*bad)


# Learning


def test_margins_are_those_of_training() -> None:
    """At alpha 1 and gamma 1: the reward's sum is the log-ratio plus v of the prompt, the same for both branches."""
    twins = make_twins("llama", "shared", divisor="1")
    batch = packed(PAIRS, twins.model)
    scores = PairScores.of(batch, score_tokens(twins.model, batch, [Point()]))
    with torch.no_grad():
        metrics = twins.model(batch).metrics
    margins = scores.rewards[0, :, 0] - scores.rewards[0, :, 1]
    expected = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    torch.testing.assert_close(margins.float(), expected, atol=1e-4, rtol=1e-4)
    learned = scores.at(0)
    assert learned.margin.value == pytest.approx(float(expected.mean()), rel=1e-4)
    assert learned.accuracy.value == pytest.approx(float(metrics["rewards/accuracies"].mean()))


def test_pairs_by_hand() -> None:
    """Three pairs of (2, 2), (1, 4), (3, 1) tokens: one right, one wrong, one without an opinion."""
    batch = pack([([5], [[6, 7], [8, 9]]), ([5], [[6], [7, 8, 9, 10]]), ([5], [[6, 7, 8], [9]])])
    policy = torch.tensor([1.0, 1.0, 0.5, 0.5, -3.0, 0, 0, 0, 0, 1.0, 1.0, -1.0, 1.0])
    scores = TokenScores(base=torch.zeros(13), policy=policy[None], kl=torch.arange(13.0)[None])
    pairs = PairScores.join([PairScores.of(batch, scores)])
    assert pairs.rewards[0].tolist() == [[2.0, 1.0], [-3.0, 0.0], [1.0, 1.0]]
    learned = pairs.at(0)
    assert learned.accuracy.value == 0.5 and learned.margin.value == pytest.approx((1 - 3 + 0) / 3)
    by_length = {name: (mean.value, mean.count) for name, mean in learned.by_length.items()}
    assert by_length == {"similar length": (1.0, 1), "chosen shorter": (0.0, 1), "chosen longer": (0.5, 1)}
    assert learned.kl_on_pairs == pytest.approx((1.5 + 6.0 + 10.5) / 3)


def test_interval_is_that_of_the_mean() -> None:
    """Its width against the normal approximation; its cover over many sets of a known mean."""
    values = torch.randn(400, generator=torch.Generator().manual_seed(0))
    mean = bootstrap_mean(values)
    assert mean.low < mean.value < mean.high
    assert mean.high - mean.low == pytest.approx(2 * 1.96 * float(values.std()) / 20, rel=0.1)
    sets = torch.rand(200, 50, generator=torch.Generator().manual_seed(1))
    covered = sum(each.low <= 0.5 <= each.high for each in (bootstrap_mean(values) for values in sets))
    assert 180 <= covered <= 199  # 95% of 200, less what 50 items cost
    assert bootstrap_mean(torch.ones(5)) == bootstrap_mean(torch.ones(5)) and bootstrap_mean(torch.ones(5)).low == 1.0
    with pytest.raises(ValueError, match="no values"):
        bootstrap_mean(torch.ones(0))


# Forgetting


def test_perplexity_is_that_of_the_model() -> None:
    twins = make_twins("llama", "shared")
    tokenizer, texts = word_tokenizer(), ["w7 w8 w9 w7 w5", "w9 w3", "w4"]  # the last has nothing to predict
    batches = pack_texts(tokenizer, texts, max_length=64)
    [found] = drifts([score_tokens(twins.model, batch, [Point(weight=0.0)]) for batch in batches])
    losses = []
    for text in texts[:2]:
        ids = tokenizer(text)["input_ids"]
        rows = logits_of(twins.base, ids)[:-1].log_softmax(dim=-1)
        losses += [-float(row[token]) for row, token in zip(rows, ids[1:], strict=True)]
    assert found.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
    assert found.base_perplexity == pytest.approx(found.perplexity, rel=1e-5) and abs(found.kl) < 1e-5
    pieces = [batch.lengths[0] for batch in pack_texts(tokenizer, ["w7 " * 10], max_length=4)]
    assert [sum(piece) for piece in pieces] == [4, 4, 2]
    with pytest.raises(ValueError, match="no two tokens"):
        pack_texts(tokenizer, ["w4"], max_length=64)


def test_capability_set_is_solvable_and_the_same_again() -> None:
    items = capability_set(12, seed=3)
    assert items == capability_set(12, seed=3) != capability_set(12, seed=4)
    for task in TASKS:
        own = [item for item in items if item.task == task]
        assert len({item.prompt for item in own}) == 12
        for item in own:
            *shots, question = item.prompt.split("\n")
            assert len(shots) == SHOTS and not any(shot.startswith(question) for shot in shots)
            assert is_right(item, f" {item.answer}.\nand more") and not is_right(item, f" not {item.answer}")
    sums = [item for item in items if item.task == "arithmetic"]
    for item in sums:
        question = item.prompt.rsplit("\n", 1)[1].removesuffix("=")
        assert eval(question) == int(item.answer)  # digits and a sign, made by our program


def test_answers_are_greedy_completions() -> None:
    """A model that is trained to death on one line gives it back; the point decides whether the adapter speaks."""
    twins = make_twins("llama", "shared")
    tokenizer = word_tokenizer()
    prompt = "w7 w8 w9"
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    twins.model.eval()
    written = {}
    for point in (Point(), Point(weight=0.0)):
        output = twins.model.generate(
            ids, **point.generate_options("default"), max_new_tokens=24, do_sample=False, pad_token_id=0
        )
        written[point] = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    assert written[Point()] != written[Point(weight=0.0)]
    for point, text in written.items():
        items = [Item("task", prompt, text), Item("task", f"w3 {prompt}", "something else")]
        assert answer_right(twins.model, tokenizer, items, point) == [True, False]
        assert answer_right(twins.model, tokenizer, items[:1], Point(1.0, 1.0, 1.0 - point.weight)) == [False]


# Sweep


def test_points_of_a_sweep() -> None:
    home, sweep = Point(0.8, 1.0, 1.0), Sweep((0.8, 2.0), (0.5,), (3.0,))
    star = sweep.points(home)
    assert star == [home, Point(0.8, 1.0, 3.0), Point(2.0, 1.0, 1.0), Point(0.8, 0.5, 1.0)]
    assert [swept(home, point) for point in star] == [None, "weight", "alpha_0", "alpha_tilde"]
    grid = Sweep((0.8, 2.0), (0.5,), (3.0,), grid=True).points(home)
    assert len(grid) == len(set(grid)) == 8 and grid[0] == home and swept(home, Point(2.0, 0.5, 1.0)) is None
    assert all(point.weight == 1.0 for point in sweep.points(home, weights=False))


def test_sweet_spot() -> None:
    def row(accuracy: float, kl: float, kept: float) -> dict:
        return {"accuracy": {"value": accuracy}, "kl": kl, "kept": kept}

    rows = [row(0.6, 0.2, 1.0), row(0.7, 0.5, 0.96), row(0.7, 0.4, 0.95), row(0.9, 2.0, 0.3)]
    assert sweet_spot(rows, 0.95) == 2
    assert sweet_spot(rows, 0.0) == 3
    assert sweet_spot(rows[3:], 0.5) is None


# The whole


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    save_base(folder / "base")
    lines = [json.dumps(row) for row in word_rows(6, 1)]
    (folder / "heldout.jsonl").write_text("\n".join(lines) + "\n")
    for seed, name in enumerate(("one", "two")):
        base = AutoModelForCausalLM.from_pretrained(folder / "base")
        model = fqa.get_qadapter_model(base, fqa.QAdapterConfig(alpha_0=0.9))
        randomise_adapter(model, seed=seed)
        model.save_pretrained(folder / name)
    return folder


def arguments(folder: Path, output: str, *more: str) -> list[str]:
    options = {
        "dataset_name": folder / "heldout.jsonl",
        "output_dir": folder / output,
        "model_name_or_path": folder / "base",
        "tasks": 2,
        "sample_tokens": 4,
        "samples": 2,
        "batch_size": 4,
    }
    adapters = ["--adapter", f"one={folder / 'one'}", f"two={folder / 'two'}=0.5"]
    sweep = ["--alpha_0", "0.5", "--alpha_tilde", "2", "--weight", "0.5", "2"]
    return ["eval", *adapters, *(f"--{name}={value}" for name, value in options.items()), *sweep, *more]


def test_command_measures_writes_and_draws(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments(workplace, "out")) == 0
    out = capsys.readouterr().out
    results = json.loads((workplace / "out" / "eval.json").read_text(), parse_constant=pytest.fail)
    report = (workplace / "out" / "eval.md").read_text()
    assert report in out and report == format_report(results)
    assert {path.name for path in (workplace / "out").iterdir()} - {".lock"} == {
        *("eval.json", "eval.md", "frontier.png", "frontier.svg")
    }
    one, two = (results["adapters"][name] for name in ("one", "two"))
    assert [row["point"]["weight"] for row in one["rows"]] == [1.0, 0.5, 2.0, 1.0, 1.0]
    assert two["rows"][0]["point"] == {"alpha_0": 0.9, "alpha_tilde": 1.0, "weight": 0.5}
    assert one["rows"][0]["kl"] > 0 and one["rows"][0]["accuracy"]["count"] == 6
    assert 0 <= one["rows"][0]["kept"] <= 1 and set(one["rows"][0]["capability"]) == {"all", *TASKS}
    assert len(results["base"]["samples"]) == 2 and f"on {workplace / 'base'}" in report
    assert report.count("| ") > 20 and "nan" not in report


def test_a_killed_evaluation_goes_on(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*args: object, **kwargs: object) -> list[bool]:
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return answer_right(*args, **kwargs)

    monkeypatch.setattr(evaluation_run, "answer_right", counted)
    assert cli.main(arguments(workplace, "killed")) == 130
    found = json.loads((workplace / "killed" / "eval.json").read_text())
    assert len([name for name in found["stages"] if "capability" in name]) == 3 and "adapters" not in found
    assert cli.main(arguments(workplace, "killed")) == 0
    assert len(calls) == 4 + (1 + 5 + 4) - 3  # the base, the points of each: half is the weight of `two` itself
    assert cli.main(arguments(workplace, "whole")) == 0
    killed, whole = (json.loads((workplace / name / "eval.json").read_text()) for name in ("killed", "whole"))
    assert killed["adapters"] == whole["adapters"]
    calls.clear()
    assert cli.main(arguments(workplace, "whole")) == 0 and not calls


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--tasks", "3"), "eval.json: an evaluation with tasks=2, not 3: give another --output_dir"),
        (("--keep", "0.5"), "keep=0.95, not 0.5"),
    ],
)
def test_other_settings_need_another_folder(
    workplace: Path, capsys: pytest.CaptureFixture[str], change: tuple[str, str], message: str
) -> None:
    assert cli.main(arguments(workplace, "settled", "--sweep", "false")) == 0
    assert cli.main(arguments(workplace, "settled", "--sweep", "false", *change)) == 2
    assert message in capsys.readouterr().err


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fastqadapter eval: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tasks", "0"], "tasks=0 is outside its legal range [1, 200]"),
        (["--tasks", "201"], "tasks=201 is outside its legal range [1, 200]"),
        (["--keep", "1.5"], "keep=1.5 is outside its legal range [0, 1]"),
        (["--alpha_tilde", "0"], "alpha_tilde=0.0 cannot be swept"),
        (["--weight", "nan"], "weight=nan cannot be swept"),
        (["--dataset_name", "nowhere.jsonl"], "dataset_name='nowhere.jsonl': no such file"),
        (["--neutral_text", "nowhere.txt"], "nowhere.txt"),
        (["--max_pairs", "0"], "max_pairs=0"),
    ],
)
def test_mistakes_are_one_line(
    workplace: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert cli.main(arguments(workplace, "never", *more)) == 2
    assert message in one_line(capsys) and not (workplace / "never").exists()


def test_a_point_that_cannot_be_is_refused_before_the_work(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments(workplace, "extreme", "--alpha_tilde", "1e-38")) == 2
    assert "alpha_0: 0.9 / alpha_tilde 1e-38 is above" in one_line(capsys)
    assert not (workplace / "extreme" / "eval.json").exists()  # not one stage was run


def test_an_adapter_that_was_changed_is_another(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(workplace / "one", workplace / "three")
    more = ["--sweep", "false", "--adapter", f"three={workplace / 'three'}"]
    assert cli.main(arguments(workplace, "of_three", *more)) == 0
    config = workplace / "three" / "qadapter_config.json"
    config.write_text(config.read_text().replace('"alpha_0": 0.9', '"alpha_0": 0.5'))
    assert cli.main(arguments(workplace, "of_three", *more)) == 2
    assert "an evaluation with adapters=" in one_line(capsys)


def test_two_at_once_in_one_folder(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workplace / "taken").mkdir()
    with FileLock(workplace / "taken" / ".lock"):
        assert cli.main(arguments(workplace, "taken")) == 2
    assert "another evaluation is running there" in one_line(capsys)


def test_bad_rows_are_skipped_if_told(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = workplace / "one_bad.jsonl"
    rows.write_text((workplace / "heldout.jsonl").read_text() + '{"prompt": "w1 w2"}\n')
    more = ["--sweep", "false", "--dataset_name", str(rows)]
    assert cli.main(arguments(workplace, "one_bad", *more)) == 2
    assert "on_bad_row" in one_line(capsys)
    assert cli.main(arguments(workplace, "one_bad", *more, "--on_bad_row", "skip")) == 0


def spoil_file(folder: Path) -> None:
    (folder / "eval.json").write_text('{"format": 0}')


def write_plain_text(folder: Path) -> None:
    (folder / "eval.json").write_text("{")


@pytest.mark.parametrize("spoil", [spoil_file, write_plain_text])
def test_a_damaged_file_is_named(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[Path], None]
) -> None:
    spoil(tmp_path)
    assert cli.main(arguments(workplace, "x", "--output_dir", str(tmp_path))) == 2
    assert "is no evaluation of this version" in one_line(capsys)


def test_neutral_texts_are_texts() -> None:
    assert len(set(TEXTS)) == len(TEXTS) == 16 and all(40 < len(text.split()) < 80 for text in TEXTS)


def test_the_users_own_text(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workplace / "text.txt").write_text("w7 w8\nw9\n\nw3 w4 w5\n")
    more = ["--neutral_text", str(workplace / "text.txt"), "--sweep", "false"]
    assert cli.main(arguments(workplace, "own_text", *more)) == 0
    (workplace / "empty.txt").write_text("\n\n")
    assert cli.main(arguments(workplace, "own_text", "--neutral_text", str(workplace / "empty.txt"))) == 2
    assert "is empty" in one_line(capsys)
