"""The command `fastqadapter`: demo | train | generate | eval | export-vllm | serve | bench | env.

A user's mistake is one line on stderr and exit code 2.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import warnings
from collections.abc import Sequence

TRACEBACK_VARIABLE = "FASTQADAPTER_TRACEBACK"
COMMANDS = {
    "demo": "train a Q-Adapter on a small real model and show before and after",
    "train": "train a Q-Adapter on preference pairs",
    "generate": "generate with the customised policy: a prompt, a file of prompts, or a chat",
    "eval": "measure what adapters have learned and what the model has forgotten, for many dials",
    "export-vllm": "write a folder that vLLM serves: a base model with its adapters",
    "serve": "serve such a folder: an OpenAI-compatible server, by vLLM",
    "bench": "measure training, loss and generation against other ways to do the same",
    "env": "print the installation: versions, devices, backends",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit code: 0, 1 (training stopped, or an error of ours), 2 (wrong use), 130
    (interrupted) or 141 (the reader of the output has gone)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from fastqadapter import __version__

        print(f"fastqadapter {__version__}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        return _fail(f"unknown command {name!r}: use one of {', '.join(COMMANDS)}")
    _quieten()
    try:
        importlib.import_module(f"fastqadapter.commands.{name.replace('-', '_')}").main(rest)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head`: who read our output has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        return _fail(f"fastqadapter {name}: interrupted", code=130)
    except Exception as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        if isinstance(error, (ValueError, OSError, ImportError)):
            return _fail(f"fastqadapter {name}: {_one_line(error)}")
        if type(error).__name__ == "NonFiniteLossError":  # by name: importing it would import torch
            return _fail(f"fastqadapter {name}: {_one_line(error)}", code=1)
        hint = f"{TRACEBACK_VARIABLE}=1 shows where"
        return _fail(f"fastqadapter {name}: {type(error).__name__}: {_one_line(error)} ({hint})", code=1)
    return 0


def _usage() -> str:
    lines = [f"  {name:<13}{text}" for name, text in COMMANDS.items()]
    return "\n".join(["usage: fastqadapter COMMAND [options]    (COMMAND --help lists them)", "", *lines])


def _quieten() -> None:
    """Our own notices and warnings as plain lines; the libraries' deprecation notices are not for the user."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("fastqadapter").setLevel(logging.INFO)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _fail(message: str, code: int = 2) -> int:
    print(message, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
