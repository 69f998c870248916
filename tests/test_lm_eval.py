"""Q-Adapters in lm-eval: its scores against the policy combined by hand, its command line, its errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

pytest.importorskip("lm_eval", reason='lm-eval is not installed: pip install "fastqadapter[eval]"')

import datasets
import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import fastqadapter as fqa
from fastqadapter.commands.parsing import ArgumentError
from fastqadapter.demo.smollm import MODEL_NAME, cache_folder
from fastqadapter.lm_eval.__main__ import MODEL_NAME as MODEL
from fastqadapter.lm_eval.__main__ import main
from fastqadapter.lm_eval.arguments import _split
from fastqadapter.lm_eval.model import QAdapterLM
from fastqadapter.lm_eval.scoring import Request, batches
from references import policy_logits
from tiny import MODES, lora_config, randomise_adapter, tiny_base
from words import save_base, word_tokenizer

TESTS = Path(__file__).parent
TASKS = TESTS / "lm_eval_tasks"
DIALS = {"alpha_0": 0.8, "alpha_tilde": 1.2}
STOP, MOST = "w58", 7  # of completions.yaml
CLOSE = {"abs": 1e-3, "rel": 1e-4}

register_model(MODEL)(QAdapterLM)  # what the entry point or `python -m fastqadapter.lm_eval` does


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base, two random adapters in each mode, one of another base, one with a `logits` head."""
    folder = tmp_path_factory.mktemp("lm_eval")
    save_base(folder / "base")
    for mode in MODES:
        for seed, name in enumerate(("one", "two")):
            save_adapter(folder / mode / name, folder / "base", fqa.QAdapterConfig(kv_mode=mode, **DIALS), seed)
    save_adapter(folder / "logits", folder / "base", fqa.QAdapterConfig(kv_mode="separate", preset="paper"), 5)
    tiny_base("llama", seed=9).save_pretrained(folder / "other")
    word_tokenizer().save_pretrained(folder / "other")
    return folder


def save_adapter(folder: Path, base: Path, config: fqa.QAdapterConfig, seed: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    model = fqa.get_qadapter_model(model, config, lora_config("llama", config.kv_mode))
    randomise_adapter(model, seed=seed)
    model.save_pretrained(folder)


@pytest.fixture(autouse=True)
def among_the_tasks(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Where the paths in the YAML files begin; with the cache of `datasets` in a folder of the tests."""
    monkeypatch.chdir(TESTS)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


# By hand: plain transformers and PEFT models, one state at a time, nothing of fastqadapter


class ByHand:
    """The customised policy of a base and its adapters, from folders."""

    def __init__(self, base: Path, adapters: dict[Path, float], kv_mode: str, **dials: Any):
        self.kv_mode, self.dials = kv_mode, dials
        self.base: PreTrainedModel = _plain_model(base)
        self.adapted = []
        for folder, weight in adapters.items():
            self.adapted.append((weight, PeftModel.from_pretrained(_plain_model(base), folder).eval()))
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(base)

    def log_probs(self, ids: list[int], prompt_length: int) -> Tensor:
        """(V,) after `ids`."""
        return policy_logits(self.base, self.adapted, ids, prompt_length, self.kv_mode, **self.dials)

    def score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        total, is_greedy = 0.0, True
        for index, token in enumerate(continuation):
            log_probs = self.log_probs(context + continuation[:index], len(context))
            total += float(log_probs[token])
            is_greedy &= int(log_probs.argmax()) == token
        return total, is_greedy

    def complete(self, context: list[int]) -> str:
        """Greedy, until the stop word, the end of the sequence or `MOST` tokens."""
        stops = {self.tokenizer.convert_tokens_to_ids(STOP), self.tokenizer.eos_token_id}
        ids = list(context)
        for _ in range(MOST):
            token = int(self.log_probs(ids, len(context)).argmax())
            if token in stops:
                break
            ids.append(token)
        return self.tokenizer.decode(ids[len(context) :], skip_special_tokens=True)


def _plain_model(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def evaluated(tasks: list[str], model: str | HFLM = MODEL, **options: Any) -> dict[str, Any]:
    """Results and samples of our own tasks; lm-eval's thousands are not even looked for."""
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    return lm_eval.simple_evaluate(model=model, tasks=tasks, task_manager=manager, bootstrap_iters=0, **options)


def arguments(**given: Any) -> str:
    return ",".join(f"{name}={value}" for name, value in given.items())


def check_choices(found: dict[str, Any], hand: ByHand, task: str = "qadapter_choices") -> None:
    right = []
    for sample in found["samples"][task]:
        context, scores = hand.tokenizer.encode(sample["doc"]["question"]), []
        for [(total, is_greedy)], choice in zip(sample["resps"], sample["doc"]["choices"], strict=True):
            expected, expected_greedy = hand.score(context, hand.tokenizer.encode(f" {choice}"))
            assert float(total) == pytest.approx(expected, **CLOSE)
            assert is_greedy in (expected_greedy, str(expected_greedy))
            scores.append(expected)
        right.append(scores.index(max(scores)) == sample["doc"]["answer"])
    assert found["results"][task]["acc,none"] == pytest.approx(sum(right) / len(right))


def check_completions(found: dict[str, Any], hand: ByHand) -> None:
    right = []
    for sample in found["samples"]["qadapter_completions"]:
        expected = hand.complete(hand.tokenizer.encode(sample["doc"]["prompt"]))
        [[text]] = sample["resps"]
        assert text.strip() == expected.strip()
        right.append(expected.strip() == sample["doc"]["answer"])
    score = found["results"]["qadapter_completions"]["exact_match,none"]
    assert score == pytest.approx(sum(right) / len(right))


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("kv_mode", MODES)
def test_scores_of_tasks_are_those_by_hand(workplace: Path, kv_mode: str, batch_size: int) -> None:
    """At dials that are not those of the config."""
    adapter = workplace / kv_mode / "one"
    model_args = arguments(pretrained=workplace / "base", adapter=adapter, alpha_0=0.5, alpha_tilde=0.9, weight=1.5)
    found = evaluated(["qadapter_choices", "qadapter_completions"], model_args=model_args, batch_size=batch_size)
    hand = ByHand(workplace / "base", {adapter: 1.5}, kv_mode, alpha_0=0.5, alpha_tilde=0.9)
    check_choices(found, hand)
    check_completions(found, hand)


def test_a_mixture_of_adapters(workplace: Path) -> None:
    one, two = workplace / "shared" / "one", workplace / "shared" / "two"
    model_args = arguments(adapter=f"{one}=0.7+{two}=-0.4", alpha_0=1.1)
    found = evaluated(["qadapter_choices", "qadapter_completions"], model_args=model_args, batch_size=2)
    hand = ByHand(workplace / "base", {one: 0.7, two: -0.4}, "shared", alpha_0=1.1, alpha_tilde=DIALS["alpha_tilde"])
    check_choices(found, hand)
    check_completions(found, hand)


def test_a_logits_head(workplace: Path) -> None:
    found = evaluated(["qadapter_choices"], model_args=arguments(adapter=workplace / "logits", alpha_0=0.3))
    check_choices(
        found, ByHand(workplace / "base", {workplace / "logits": 1.0}, "separate", alpha_0=0.3, q_head="logits")
    )


def test_dials_default_to_the_adapters_own(workplace: Path) -> None:
    lm = QAdapterLM(adapter=str(workplace / "prompt" / "one"))
    assert lm.policy == {**DIALS, "adapters": {"default": 1.0}}
    assert lm.model.get_base_model().config.name_or_path == str(workplace / "base")
    info = lm.get_model_info()
    assert info["kv_mode"] == "prompt" and info["adapter_folders"] == {"default": str(workplace / "prompt" / "one")}
    json.dumps({name: info[name] for name in (*DIALS, "adapters")})  # lm-eval writes it


def test_weight_0_is_the_model_hf(workplace: Path) -> None:
    """All kinds of requests, at a window that many do not fit into: what is cut is what lm-eval itself cuts."""
    tasks = ["qadapter_choices", "qadapter_completions", "qadapter_texts"]
    options: dict[str, Any] = {"max_length": 9, "batch_size": 2, "device": "cpu"}
    plain = evaluated(tasks, HFLM(pretrained=str(workplace / "base"), **options))
    policy = {"weight": 0, "alpha_0": 1, "alpha_tilde": 1}
    ours = evaluated(tasks, QAdapterLM(adapter=str(workplace / "separate" / "one"), **policy, **options))
    for task in tasks:
        for mine, theirs in zip(answers(ours, task), answers(plain, task), strict=True):
            assert mine == (theirs if isinstance(theirs, str) else pytest.approx(theirs, **CLOSE))


def answers(found: dict[str, Any], task: str) -> list[str | float]:
    """What the model said to each request of a task: a text, or a log-likelihood."""
    said = [answer for sample in found["samples"][task] for [answer] in sample["resps"]]
    said = [answer[0] if isinstance(answer, (list, tuple)) else answer for answer in said]
    return [str(answer) if task == "qadapter_completions" else float(answer) for answer in said]


@pytest.mark.parametrize("kv_mode", MODES)
def test_prompts_longer_than_the_window_lose_their_start(workplace: Path, kv_mode: str) -> None:
    """In a batch with left padding, too; in `prompt` mode the adapter begins where the context ends all the same."""
    window, adapter = 10, workplace / kv_mode / "one"
    lm = QAdapterLM(adapter=str(adapter), max_length=window, batch_size=4, device="cpu")
    hand = ByHand(workplace / "base", {adapter: 1.0}, kv_mode, **DIALS)
    contexts = [hand.tokenizer.decode(range(start, start + length)) for start, length in ((20, 25), (50, 2), (60, 9))]
    for continuation in ("w7", "w8 w9 w10 w11"):
        tokens = hand.tokenizer.encode(continuation)
        found = lm.loglikelihood(instances("loglikelihood", *((each, f" {continuation}") for each in contexts)))
        room = window + 1 - len(tokens)
        expected = [hand.score(hand.tokenizer.encode(each)[-room:], tokens)[0] for each in contexts]
        assert [total for total, _ in found] == pytest.approx(expected, **CLOSE)
    options = {"until": [STOP], "max_gen_toks": MOST, "do_sample": False}
    found = lm.generate_until(instances("generate_until", *((each, options) for each in contexts)))
    expected = [hand.complete(hand.tokenizer.encode(each)[-(window - MOST) :]) for each in contexts]
    assert [text.strip() for text in found] == [text.strip() for text in expected]
    with pytest.raises(ValueError, match="a continuation of 11 tokens does not fit into max_length=10"):
        lm.loglikelihood(instances("loglikelihood", ("w5", " w6" * 11)))


def instances(kind: str, *given: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, each, index) for index, each in enumerate(given)]


def test_the_policys_own_answer_is_greedy(workplace: Path) -> None:
    lm = QAdapterLM(adapter=str(workplace / "shared" / "one"), device="cpu", max_batch_size=4, batch_size="auto")
    prompts = ["w30 w31 w32", "w40", "w50 w51 w52 w53 w54"]
    options = {"until": [], "max_gen_toks": 4, "do_sample": False}
    said = lm.generate_until(instances("generate_until", *((prompt, options) for prompt in prompts)))
    pairs = [(prompt, f" {text.strip()}") for prompt, text in zip(prompts, said, strict=True)]
    pairs += [(prompt, " w5 w5") for prompt in prompts]
    found = lm.loglikelihood(instances("loglikelihood", *pairs))
    assert [is_greedy for _, is_greedy in found] == [True] * 3 + [False] * 3


def test_batches_share_contexts_and_keep_to_their_size() -> None:
    lengths = [(9, 4), (9, 1), (3, 2), (9, 3), (1, 1), (1, 8), (3, 2), (30, 2), (5, 5), (5, 1)]
    requests = [Request(index, (length,) * length, (1,) * most) for index, (length, most) in enumerate(lengths)]
    for rows in (1, 2, 3, 100):
        found = list(batches(requests, rows))
        assert sorted(request.index for batch in found for request in batch) == list(range(len(requests)))
        for number, batch in enumerate(found):
            contexts = [request.context for request in batch]
            assert [each for index, each in enumerate(contexts) if each not in contexts[:index]] == [
                each for index, each in enumerate(contexts) if index == 0 or each != contexts[index - 1]
            ]
            tokens = sum(map(len, dict.fromkeys(contexts))) + sum(len(each.continuation) - 1 for each in batch)
            assert tokens <= rows * max(request.inputs for request in batch)
            assert len(batch) >= rows or number == len(found) - 1
    assert list(batches([], 4)) == []


def test_a_loaded_model_at_several_dials(workplace: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(workplace / "base")
    model = fqa.QAdapterModel.from_pretrained(base, workplace / "shared" / "one", "polite")
    found = evaluated(["qadapter_choices"], QAdapterLM(model, weight=0.5, alpha_tilde=2.0))
    hand = ByHand(workplace / "base", {workplace / "shared" / "one": 0.5}, "shared", alpha_0=0.8, alpha_tilde=2.0)
    check_choices(found, hand)
    with pytest.raises(ArgumentError, match="which has its own: leave it out"):
        QAdapterLM(model, adapter="elsewhere")
    with pytest.raises(ArgumentError, match="give a folder, a hub id or a QAdapterModel"):
        QAdapterLM(base, adapter=str(workplace / "shared" / "one"))


# Command line and errors


def run_module(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fastqadapter.lm_eval", *options],
        cwd=TESTS,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(TESTS.parent), **environment},
        capture_output=True,
        text=True,
    )


def test_command_line(workplace: Path, tmp_path: Path) -> None:
    """lm-eval's own, in a process where nothing else has registered the model."""
    model_args = arguments(adapter=workplace / "shared" / "one", weight=1.5)
    options = ["--model", MODEL, "--model_args", model_args, "--tasks", "qadapter_choices", "--device", "cpu"]
    options += ["--include_path", "lm_eval_tasks", "--batch_size", "4", "--output_path", str(tmp_path / "out")]
    done = run_module(*options, "--log_samples", HF_DATASETS_CACHE=str(tmp_path / "datasets"))
    assert done.returncode == 0, done.stderr
    assert "|qadapter_choices|" in done.stdout.replace(" ", "")
    [results] = (tmp_path / "out").rglob("results_*.json")
    [samples] = (tmp_path / "out").rglob("samples_*.jsonl")
    found = json.loads(results.read_text())
    assert found["config"]["adapters"] == {"default": 1.5} and found["config"]["alpha_0"] == DIALS["alpha_0"]
    found["samples"] = {"qadapter_choices": [json.loads(line) for line in samples.read_text().splitlines()]}
    hand = ByHand(workplace / "base", {workplace / "shared" / "one": 1.5}, "shared", **DIALS)
    check_choices(found, hand)


def test_a_mistake_on_the_command_line_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: QAdapterLM.create_from_arg_string("alpha_0=0.5"))
    assert main() == 2
    assert capsys.readouterr().err.startswith("qadapter: adapter is missing: give adapter=FOLDER")


def test_without_lm_eval(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("lm_eval", "lm_eval.__main__", "lm_eval.api.registry"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main() == 2
    assert 'pip install "fastqadapter[eval]"' in capsys.readouterr().err


def test_the_entry_point_is_the_model() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    project = tomllib.loads((TESTS.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    [(name, value)] = project["entry-points"]["lm_eval.models"].items()
    entry_point = metadata.EntryPoint(name, value, "lm_eval.models")
    assert name == MODEL and entry_point.load() is QAdapterLM
    assert value == f"{QAdapterLM.__module__}:{QAdapterLM.__name__}"  # else lm-eval takes them for two models


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"adapter": None}, "adapter is missing: give adapter=FOLDER"),
        ({"adapter": "nowhere"}, "adapter='nowhere' is no folder or hub id of a trained adapter"),
        ({"adapter": ""}, "adapter is missing: give adapter=FOLDER"),
        ({"adapter": "nowhere", "pretrained": "base"}, "neither a local folder nor a hub repository within reach"),
        ({"adapter": "base", "pretrained": "base"}, "is missing: a plain LoRA adapter is no Q-Adapter"),
        ({"pretrained": "other"}, "was trained on another base model"),
        ({"alpha_0": -1}, "alpha_0=-1.0 is outside its legal range [0, inf)"),
        ({"alpha_tilde": 0}, "alpha_tilde=0.0 is outside its legal range (0, inf)"),
        ({"alpha_tilde": 1e-9}, "is above 1e+06, where logits overflow"),
        ({"alpha_0": "much"}, "alpha_0='much' is no number"),
        ({"weight": True}, "weight=True is no number"),
        ({"weight": "nan"}, "the weight is not a finite number"),
        ({"adapter": "shared/one+shared/two", "weight": 2}, "weight=2 is for one adapter, and there are 2"),
        ({"adapter": "shared/one=0.5", "weight": 2}, "differ: give the weight once"),
        ({"adapter": "shared/one+separate/two"}, "kv_mode='separate'"),
        ({"adapter": "logits", "weight": 2}, "needs q_head='difference'"),
        ({"alpha0": 0.5}, "unknown arguments ['alpha0']; known are adapter, alpha_0,"),
        ({"load_in_4bit": True}, "unknown arguments ['load_in_4bit']"),
        ({"peft": "out"}, "peft='out' is for plain PEFT adapters: give adapter=FOLDER"),
        ({"delta": "out"}, "delta='out' would change the base"),
        ({"parallelize": True}, "parallelize=True splits the base over devices"),
        ({"autogptq": True}, "autogptq=True loads no model of transformers"),
        ({"gptqmodel": True}, "gptqmodel=True loads no model of transformers"),
        ({"gguf_file": "a.gguf"}, "gguf_file='a.gguf' is not the base that an adapter knows"),
        ({"gguf": "a.gguf"}, "gguf='a.gguf' is no model of transformers"),
        ({"backend": "seq2seq"}, "backend='seq2seq' is causal always"),
        ({"softmax_dtype": "float32"}, "softmax_dtype='float32' is float32 always"),
    ],
)
def test_mistakes_are_one_line(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(workplace)
    with pytest.raises(ArgumentError) as caught:
        QAdapterLM(**{"adapter": "shared/one", "device": "cpu", **given})
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_force_runs_an_adapter_of_another_base(workplace: Path) -> None:
    adapter, other = str(workplace / "shared" / "one"), str(workplace / "other")
    assert QAdapterLM(other, adapter, force=True, device="cpu", parallelize=False).folders == {"default": adapter}


# The real model


@pytest.mark.skipif(
    not (cache_folder() / MODEL_NAME / "model.safetensors").exists(),
    reason="needs SmolLM2: `fastqadapter demo` makes it",
)
def test_smollm2(tmp_path: Path) -> None:
    base = cache_folder() / MODEL_NAME
    model = fqa.get_qadapter_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        fqa.QAdapterConfig(kv_mode="shared", **DIALS),
        LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM"),
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.03, generator=generator)
    model.save_pretrained(tmp_path)
    model_args = arguments(adapter=tmp_path, dtype="float32", weight=0.7)
    found = evaluated(["qadapter_facts"], model_args=model_args, batch_size=3)
    hand = ByHand(base, {tmp_path: 0.7}, "shared", **DIALS)
    check_choices(found, hand, "qadapter_facts")
    plain = evaluated(["qadapter_facts"], HFLM(pretrained=str(base), dtype="float32", device="cpu"))
    assert answers(found, "qadapter_facts") != pytest.approx(answers(plain, "qadapter_facts"), rel=0.01)


def test_adapters_of_one_argument(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert list(_split("a=1e+2+b")) == ["a=1e+2", "b"]
    assert list(_split("runs/lr5e+runs/b=-0.5")) == ["runs/lr5e", "runs/b=-0.5"]
    assert list(_split(["a+b"])) == ["a+b"]
    (tmp_path / "a+b").mkdir()
    assert list(_split("a+b")) == ["a+b"]
