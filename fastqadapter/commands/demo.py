"""`fastqadapter demo`: the whole method on a small real model, in minutes, on any machine."""

from __future__ import annotations

from pathlib import Path

from fastqadapter.commands.arguments import ModelArguments, load_model_and_tokenizer
from fastqadapter.commands.parsing import ArgumentError, OneLineParser


def main(argv: list[str]) -> None:
    parser = OneLineParser(
        prog="fastqadapter demo",
        description="Train a Q-Adapter for concise answers on SmolLM2-135M-Instruct and show before and after.",
    )
    parser.add_argument("--model", help="folder or hub id of another instruction-tuned model")
    parser.add_argument("--output_dir", default="fastqadapter-demo", help="report, curves, adapter (%(default)s)")
    parser.add_argument("--kv_mode", default="shared", choices=("separate", "prompt", "shared"), help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the training order (%(default)s)")
    parser.add_argument("--smoke", action="store_true", help="a minute's run that only shows that everything works")
    arguments = parser.parse_args(argv)

    try:
        from fastqadapter.demo import run
    except ModuleNotFoundError as error:
        raise ArgumentError(f'the demo needs {error.name}: pip install "fastqadapter[demo]"') from None
    from fastqadapter.demo.smollm import demo_model_folder

    folder = str(demo_model_folder()) if arguments.model is None else arguments.model
    model, tokenizer = load_model_and_tokenizer(ModelArguments(folder, dtype="bfloat16"))
    if tokenizer.chat_template is None:
        raise ArgumentError(f"model={folder!r} has no chat template; the demo needs an instruction-tuned model")
    output = Path(arguments.output_dir)
    report = run.run_demo(
        model,
        tokenizer,
        output,
        kv_mode=arguments.kv_mode,
        seed=arguments.seed,
        size=run.SMOKE if arguments.smoke else run.FULL,
    )
    print(run.format_report(report, output))
