"""The command line, driven as a person would: train, resume, generate, env; every mistake is one line and exit 2."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastqadapter
from fastqadapter import cli
from fastqadapter.commands.adapters import name_adapters
from words import save_base, word_rows


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder with a base model, rows, and an adapter trained for a few steps."""
    folder = tmp_path_factory.mktemp("cli")
    save_base(folder / "base")
    for name, count, seed in (("train", 12, 0), ("heldout", 4, 1)):
        lines = [json.dumps(row) for row in word_rows(count, seed)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    assert cli.main(train_arguments(folder, "adapter", "--eval_dataset_name", str(folder / "heldout.jsonl"))) == 0
    return folder


def train_arguments(folder: Path, output: str, *more: str) -> list[str]:
    options = {
        "model_name_or_path": folder / "base",
        "dataset_name": folder / "train.jsonl",
        "output_dir": folder / output,
        "max_steps": 4,
        "save_steps": 2,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "report_to": "none",
        "use_cpu": True,
        "lora_r": 4,
    }
    return ["train", *(f"--{name}={value}" for name, value in options.items()), *more]


def run(capsys, *argv: str) -> tuple[int, str, str]:
    code = cli.main(argv)
    out, err = capsys.readouterr()
    return code, out, err


def fails(capsys, *argv: str) -> str:
    """The one line that a mistake prints."""
    code, _, err = run(capsys, *argv)
    lines = [line for line in err.splitlines() if line.startswith(("fastqadapter", "unknown command"))]
    assert code == 2
    assert len(lines) == 1 and "Traceback" not in err
    return lines[0]


def test_train_saves_adapter_sidecar_metrics_and_curves(workplace: Path) -> None:
    found = {path.name for path in (workplace / "adapter").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "qadapter_config.json", "eval_results.json"} <= found
    assert {"checkpoint-4", "trainer_state.json", "curves.png", "tokenizer.json"} <= found
    config = json.loads((workplace / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 4 and "k_proj" not in config["target_modules"]


def test_train_resumes_from_the_last_checkpoint(workplace: Path, capsys) -> None:
    assert cli.main(train_arguments(workplace, "resumed", "--max_steps", "2")) == 0
    assert cli.main(train_arguments(workplace, "resumed", "--resume_from_checkpoint", "true")) == 0
    state = json.loads((workplace / "resumed" / "trainer_state.json").read_text())
    assert state["global_step"] == 4
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2, 3, 4]


def test_train_takes_a_yaml_config_and_the_command_line_wins(workplace: Path, capsys) -> None:
    config = workplace / "run.yaml"
    config.write_text(
        f"model_name_or_path: {workplace / 'base'}\ndataset_name: {workplace / 'train.jsonl'}\nmax_steps: 1\n"
        f"report_to: none\nuse_cpu: true\nkv_mode: separate\nlora_target_modules: [q_proj, v_proj]\nbeta: 0.5\n"
    )
    output = workplace / "yaml"
    assert cli.main(["train", "--config", str(config), "--output_dir", str(output), "--beta", "0.25"]) == 0
    sidecar = json.loads((output / "qadapter_config.json").read_text())
    assert sidecar["kv_mode"] == "separate" and sidecar["beta"] == 0.25
    assert set(json.loads((output / "adapter_config.json").read_text())["target_modules"]) == {"q_proj", "v_proj"}


def test_generate_one_prompt(workplace: Path, capsys) -> None:
    adapter = str(workplace / "adapter")
    code, by_default, _ = run(capsys, "generate", "--adapter", adapter, "--prompt", "w9 w10", "--max_new_tokens", "6")
    assert code == 0 and by_default.strip()
    dials = ("--alpha_0", "1", "--alpha_tilde", "1")
    argv = ("generate", "--adapter", f"{adapter}=1", "--prompt", "w9 w10", "--max_new_tokens", "6", *dials)
    assert run(capsys, *argv)[1] == by_default
    beams = run(capsys, *argv, "--num_beams", "3")
    assert beams[0] == 0 and beams[1].strip()


def test_generate_reads_a_prompt_from_stdin(workplace: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("w9 w10\n"))
    code, out, _ = run(capsys, "generate", "--adapter", str(workplace / "adapter"), "--max_new_tokens", "4")
    assert code == 0 and out.strip()


def test_generate_chats_on_a_terminal(workplace: Path, capsys, monkeypatch) -> None:
    terminal = io.StringIO("w9 w10\nw11\n\nnever read\n")
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdin", terminal)
    code, out, err = run(capsys, "generate", "--adapter", str(workplace / "adapter"), "--max_new_tokens", "4")
    assert code == 0 and "empty line" in err
    assert out.count("> ") == 3
    assert terminal.readline() == "never read\n"


def test_generate_a_file_and_go_on_after_a_kill(workplace: Path, capsys) -> None:
    prompts, output = workplace / "prompts.txt", workplace / "answers.jsonl"
    prompts.write_text("w9 w10\nw11\nw12 w13 w14\n")
    argv = ["generate", "--adapter", str(workplace / "adapter"), "--prompts_file", str(prompts)]
    argv += ["--output_file", str(output), "--max_new_tokens", "5", "--batch_size", "2"]
    assert run(capsys, *argv)[0] == 0
    complete = output.read_text()
    assert [json.loads(line)["prompt"][0]["content"] for line in complete.splitlines()] == [
        "w9 w10",
        "w11",
        "w12 w13 w14",
    ]
    lines = complete.splitlines(keepends=True)
    output.write_text("".join(lines[:2]) + lines[2][:10])  # killed in the middle of a line
    assert run(capsys, *argv)[0] == 0
    assert output.read_text() == complete
    output.write_text('{"prompt": "another", "response": ""}\n')
    assert "name another file" in fails(capsys, *argv)


def test_prompts_in_one_batch_get_the_answers_they_get_alone(workplace: Path, capsys) -> None:
    prompts = workplace / "unequal.txt"
    prompts.write_text("w9\nw11 w12 w13 w14 w15\nw10 w20 w30\n")
    argv = ["generate", "--adapter", str(workplace / "adapter"), "--prompts_file", str(prompts)]
    for batch_size in (1, 3):
        output = str(workplace / f"batch{batch_size}.jsonl")
        assert run(capsys, *argv, "--output_file", output, "--batch_size", str(batch_size))[0] == 0
    assert (workplace / "batch1.jsonl").read_text() == (workplace / "batch3.jsonl").read_text()


def test_answers_are_continued_with_the_same_options_alone(workplace: Path, capsys) -> None:
    prompts, output = workplace / "odd.jsonl", workplace / "odd-answers.jsonl"
    prompts.write_bytes(b"\xef\xbb\xbf" + '{"prompt": "w9\u2028w10"}\r\n{"prompt": "w11\x85"}\n'.encode())
    argv = ["generate", "--adapter", str(workplace / "adapter"), "--prompts_file", str(prompts)]
    argv += ["--output_file", str(output), "--max_new_tokens", "3"]
    assert run(capsys, *argv)[0] == 0
    entries = [json.loads(line) for line in output.read_text().split("\n")[:-1]]
    assert [entry["prompt"][0]["content"] for entry in entries] == ["w9\u2028w10", "w11\x85"]
    entries[0]["response"] = "one line\u2028another"
    output.write_text("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries))
    assert run(capsys, *argv)[0] == 0
    assert "holds answers with other settings" in fails(capsys, *argv, "--alpha_0", "0.5")
    shutil.copytree(workplace / "adapter", workplace / "other")
    argv[2] = str(workplace / "other")
    assert "holds answers with other settings" in fails(capsys, *argv)
    prompts.write_bytes(b"w9 \xff")
    assert "not UTF-8: invalid start byte at byte 3" in fails(capsys, *argv)


def test_sampling_goes_on_as_if_never_interrupted(workplace: Path, capsys) -> None:
    prompts, output = workplace / "sampled.txt", workplace / "sampled.jsonl"
    prompts.write_text("w9\nw10\nw11\n")
    argv = ["generate", "--adapter", str(workplace / "adapter"), "--prompts_file", str(prompts), "--batch_size", "1"]
    argv += ["--output_file", str(output), "--do_sample", "true", "--max_new_tokens", "6", "--seed", "3"]
    assert run(capsys, *argv)[0] == 0
    complete = output.read_text()
    output.write_text("".join(complete.splitlines(keepends=True)[:1]))
    assert run(capsys, *argv)[0] == 0
    assert output.read_text() == complete
    assert "holds answers with other settings" in fails(capsys, *argv, "--seed", "4")


def test_undecodable_bytes_do_not_break_a_prompt(workplace: Path, capsys) -> None:
    argv = ["generate", "--adapter", str(workplace / "adapter"), "--max_new_tokens", "2"]
    assert run(capsys, *argv, "--prompt", "\udcff w9")[0] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature", "0.5"], "temperature=0.5 acts with --do_sample alone"),
        (["--do_sample", "true", "--top_p", "nan"], "top_p=nan is outside its legal range (0, 1]"),
        (["--do_sample", "true", "--temperature", "0"], "temperature=0.0 is outside its legal range"),
        (["--seed", "-1"], "seed=-1"),
        (["--prompt_lookup_num_tokens", "0"], "prompt_lookup_num_tokens=0 is outside its legal range [1, inf)"),
        (["--prompt_lookup_num_tokens", "2", "--num_beams", "2"], "does not go with num_beams=2"),
        (["--alpha_tilde", "-1e-5"], "alpha_tilde=-1e-05 is outside its legal range (0, inf)"),
    ],
)
def test_generate_refuses_numbers_without_a_meaning(workplace: Path, capsys, options: list[str], message: str) -> None:
    argv = ["generate", "--adapter", str(workplace / "adapter"), "--prompt", "w9"]
    assert message in fails(capsys, *argv, *options)


def test_what_is_no_adapter(workplace: Path, tmp_path: Path, capsys) -> None:
    message = fails(capsys, "generate", "--adapter", str(tmp_path), "--prompt", "w9")
    assert f"adapter={str(tmp_path)!r} is no folder or hub id of a trained adapter" in message
    shutil.copytree(workplace / "adapter", tmp_path / "homeless")
    config = tmp_path / "homeless" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": None}))
    assert "give --model_name_or_path" in fails(capsys, "generate", "--adapter", str(config.parent), "--prompt", "w9")


def test_adapters_get_free_names(tmp_path: Path) -> None:
    for arguments, folders in (
        (["a", "b", "c"], {"default": "a", "adapter1": "b", "adapter2": "c"}),
        (["adapter1=a", "b", "c"], {"adapter1": "a", "adapter2": "b", "adapter3": "c"}),
        (["a", "default=b"], {"adapter1": "a", "default": "b"}),
    ):
        assert name_adapters(arguments) == (folders, dict.fromkeys(folders, 1.0))
    with pytest.raises(ValueError, match="'x' names two of them"):
        name_adapters(["x=a", "x=b"])
    for argument in ("a==1", "a=", "./a=", "=0.5", ""):
        with pytest.raises(ValueError, match=f"adapter='{argument}' names no folder"):
            name_adapters([argument])
    (tmp_path / "run1").mkdir()
    with pytest.raises(ValueError, match="'my-adapter' is no name for an adapter: letters, digits and _ alone"):
        name_adapters([f"my-adapter={tmp_path / 'run1'}"])
    assert set(name_adapters(["adapter1", "adapter2", "adapter3"])[0].values()) == {"adapter1", "adapter2", "adapter3"}


def test_adapters_have_weights(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    weighted = ["a=1.0", "polite=b=0.5", "runs/c=-2", "name=d"]
    folders = {"default": "a", "polite": "b", "adapter1": "runs/c", "name": "d"}
    assert name_adapters(weighted) == (folders, {"default": 1.0, "polite": 0.5, "adapter1": -2.0, "name": 1.0})
    (tmp_path / "lr=0.1").mkdir()  # a folder may be named so
    assert name_adapters(["lr=0.1", "best=lr=0.1", "lr=0.1=0.5"]) == (
        {"default": "lr=0.1", "best": "lr=0.1", "adapter1": "lr=0.1"},
        {"default": 1.0, "best": 1.0, "adapter1": 0.5},
    )


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--lora_alpha", "0"], "lora_alpha=0"),
        (["--lora_dropout", "0.1"], "lora_dropout=0.1 acts with --disable_dropout false alone"),
        (["--learning_rate", "-1e-4"], "Invalid learning rate: -0.0001"),
    ],
)
def test_train_refuses_what_would_do_nothing(workplace: Path, capsys, option: list[str], message: str) -> None:
    assert message in fails(capsys, *train_arguments(workplace, "refused"), *option)


def test_an_unquoted_no_in_yaml(workplace: Path, tmp_path: Path, capsys) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("save_strategy: no\nlearning_rate: 1e-4\n")
    assert run(capsys, *train_arguments(workplace, str(tmp_path / "out"), "--config", str(config)))[0] == 0
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_an_error_of_ours_is_one_line_too(workplace: Path, capsys, monkeypatch) -> None:
    def broken(*args, **kwargs):
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("fastqadapter.commands.env.environment_report", broken)
    code, _, err = run(capsys, "env")
    assert (code, err) == (1, "fastqadapter env: RuntimeError: two lines (FASTQADAPTER_TRACEBACK=1 shows where)\n")
    monkeypatch.setenv("FASTQADAPTER_TRACEBACK", "1")
    with pytest.raises(RuntimeError):
        cli.main(["env"])


def test_a_reader_that_has_enough() -> None:
    command = f"{sys.executable} -m fastqadapter env | true"
    done = subprocess.run(["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"], capture_output=True, text=True)
    assert done.returncode in (0, 141) and done.stderr == ""


def test_generate_mixes_adapters(workplace: Path, capsys) -> None:
    adapter = str(workplace / "adapter")
    argv = ["generate", "--prompt", "w9", "--max_new_tokens", "4"]
    once = run(capsys, *argv, "--adapter", f"a={adapter}=0.5", f"b={adapter}=-0.25")
    twice = run(capsys, *argv, "--adapter", f"{adapter}=0.5", "--adapter", f"{adapter}=-0.25")
    sum_of_both = run(capsys, *argv, "--adapter", f"{adapter}=0.25")
    assert once == twice == sum_of_both and once[0] == 0
    assert "a: -1e+300 / alpha_tilde" in fails(capsys, *argv, "--adapter", f"a={adapter}=-1e300")
    assert "nan" in fails(capsys, *argv, "--adapter", f"{adapter}=nan")
    assert "the weight 'half' is no number" in fails(capsys, *argv, "--adapter", f"{adapter}=half")


def test_adapters_of_the_command_line_replace_those_of_the_file(workplace: Path, tmp_path: Path, capsys) -> None:
    adapter = str(workplace / "adapter")
    config = tmp_path / "mix.yaml"
    config.write_text(f"adapter: [{adapter}=0.5, b={adapter}]\nmax_new_tokens: 4\nprompt: w9\n")
    assert run(capsys, "generate", "--config", str(config))[0] == 0
    argv = ("generate", "--config", str(config), f"--adapter={adapter}")
    assert run(capsys, *argv) == run(
        capsys, "generate", "--adapter", adapter, "--max_new_tokens", "4", "--prompt", "w9"
    )


def test_assistance_does_not_change_the_answer(workplace: Path, capsys) -> None:
    adapter, base = str(workplace / "adapter"), str(workplace / "base")
    argv = ["generate", "--adapter", adapter, "--prompt", "w9 w10 w9 w10 w9", "--max_new_tokens", "8"]
    expected = run(capsys, *argv)[:2]
    assert run(capsys, *argv, "--prompt_lookup_num_tokens", "3")[:2] == expected
    assert run(capsys, *argv, "--assistant_model", base)[:2] == expected
    assert "assistant_model='nowhere' cannot be loaded" in fails(capsys, *argv, "--assistant_model", "nowhere")
    prompts = workplace / "assisted.txt"
    prompts.write_text("w9 w10 w9\nw11\n")
    argv = ["generate", "--adapter", adapter, "--prompts_file", str(prompts), "--max_new_tokens", "4"]
    plain, assisted = (run(capsys, *argv, *more)[1] for more in ([], ["--prompt_lookup_num_tokens", "2"]))
    answers = [[json.loads(line)["response"] for line in out.splitlines()] for out in (plain, assisted)]
    assert answers[0] == answers[1] and len(answers[0]) == 2


def test_prompts_that_are_no_prompts(workplace: Path, capsys) -> None:
    prompts = workplace / "bad.jsonl"
    argv = ["generate", "--adapter", str(workplace / "adapter"), "--prompts_file", str(prompts)]
    for bad in ("5", "[]", '[{"role": "user"}]', '" "'):
        prompts.write_text(f'{{"prompt": {bad}}}\n')
        assert "prompt 1 is neither a text nor a list of messages" in fails(capsys, *argv)


def test_broken_weights_are_one_line(workplace: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(workplace / "adapter", tmp_path / "broken")
    weights = tmp_path / "broken" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    assert "weights cannot be loaded" in fails(capsys, "generate", "--adapter", str(weights.parent), "--prompt", "w9")


def test_a_template_that_refuses_the_system_message(workplace: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(workplace / "base", tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").write_text(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}w9"
    )
    argv = ["generate", "--adapter", str(workplace / "adapter"), "--model_name_or_path", str(tmp_path / "base")]
    assert "refuses a chat with the roles system, user" in fails(capsys, *argv, "--prompt", "w9", "--system", "w10")


def test_yaml_holds_nested_options(workplace: Path, tmp_path: Path, capsys) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr_rate: 0.5}\n")
    assert run(capsys, *train_arguments(workplace, str(tmp_path / "out"), "--config", str(config)))[0] == 0
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    rates = [entry["learning_rate"] for entry in history if "learning_rate" in entry]
    assert min(rates) > 0.5 * max(rates)


def test_evaluation_without_held_out_rows_is_refused(workplace: Path, tmp_path: Path, capsys) -> None:
    argv = train_arguments(workplace, str(tmp_path / "out"), "--eval_strategy", "steps")
    assert "eval_strategy='steps' needs held-out rows: give --eval_dataset_name" in fails(capsys, *argv)
    argv = train_arguments(workplace, str(tmp_path / "out"), "--eval_dataset_name", str(tmp_path / "none.jsonl"))
    assert "eval_dataset_name=" in fails(capsys, *argv)


def test_env_without_hugging_face(tmp_path: Path) -> None:
    """The command that tells what is missing must run where it is."""
    code = (
        "import sys; sys.modules.update(transformers=None, peft=None, accelerate=None);"
        "from fastqadapter.cli import main; sys.exit(main(['env']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "backend eager" in done.stdout and "Traceback" not in done.stderr


def test_env(capsys) -> None:
    code, out, _ = run(capsys, "env")
    assert code == 0 and "torch" in out and "backend eager" in out
    report = json.loads(run(capsys, "env", "--json")[1])
    assert report["fastqadapter"] == fastqadapter.__version__


def test_usage_and_version(capsys) -> None:
    assert run(capsys, "--version")[1] == f"fastqadapter {fastqadapter.__version__}\n"
    code, out, _ = run(capsys, "--help")
    assert code == 0 and all(name in out for name in cli.COMMANDS)
    assert run(capsys)[0] == 2


def test_mistakes_are_one_line_and_exit_2(workplace: Path, capsys) -> None:
    base, adapter = str(workplace / "base"), str(workplace / "adapter")
    rows = str(workplace / "train.jsonl")
    common = ("--model_name_or_path", base, "--output_dir", str(workplace / "never"), "--use_cpu")
    cases = {
        ("evaluate",): "unknown command 'evaluate'",
        ("train",): "required",
        ("train", "--dataset_name", rows, *common, "--alpha_tilde", "0"): "alpha_tilde=0.0 is outside its legal range",
        ("train", "--dataset_name", rows, *common, "--kv_mode", "both"): "kv_mode",
        ("train", "--dataset_name", rows, *common, "--divisor", "half"): "divisor='half'",
        ("train", "--dataset_name", rows, *common, "--typo", "1"): "--typo",
        ("train", "--dataset_name", "none.jsonl", *common): "dataset_name='none.jsonl': no such file",
        ("train", "--dataset_name", rows, "--model_name_or_path", str(workplace)): "cannot be loaded",
        ("train", "--dataset_name", rows, *common, "--lora_target_modules", "k_proj"): "kv_mode='shared'",
        ("train", "--config", str(workplace / "none.yaml")): "none.yaml",
        ("generate", "--adapter", base, "--prompt", "x", "--model_name_or_path", base): "plain LoRA adapter",
        ("generate", "--adapter", adapter, "--prompt", " "): "prompt is empty",
        ("generate", "--adapter", adapter, "--prompt", "x", "--alpha_tilde", "-1"): "alpha_tilde=-1.0",
        ("generate", "--adapter", adapter, "--prompt", "x", "--prompts_file", rows): "not both",
        ("generate", "--adapter", adapter, "--prompt", "x", "--max_new_tokens", "0"): "max_new_tokens=0",
        ("demo", "--kv_mode", "none"): "invalid choice",
    }
    for argv, expected in cases.items():
        assert expected in fails(capsys, *argv), argv


def test_a_bad_row_is_named_with_its_line(workplace: Path, capsys) -> None:
    bad = workplace / "bad.jsonl"
    bad.write_text(json.dumps(word_rows(1)[0]) + "\n{broken\n")
    common = ("--model_name_or_path", str(workplace / "base"), "--output_dir", str(workplace / "bad"), "--use_cpu")
    assert "bad.jsonl:2" in fails(capsys, "train", "--dataset_name", str(bad), *common)
    argv = ("train", "--dataset_name", str(bad), *common, "--max_steps", "1", "--report_to", "none")
    assert run(capsys, *argv, "--on_bad_row", "skip")[0] == 0
