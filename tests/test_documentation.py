"""What README and docs/ say is so: links lead somewhere, command lines parse, code compiles, examples run."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import io
import json
import os
import re
import shlex
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastqadapter as fqa
from fastqadapter import cli
from fastqadapter.demo.smollm import MODEL_NAME, cache_folder

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = ROOT / "examples"
MATHEMATICS = ROOT / "docs" / "mathematics.md"

FENCED = re.compile(r"^([ ]*)```(\w*)\n(.*?)^\1```[ ]*$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#{1,6} (.*)$", re.MULTILINE)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced blocks of a page in one of the languages, without their indentation."""
    found = []
    for indent, language, code in FENCED.findall(page.read_text(encoding="utf-8")):
        if language in languages:
            found.append("".join(line.removeprefix(indent) for line in code.splitlines(keepends=True)))
    return found


def prose(page: Path) -> str:
    return FENCED.sub("", page.read_text(encoding="utf-8"))


# --- links ------------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The anchors that a heading has both on the site and on GitHub, and those of the API's names."""
    found = {name for name in re.findall(r"^::: (\S+)", page.read_text(encoding="utf-8"), re.MULTILINE)}
    for heading in HEADING.findall(prose(page)):
        text = LINK.sub(lambda match: match.group().partition("]")[0], heading).replace("`", "")
        plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
        site = re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())
        github = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        found |= {site} & {github}
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path):
    for target in LINK.findall(CODE.sub("", prose(page))):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_relative_to(ROOT) and file.exists(), f"{target}: no such file"
        assert not anchor or anchor in anchors(file), f"{target}: {file.name} has {sorted(anchors(file))}"


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert f": {page.name}\n" in navigation, f"{page.name} is not in mkdocs.yml"


# --- command lines ----------------------------------------------------------------------------------------------------


def statements(block: str) -> Iterator[list[str]]:
    """The words of each command of a shell block; `&&`, `|` and `;` end a command."""
    text = ""
    for line in block.splitlines():
        text += line
        try:
            words = shlex.split(text.removesuffix("\\"), comments=True)
        except ValueError:  # a quotation that goes on in the next line
            text += "\n"
            continue
        if text.endswith("\\"):
            text = text.removesuffix("\\")
            continue
        text, statement = "", []
        for word in [*words, ";"]:
            if word not in ("&&", "|", ";"):
                statement.append(word)
                continue
            if statement:
                yield statement
            statement = []


def command_lines() -> list[tuple[str, list[str]]]:
    """Page and arguments of every `fastqadapter ...` in a shell block, as the last part of another command too."""
    found = []
    for page in PAGES:
        for block in blocks(page, "bash"):
            for words in statements(block):
                places = [index for index, word in enumerate(words) if Path(word).name == "fastqadapter"]
                if places and "install" not in words:
                    found.append((name_of(page), words[places[0] + 1 :]))
    return found


COMMAND_LINES = command_lines()


class Parsed(BaseException):
    """Raised when a command has parsed its arguments, which is all that is wanted of it here."""


@pytest.fixture
def parsing_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastqadapter.commands.arguments import OneLineHfParser
    from fastqadapter.commands.parsing import OneLineParser

    parse, parse_known_args = OneLineHfParser.parse, OneLineParser.parse_known_args

    def parse_then_stop(self, argv):
        parse(self, argv)
        raise Parsed

    def parse_known_then_stop(self, *args, **kwargs):
        namespace, rest = parse_known_args(self, *args, **kwargs)
        if self.prog.startswith("fastqadapter ") and (not rest or self.prog == "fastqadapter serve"):
            raise Parsed
        return namespace, rest

    monkeypatch.setattr(OneLineHfParser, "parse", parse_then_stop)
    monkeypatch.setattr(OneLineParser, "parse_known_args", parse_known_then_stop)


@functools.cache
def options_of(command: str) -> frozenset[str]:
    """The options that `fastqadapter COMMAND --help` names."""
    with contextlib.redirect_stdout(io.StringIO()) as shown, pytest.raises(SystemExit):
        cli.main([command, "--help"])
    return frozenset(re.findall(r"--[a-zA-Z]\w*(?:-\w+)*", shown.getvalue()))


def test_command_lines_are_found():
    commands = {arguments[0] for _, arguments in COMMAND_LINES}
    assert commands == set(cli.COMMANDS), "each command is shown somewhere, and none that does not exist"


@pytest.mark.parametrize(
    ("page", "arguments"), COMMAND_LINES, ids=[f"{page}: {' '.join(each)[:60]}" for page, each in COMMAND_LINES]
)
def test_command_line_parses(page: str, arguments: list[str], parsing_alone, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    entries = ("model_name_or_path: base", "dataset_name: pairs.jsonl", "output_dir: out")
    Path("run.yaml").write_text("\n".join(entries) + "\n")
    if "--deepspeed" in arguments:  # reads its file, and is not there to be installed
        place = arguments.index("--deepspeed")
        assert (ROOT / arguments[place + 1]).is_file()
        arguments = arguments[:place] + arguments[place + 2 :]
    with pytest.raises(Parsed):
        cli.main(arguments)
        pytest.fail(capsys.readouterr().err)
    given = {word.partition("=")[0] for word in arguments[1:] if word.startswith("--")}
    if arguments[0] != "serve":  # what follows its folder is vLLM's; argparse would also take the start of a name
        assert given <= options_of(arguments[0]) | {"--config"}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_in_prose_exist(page: Path):
    for code in CODE.findall(prose(page)):
        words = code.split()
        if words[0] == "fastqadapter" and len(words) > 1 and not words[1].startswith("-"):
            command = words[1]
            assert command in cli.COMMANDS, code
            assert {word for word in words[2:] if word.startswith("--")} <= options_of(command), code


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_modules_to_run_exist(page: Path):
    for module in re.findall(r"python -m (fastqadapter[\w.]*)", page.read_text(encoding="utf-8")):
        assert importlib.util.find_spec(module) is not None, module


# --- Python -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_compiles(page: Path):
    for code in blocks(page, "python"):
        compile(code, page.name, "exec")


def test_mathematics_checks_itself():
    import torch

    [code] = blocks(MATHEMATICS, "python")
    before = torch.get_default_dtype()
    try:
        exec(compile(code, MATHEMATICS.name, "exec"), {})
    finally:
        torch.set_default_dtype(before)


def test_api_has_the_public_names():
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    identifiers = re.findall(r"^::: (\S+)", text, re.MULTILINE)
    shown = {*identifiers, *re.findall(r"heading: ([\w.]+)", text)}
    public = [f"fastqadapter.{name}" for name in fqa.__all__ if name != "ops"]
    public += [f"fastqadapter.ops.{name}" for name in fqa.ops.__all__]
    assert not set(public) - shown, "api.md leaves out public names"
    assert len(set(identifiers)) == len(identifiers)
    for identifier in identifiers:
        module, _, name = identifier.rpartition(".")
        assert hasattr(importlib.import_module(module), name), identifier


# --- examples ---------------------------------------------------------------------------------------------------------


def run_example(name: str) -> str:
    """What an example prints; on one thread, since tests may run beside each other."""
    if not (cache_folder() / MODEL_NAME / "model.safetensors").is_file():
        pytest.skip("the demo's model is not in the cache: `fastqadapter demo --smoke` fetches it")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, EXAMPLES / name], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_example_train_and_generate():
    printed = run_example("train_and_generate.py")
    [(before, after)] = re.findall(r"rewards/accuracies: ([\d.]+) before, ([\d.]+) after", printed)
    assert float(before) < 0.8 < float(after)
    assert printed.count("{'adapters'") == 4


def test_example_mix_adapters():
    printed = run_example("mix_adapters.py")
    for adapter in ("concise", "friendly"):
        losses = [float(loss) for loss in re.findall(rf"{adapter}: loss ([\d.]+)", printed)]
        assert losses[0] == pytest.approx(0.693, abs=2e-3) and losses[-1] < 0.4
    answers = printed.rpartition("\nbase\n")[2]
    assert answers.count("\n{") == 3 and "Dear friend" in answers


def test_notebook_is_clean():
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"] and cell["execution_count"] is None, "clear the outputs before you commit"
            compile("".join(cell["source"]), "quickstart.ipynb", "exec")
