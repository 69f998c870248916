"""Mistakes on the command line in one line; imports nothing of Hugging Face, so `env` works where that is missing."""

from __future__ import annotations

import argparse
import re
from typing import NoReturn


class ArgumentError(ValueError):
    """A mistake on the command line; the message is one line."""


# argparse takes -1 and -0.5 for values, but -1e-5 and -inf for options.
NEGATIVE_NUMBER = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$|-inf$|-nan$", re.IGNORECASE)


class OneLineParser(argparse.ArgumentParser):
    """argparse without the page of usage before an error."""

    def error(self, message: str) -> NoReturn:
        raise ArgumentError(f"{message} (--help lists the options)")
