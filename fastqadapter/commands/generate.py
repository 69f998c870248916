"""`fastqadapter generate`: the customised policy's answers to a prompt, to a file of prompts, or in a chat."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer, set_seed

from fastqadapter.commands.adapters import BaseArguments, load_adapters, name_adapters
from fastqadapter.commands.arguments import OneLineHfParser, load_model_and_tokenizer
from fastqadapter.commands.parsing import ArgumentError
from fastqadapter.models import QAdapterModel
from fastqadapter.prompts import Messages, encode_chats


@dataclasses.dataclass
class GenerateArguments:
    """What to answer, with which adapters and dials."""

    adapter: list[str] = dataclasses.field(
        metadata={
            "action": "extend",
            "help": "FOLDER or hub id, FOLDER=WEIGHT, NAME=FOLDER or NAME=FOLDER=WEIGHT; give it several times to mix "
            "adapters; the weight is any number, default 1, 0 with equal alphas is the base policy",
        }
    )
    prompt: str | None = dataclasses.field(default=None, metadata={"help": "one prompt; default: stdin, or a chat"})
    prompts_file: str | None = dataclasses.field(
        default=None,
        metadata={"help": "prompts, one a line; in a .jsonl file objects with `prompt` (text or messages)"},
    )
    output_file: str | None = dataclasses.field(
        default=None,
        metadata={"help": "JSON lines prompt/response, written as they come; a started file is continued"},
    )
    system: str | None = dataclasses.field(default=None, metadata={"help": "system message before each prompt"})
    alpha_0: float | None = dataclasses.field(default=None, metadata={"help": "weight of the base policy"})
    alpha_tilde: float | None = dataclasses.field(default=None, metadata={"help": "temperature of the policy"})
    max_new_tokens: int = dataclasses.field(default=256, metadata={"help": "most tokens of one answer"})
    do_sample: bool = dataclasses.field(default=False, metadata={"help": "sample instead of taking the likeliest"})
    temperature: float = dataclasses.field(default=1.0, metadata={"help": "further temperature when sampling"})
    top_p: float = dataclasses.field(default=1.0, metadata={"help": "nucleus sampling"})
    top_k: int = dataclasses.field(default=0, metadata={"help": "sample among so many tokens; 0: all"})
    num_beams: int = dataclasses.field(default=1, metadata={"help": "beam search with so many beams"})
    assistant_model: str | None = dataclasses.field(
        default=None, metadata={"help": "folder or hub id of a small model that proposes tokens; one prompt at a time"}
    )
    prompt_lookup_num_tokens: int | None = dataclasses.field(
        default=None, metadata={"help": "propose so many tokens from the prompt itself; one prompt at a time"}
    )
    seed: int = dataclasses.field(default=0, metadata={"help": "random seed"})
    batch_size: int = dataclasses.field(default=8, metadata={"help": "prompts at once with --prompts_file"})
    force: bool = dataclasses.field(default=False, metadata={"help": "run an adapter of another base model"})

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "num_beams", "batch_size"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"{name}={getattr(self, name)} is outside its legal range [1, inf)")
        if not self.do_sample:
            for name, default in (("temperature", 1.0), ("top_p", 1.0), ("top_k", 0)):
                if getattr(self, name) != default:
                    raise ArgumentError(f"{name}={getattr(self, name)} acts with --do_sample alone: give both")
        if not 0 < self.temperature < float("inf"):
            raise ArgumentError(f"temperature={self.temperature} is outside its legal range (0, inf)")
        if not 0 < self.top_p <= 1:
            raise ArgumentError(f"top_p={self.top_p} is outside its legal range (0, 1]")
        if not 0 <= self.seed < 2**32:
            raise ArgumentError(f"seed={self.seed} is outside its legal range [0, 2^32)")
        if self.prompt_lookup_num_tokens is not None and self.prompt_lookup_num_tokens < 1:
            raise ArgumentError(
                f"prompt_lookup_num_tokens={self.prompt_lookup_num_tokens} is outside its legal range [1, inf)"
            )
        for name in ("assistant_model", "prompt_lookup_num_tokens"):
            if getattr(self, name) is not None:
                if self.num_beams > 1:
                    raise ArgumentError(f"{name} does not go with num_beams={self.num_beams}: give one of the two")
                self.batch_size = 1  # transformers assists one sequence at a time
        if self.prompt is not None and self.prompts_file is not None:
            raise ArgumentError("give --prompt or --prompts_file, not both")
        if self.output_file is not None and self.prompts_file is None:
            raise ArgumentError("--output_file goes with --prompts_file")


class Answerer:
    """A loaded model with its dials; answers lists of chats. `settings` is all that decides an answer."""

    def __init__(
        self,
        model: QAdapterModel,
        tokenizer: PreTrainedTokenizerBase,
        options: dict[str, Any],
        settings: dict[str, Any],
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.options = options
        self.settings = settings

    def __call__(self, chats: list[Messages], streamer: TextStreamer | None = None) -> list[str]:
        """The answer to each chat, whose last message is the user's."""
        inputs = encode_chats(self.tokenizer, chats)
        output = self.model.generate(
            **inputs.to(self.model.device), streamer=streamer, pad_token_id=self.tokenizer.pad_token_id, **self.options
        )
        return self.tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def main(argv: list[str]) -> None:
    parser = OneLineHfParser(
        (GenerateArguments, BaseArguments),
        prog="fastqadapter generate",
        description="Generate with the customised policy. Without prompt: a chat on a terminal, else stdin.",
    )
    arguments, base_arguments = parser.parse(argv)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are no UTF-8 must not end a chat; see _text
    prompts = _prompts(arguments)  # before the model is loaded: a mistake in them shows at once
    answerer = _load(arguments, base_arguments)
    set_seed(arguments.seed)
    if prompts is None:
        _talk(answerer, arguments.system)
    elif arguments.prompts_file is None:
        _say(answerer, _chat(prompts[0], arguments.system))
    else:
        _answer_file(answerer, [_chat(prompt, arguments.system) for prompt in prompts], arguments)


def _prompts(arguments: GenerateArguments) -> list[str | Messages] | None:
    """The prompts of the file, the one prompt, or None for a chat on the terminal."""
    if arguments.prompts_file is not None:
        return _read_prompts(Path(arguments.prompts_file))
    if arguments.prompt is None and sys.stdin.isatty():
        return None
    prompt = _text(sys.stdin.read() if arguments.prompt is None else arguments.prompt)
    if not prompt.strip():
        raise ArgumentError("the prompt is empty: give --prompt, --prompts_file, or text on stdin")
    return [prompt.strip()]


def _load(arguments: GenerateArguments, base_arguments: BaseArguments) -> Answerer:
    folders, weights = name_adapters(arguments.adapter)
    model, tokenizer = load_adapters(folders, base_arguments, force=arguments.force)
    options: dict[str, Any] = {
        "adapters": weights,
        "alpha_0": arguments.alpha_0,
        "alpha_tilde": arguments.alpha_tilde,
        "max_new_tokens": arguments.max_new_tokens,
        "num_beams": arguments.num_beams,
        "do_sample": arguments.do_sample,
    }
    if arguments.do_sample:
        options |= {name: getattr(arguments, name) for name in ("temperature", "top_p", "top_k")}
    if arguments.prompt_lookup_num_tokens is not None:
        options["prompt_lookup_num_tokens"] = arguments.prompt_lookup_num_tokens
    settings = {"base": base_arguments.model_name_or_path, "folders": folders, **options}
    if arguments.do_sample:
        settings["seed"] = arguments.seed
    if arguments.assistant_model is not None:
        settings["assistant_model"] = arguments.assistant_model
        options["assistant_model"] = _load_assistant(
            arguments.assistant_model, base_arguments, model.get_base_model().config.vocab_size
        )
    return Answerer(model, tokenizer, options, settings)


def _load_assistant(name: str, base_arguments: BaseArguments, vocabulary: int) -> PreTrainedModel:
    try:
        assistant, _ = load_model_and_tokenizer(dataclasses.replace(base_arguments, model_name_or_path=name))
    except ArgumentError as error:
        raise ArgumentError(str(error).replace("model_name_or_path", "assistant_model", 1)) from None
    found = assistant.config.get_text_config(decoder=True).vocab_size
    if found != vocabulary:
        raise ArgumentError(
            f"assistant_model={name!r} has {found} tokens, the base {vocabulary}: their tokenizers differ"
        )
    return assistant


def _text(text: str) -> str:
    """Bytes that are no UTF-8 come from the shell as lone surrogates, which no tokenizer takes."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _chat(prompt: str | Messages, system: str | None) -> Messages:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    return messages if system is None else [{"role": "system", "content": system}, *messages]


def _read_prompts(path: Path) -> list[str | Messages]:
    if path.suffix == ".json":
        raise ArgumentError(f"{path}: give a .jsonl file (one object with a key 'prompt' a line) or a text file")
    # Not splitlines(): it also splits inside a prompt, at U+2028 or a form feed.
    lines = [line.rstrip("\r") for line in _read(path).split("\n") if line.strip()]
    if not lines:
        raise ArgumentError(f"{path}: no prompt in this file")
    if path.suffix != ".jsonl":
        return list(lines)
    prompts = []
    for number, line in enumerate(lines, start=1):
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, TypeError, KeyError):
            raise ArgumentError(f"{path}: prompt {number} is no JSON object with a key 'prompt'") from None
        if not _is_prompt(prompt):
            raise ArgumentError(f"{path}: prompt {number} is neither a text nor a list of messages: {prompt!r:.60}")
        prompts.append(prompt)
    return prompts


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ArgumentError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from None


def _is_prompt(prompt: Any) -> bool:
    if isinstance(prompt, str):
        return bool(prompt.strip())
    return bool(prompt) and isinstance(prompt, list) and all(_is_message(message) for message in prompt)


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def _answer_file(answerer: Answerer, chats: list[Messages], arguments: GenerateArguments) -> None:
    """Answer all prompts in batches; each batch is written before the next begins."""
    output = None if arguments.output_file is None else Path(arguments.output_file)
    done = _already_answered(output, chats, answerer.settings)
    with tqdm(total=len(chats), initial=done, disable=None, unit="prompt") as bar:
        for start in range(done, len(chats), arguments.batch_size):
            batch = chats[start : start + arguments.batch_size]
            set_seed(arguments.seed + start)  # a run that goes on draws what an uninterrupted one would
            lines = [
                json.dumps({"prompt": chat, "response": answer, "settings": answerer.settings}, ensure_ascii=False)
                for chat, answer in zip(batch, answerer(batch), strict=True)
            ]
            if output is None:
                tqdm.write("\n".join(lines))
            else:
                with output.open("a", encoding="utf-8") as file:
                    file.write("\n".join(lines) + "\n")
            bar.update(len(batch))


def _already_answered(output: Path | None, chats: list[Messages], settings: dict[str, Any]) -> int:
    """How many prompts a started output file holds; it must be the answers to these prompts, with these settings.

    Raises:
        ValueError: the file holds something else.
    """
    if output is None or not output.exists():
        return 0
    text = _read(output)
    complete = text[: text.rfind("\n") + 1]
    try:
        entries = [json.loads(line) for line in complete.split("\n")[:-1]]
        answered = [entry["prompt"] for entry in entries]
        found = [entry["settings"] for entry in entries]
    except (ValueError, TypeError, KeyError):
        answered, found = [None], []
    if answered != chats[: len(answered)]:
        raise ArgumentError(f"{output}: exists and does not hold answers to these prompts; name another file")
    if any(other != settings for other in found):
        raise ArgumentError(f"{output}: holds answers with other settings ({found[0]}); name another file")
    if complete != text:  # a kill left half a line
        output.write_text(complete, encoding="utf-8")
    return len(answered)


def _say(answerer: Answerer, chat: Messages) -> str:
    """Answer one chat, word by word where the search allows it."""
    if answerer.options["num_beams"] > 1:
        [answer] = answerer([chat])
        print(answer)
    else:
        streamer = TextStreamer(answerer.tokenizer, skip_prompt=True, skip_special_tokens=True)
        [answer] = answerer([chat], streamer)
    return answer


def _talk(answerer: Answerer, system: str | None) -> None:
    """A chat on the terminal, until an empty line or the end of input."""
    print("Chat with the customised policy; an empty line ends it.", file=sys.stderr)
    messages = [] if system is None else [{"role": "system", "content": system}]
    for line in _lines():
        messages.append({"role": "user", "content": line})
        with torch.inference_mode():
            messages.append({"role": "assistant", "content": _say(answerer, messages)})


def _lines() -> Iterator[str]:
    while True:
        try:
            line = _text(input("> ")).strip()
        except EOFError:
            return
        if not line:
            return
        yield line
