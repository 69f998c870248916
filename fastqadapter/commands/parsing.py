"""Mistakes on the command line in one line; imports nothing of Hugging Face, so `env` works where that is missing."""

from __future__ import annotations

import argparse
from typing import NoReturn


class ArgumentError(ValueError):
    """A mistake on the command line; the message is one line."""


class OneLineParser(argparse.ArgumentParser):
    """argparse without the page of usage before an error."""

    def error(self, message: str) -> NoReturn:
        raise ArgumentError(f"{message} (--help lists the options)")
