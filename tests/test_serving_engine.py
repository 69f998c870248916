"""Q-Adapters on the real vLLM engine, against `generate` in float32. `.ci/serving` runs this in vLLM's environment."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed: .ci/serving runs these tests in an environment that has it")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
# Each engine in a process of its own: when one of several in a process ends, vLLM takes their common groups down.
os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"

from vllm import LLM, SamplingParams
from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams

from fastqadapter.demo.smollm import demo_model_folder
from fastqadapter.evaluation.scores import Point, score_tokens
from fastqadapter.integrations.vllm.export import export_for_vllm
from fastqadapter.models import QAdapterModel
from fastqadapter.packing import pack
from serving import Answer, generated, load_all, save_adapters, save_tiny

TOKENS = 48
DIALS: list[dict[str, Any]] = [
    {},
    {"alpha_0": 0.5, "alpha_tilde": 0.7},
    {"adapters": "brief", "alpha_tilde": 2.0},
    {"adapters": "brief=0.4", "alpha_0": 1.5},
]
QUESTIONS = [
    "What is the capital of France?", "Why is the sky blue?", "Name three animals.", "How do I boil an egg?",
    "What is 7 times 6?", "Write a line about rain.", "Who wrote Hamlet?", "What does a bee make?",
    "How many days has a week?", "Translate 'good morning' into Spanish.", "What is water made of?",
    "Give me a synonym of fast.", "Is the moon a planet?", "What do plants need?", "Count to five.",
    "Which colour is a banana?", "What is the opposite of hot?", "Tell me a joke.", "What is gravity?",
    "Where do penguins live?",
]  # fmt: skip


class Served:
    """A base with its adapters: the folder, the model of transformers, prompts."""

    def __init__(
        self,
        root: Path,
        base: Path,
        kv_mode: str,
        architecture: str = "llama",
        std: float = 0.05,
        targets: list[str] | None = None,
        **export: Any,
    ):
        self.base = base
        self.adapters = save_adapters(base, root / "trained", kv_mode, architecture, std, targets)
        self.folder = export_for_vllm(base, self.adapters, root / "served", **export)
        self.model: QAdapterModel = load_all(base, self.adapters)


@contextlib.contextmanager
def engine(folder: Path, **options: Any) -> Iterator[LLM]:
    settings = {"dtype": "float32", "max_model_len": 512, "enforce_eager": True, "max_num_seqs": 16}
    llm = LLM(model=str(folder), disable_log_stats=False, **(settings | options))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def params(extra: dict[str, Any], tokens: int = TOKENS, **options: Any) -> SamplingParams:
    options = {"temperature": 0.0, "logprobs": 1, "ignore_eos": True} | options
    return SamplingParams(max_tokens=tokens, extra_args=extra or None, **options)


def answers(
    llm: LLM, prompts: list[list[int]], extras: list[dict[str, Any]], tokens: int = TOKENS, **options: Any
) -> list[Answer]:
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        [params(extra, tokens, **options) for extra in extras],
        use_tqdm=False,
    )
    found = []
    for output in outputs:
        [completion] = output.outputs
        tokens_of = list(completion.token_ids)
        log_probs = [step[token].logprob for step, token in zip(completion.logprobs, tokens_of, strict=True)]
        found.append(Answer(tokens_of, log_probs))
    return found


def assert_same(found: list[Answer], expected: list[Answer], tolerance: float = 1e-3) -> None:
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one.tokens == other.tokens, f"request {number}"
        assert one.log_probs == pytest.approx(other.log_probs, abs=tolerance), f"request {number}"


def random_prompts(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    return [torch.randint(5, 97, (length,), generator=generator).tolist() for length in lengths]


@pytest.fixture(scope="module")
def smollm(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served(tmp_path_factory.mktemp("smollm"), demo_model_folder(), "shared", std=0.02)


@pytest.fixture(scope="module")
def questions(smollm: Served) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm.folder)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    return [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats]


@pytest.fixture(scope="module")
def llm(smollm: Served) -> Iterator[LLM]:
    with engine(smollm.folder) as made:
        yield made


def test_twenty_prompts_are_those_of_generate(smollm: Served, llm: LLM, questions: list[list[int]]) -> None:
    expected = [generated(smollm.model, prompt, TOKENS, {}) for prompt in questions]
    assert_same(answers(llm, questions, [{}] * len(questions)), expected)
    base = [generated(smollm.model, prompt, TOKENS, {"adapters": {"polite": 0.0}}) for prompt in questions]
    assert sum(one.tokens == other.tokens for one, other in zip(base, expected, strict=True)) < len(questions) / 2


def test_a_batch_of_different_dials_is_its_single_runs(smollm: Served, llm: LLM, questions: list[list[int]]) -> None:
    prompts, extras = questions[:16], DIALS * 4
    together = answers(llm, prompts, extras)
    alone = [answers(llm, [prompt], [extra])[0] for prompt, extra in zip(prompts, extras, strict=True)]
    assert_same(together, alone)
    expected = [generated(smollm.model, *each) for each in zip(prompts[:4], [TOKENS] * 4, extras[:4], strict=True)]
    assert_same(together[:4], expected)


def test_prompt_logprobs_are_of_the_policy(smollm: Served, llm: LLM, questions: list[list[int]]) -> None:
    """Every token of such a request has a Q row; its neighbour in the batch has one."""
    prompt = questions[0]
    outputs = llm.generate(
        [{"prompt_token_ids": prompt}, {"prompt_token_ids": questions[1]}],
        [params({}, 1, prompt_logprobs=0), params({}, 1)],
        use_tqdm=False,
    )
    found = [step[token].logprob for step, token in zip(outputs[0].prompt_logprobs[1:], prompt[1:], strict=True)]
    assert found == pytest.approx(prompt_log_probs(smollm.model, prompt, {}), abs=1e-3)


def test_prompt_logprobs_in_chunks(smollm: Served, questions: list[list[int]]) -> None:
    prompt = questions[0] * 3
    with engine(smollm.folder, max_num_batched_tokens=32, max_num_seqs=4) as chunked:
        [output] = chunked.generate(
            [{"prompt_token_ids": prompt}], [params(DIALS[1], 1, prompt_logprobs=0)], use_tqdm=False
        )
    found = [step[token].logprob for step, token in zip(output.prompt_logprobs[1:], prompt[1:], strict=True)]
    assert found == pytest.approx(prompt_log_probs(smollm.model, prompt, DIALS[1]), abs=1e-3)


def prompt_log_probs(model: QAdapterModel, prompt: list[int], extra: dict[str, Any]) -> list[float]:
    batch, point = pack([(prompt[:1], [prompt[1:]])]), Point(extra.get("alpha_0", 1.0), extra.get("alpha_tilde", 1.0))
    return score_tokens(model, batch, [point]).policy[0].tolist()


def test_sampling_follows_the_policy(smollm: Served, llm: LLM, questions: list[list[int]]) -> None:
    """Seeds, several answers to one prompt, stop strings, a choice that is forced."""
    seeded = [answers(llm, questions[:2], [{}, DIALS[2]], temperature=1.0, seed=5) for _ in range(2)]
    assert seeded[0] == seeded[1]
    [output] = llm.generate([{"prompt_token_ids": questions[0]}], [params({}, 8, n=3, temperature=1.0)], use_tqdm=False)
    assert len({tuple(each.token_ids) for each in output.outputs}) > 1
    greedy = llm.generate([{"prompt_token_ids": questions[0]}], [params({}, 20)], use_tqdm=False)[0].outputs[0].text
    stop = greedy.split()[3]
    [output] = llm.generate([{"prompt_token_ids": questions[0]}], [params({}, 20, stop=[stop])], use_tqdm=False)
    assert output.outputs[0].text == greedy[: greedy.index(stop)] and output.outputs[0].stop_reason == stop
    forced = StructuredOutputsParams(choice=["blue", "green"])
    chosen = params({}, 8, structured_outputs=forced, ignore_eos=False)
    [output] = llm.generate([{"prompt_token_ids": questions[1]}], [chosen], use_tqdm=False)
    assert output.outputs[0].text in ("blue", "green")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"adapters": "rude"}, "'rude' is not served"),
        ({"alpha_tilde": -1}, "alpha_tilde=-1"),
        ({"alpha0": 1}, "did you mean"),
    ],
)
def test_a_bad_request_is_refused_and_the_engine_goes_on(
    llm: LLM, questions: list[list[int]], extra: dict[str, Any], message: str
) -> None:
    with pytest.raises(VLLMValidationError, match=message):
        answers(llm, questions[:1], [extra])
    assert len(answers(llm, questions[:1], [{}], tokens=2)[0].tokens) == 2


def test_kv_blocks_are_those_of_the_base(smollm: Served, llm: LLM) -> None:
    def blocks(engine: LLM) -> int:
        config: VllmConfig = engine.llm_engine.vllm_config
        return int(config.cache_config.num_gpu_blocks)

    with engine(smollm.base) as base:
        assert blocks(llm) == blocks(base)


def test_prefix_cache(smollm: Served, llm: LLM) -> None:
    """Blocks hold the base's K/V: what one adapter's request has written serves another's."""
    torch.manual_seed(0)
    shared = torch.randint(1000, 40000, (300,)).tolist()
    prompts = [[*shared, 1000 + i] for i in range(4)]
    with engine(smollm.folder, enable_prefix_caching=False) as without_cache:
        without = answers(without_cache, prompts, DIALS, tokens=16)
    for prompt, extra, expected in zip(prompts, DIALS, without, strict=True):
        [output] = llm.generate([{"prompt_token_ids": prompt}], [params(extra, 16)], use_tqdm=False)
        assert list(output.outputs[0].token_ids) == expected.tokens
    assert output.num_cached_tokens == 256  # two blocks of 128


def test_preemption_loses_nothing(smollm: Served, llm: LLM, questions: list[list[int]]) -> None:
    """16 requests that need two blocks each, and room for ten."""
    prompts, extras = questions[:16], DIALS * 4
    with engine(smollm.folder, num_gpu_blocks_override=10) as small:
        found = answers(small, prompts, extras, tokens=120)
        [preempted] = [metric.value for metric in small.get_metrics() if metric.name == "vllm:num_preemptions"]
    assert preempted > 0
    assert [one.tokens for one in found] == [one.tokens for one in answers(llm, prompts, extras, tokens=120)]


def test_chunked_prefill(smollm: Served, questions: list[list[int]]) -> None:
    prompts = [questions[0] * 4, questions[1], questions[2] * 3]
    expected = [generated(smollm.model, *each) for each in zip(prompts, [16] * 3, DIALS[:3], strict=True)]
    with engine(smollm.folder, max_num_batched_tokens=64, max_num_seqs=8) as chunked:
        assert_same(answers(chunked, prompts, DIALS[:3], tokens=16), expected)


@pytest.mark.parametrize(
    ("architecture", "kv_mode", "options"),
    [
        ("llama", "separate", {}),
        ("llama", "shared", {"enforce_eager": False}),
        ("mistral", "shared", {}),
        ("qwen3", "shared", {}),
        ("qwen3", "separate", {}),
        ("granite", "shared", {}),  # through the Transformers backend, as the next
        ("granite", "separate", {}),
        ("gemma3", "shared", {}),
    ],
)
def test_architectures_and_modes(tmp_path: Path, architecture: str, kv_mode: str, options: dict[str, Any]) -> None:
    served = Served(tmp_path, save_tiny(tmp_path / "base", architecture), kv_mode, architecture, std=0.3)
    prompts, extras = random_prompts(8, 60), DIALS * 2
    expected = [generated(served.model, *each) for each in zip(prompts, [24] * 8, extras, strict=True)]
    with engine(served.folder, **options) as llm:
        assert_same(answers(llm, prompts, extras, tokens=24), expected)


def test_layers_of_two_kinds_with_own_kv(tmp_path: Path) -> None:
    """Five layers with a window and two without: vLLM deals them, and our second ones, out to groups of blocks."""
    kinds = ["sliding_attention"] * 5 + ["full_attention"] * 2
    base = save_tiny(tmp_path / "base", "gemma3", num_hidden_layers=7, layer_types=kinds, sliding_window=16)
    served = Served(tmp_path, base, "separate", "gemma3", std=0.3)
    prompts, extras = random_prompts(8, 60), DIALS * 2
    expected = [generated(served.model, *each) for each in zip(prompts, [24] * 8, extras, strict=True)]
    with engine(served.folder) as llm:
        assert_same(answers(llm, prompts, extras, tokens=24), expected)


def test_prefix_cache_is_off_where_kv_depend_on_the_adapter(tmp_path: Path) -> None:
    served = Served(tmp_path, save_tiny(tmp_path / "base", "llama"), "separate", std=0.3)
    prompts = [torch.randint(5, 97, (300,), generator=torch.Generator().manual_seed(0)).tolist()] * 2  # three blocks
    expected = [generated(served.model, *each) for each in zip(prompts, [8] * 2, DIALS[1:3], strict=True)]
    with engine(served.folder) as llm:
        found = [answers(llm, [each], [extra], tokens=8)[0] for each, extra in zip(prompts, DIALS[1:3], strict=True)]
    assert_same(found, expected)


def test_a_new_export_to_the_same_folder_is_compiled_anew(tmp_path: Path) -> None:
    """vLLM keeps compiled graphs on disk, and which layers have adapters is in them."""
    base, prompts = save_tiny(tmp_path / "base", "llama"), random_prompts(4, 60)
    for targets in (["q_proj"], ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]):
        served = Served(tmp_path, base, "shared", std=0.3, targets=targets)
        expected = [generated(served.model, *each) for each in zip(prompts, [16] * 4, DIALS, strict=True)]
        with engine(served.folder, enforce_eager=False) as llm:
            assert_same(answers(llm, prompts, DIALS, tokens=16), expected)


def test_model_state_of_runner_v2() -> None:
    """Its rows, by the batches that vLLM would hand it; a GPU has to run the rest."""
    from fastqadapter.integrations.vllm.model_state import QAdapterModelState
    from fastqadapter.integrations.vllm.requests import Requests
    from fastqadapter.integrations.vllm.rows import RowBuffers
    from fastqadapter.integrations.vllm.served import Served as Entry
    from fastqadapter.integrations.vllm.served import ServedAdapter

    entry = Entry("base", "shared", {"polite": ServedAdapter(1.0, 1.0), "brief": ServedAdapter(1.0, 2.0)})
    state = object.__new__(QAdapterModelState)
    state.requests, state.buffers = Requests(entry), RowBuffers(4, 1, torch.device("cpu"))
    state.max_num_reqs, state.device = 4, torch.device("cpu")
    state.requests.put(2, params({}))
    state.requests.put(0, params({"adapters": "brief"}))
    decode = state._rows([2, 0], [0, 1, 2], 3)  # two requests of one token, and one of padding
    assert decode.tokens.tolist() == [0, 1, 2] and decode.adapters.tolist() == [0, 1, 0]
    assert decode.shares[:, 0].tolist() == [1.0, 0.5, 0.0] and decode.base_shares[:, 0].tolist() == [0.0, 0.0, 1.0]
    prefill = state._rows([2, 0], [0, 5, 6], 6)
    assert prefill.tokens.tolist() == [4, 5] and prefill.adapters.tolist() == [0, 1]
    assert state._rows([3], [0, 1], 1).shares.tolist() == [[0.0]]  # a dummy request that nobody has put
    assert state._rows([3], [0, 7], 7) is None


def test_two_adapters_in_one_request(tmp_path: Path) -> None:
    served = Served(tmp_path, save_tiny(tmp_path / "base", "llama"), "shared", std=0.3, max_adapters=2)
    extras = [
        {"adapters": {"polite": 0.7, "brief": -0.5}},
        {},
        {"adapters": {"brief": 1.0}},
        {"adapters": {"brief": 0.3, "polite": 0.3}},
    ]
    prompts = random_prompts(4, 60)
    expected = [generated(served.model, *each) for each in zip(prompts, [24] * 4, extras, strict=True)]
    with engine(served.folder) as llm:
        assert_same(answers(llm, prompts, extras, tokens=24), expected)


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two ranks want a core each")
@pytest.mark.parametrize(
    ("architecture", "kv_mode", "kv_heads"),
    [("llama", "shared", 2), ("llama", "shared", 1), ("llama", "separate", 2), ("granite", "shared", 2)],
)
def test_tensor_parallel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, kv_mode: str, kv_heads: int
) -> None:
    """Two ranks over gloo; with one K/V head, each has a copy of it."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    base = save_tiny(tmp_path / "base", architecture, num_key_value_heads=kv_heads)
    served = Served(tmp_path, base, kv_mode, architecture, std=0.3)
    prompts, extras = random_prompts(8, 60), DIALS * 2
    expected = [generated(served.model, *each) for each in zip(prompts, [24] * 8, extras, strict=True)]
    with engine(served.folder, tensor_parallel_size=2, distributed_executor_backend="mp") as llm:
        assert_same(answers(llm, prompts, extras, tokens=24), expected)


# Refused at the start


def poison(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "adapters" / "brief" / "adapter_model.safetensors"
    weights = load_file(path)
    next(iter(weights.values()))[0, 0] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})


def tear(folder: Path) -> None:
    path = folder / "adapters" / "brief" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def narrow(folder: Path) -> None:
    """The adapter of a base with a smaller MLP, put there by hand."""
    other = save_tiny(folder.parent / "narrow", "llama", intermediate_size=64)
    adapters = save_adapters(other, folder.parent / "others", "shared")
    shutil.copytree(adapters["brief"], folder / "adapters" / "brief", dirs_exist_ok=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (poison, "are not finite; the run that made them diverged"),
        (lambda folder: (folder / "adapters" / "brief" / "adapter_model.safetensors").unlink(), "adapter_model"),
        (tear, "brief: its weights cannot be loaded"),
        (narrow, "mlp.gate_proj is for 64 inputs and 64 outputs"),
    ],
    ids=["NaN", "missing", "torn", "other base"],
)
def test_a_bad_folder_is_refused_at_the_start(
    tmp_path: Path, change: Callable[[Path], None], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = Served(tmp_path, save_tiny(tmp_path / "base", "llama"), "shared").folder
    change(folder)
    with pytest.raises(Exception) as error, engine(folder):
        pass
    assert message in f"{error.value}{capfd.readouterr()}"  # a worker's error is in its log


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"enable_lora": True}, "vLLM's own LoRA does not go with a Q-Adapter"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "speculative decoding"),
    ],
)
def test_options_that_do_not_go_with_it(smollm: Served, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message), engine(smollm.folder, **options):
        pass
