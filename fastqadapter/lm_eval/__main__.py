"""`python -m fastqadapter.lm_eval` is lm-eval's own command line, with the model `qadapter` known to it."""

from __future__ import annotations

import os
import sys

MODEL_NAME = "qadapter"


def main() -> int:
    """Run lm-eval; a mistake in our arguments is one line on stderr and exit code 2."""
    try:
        from lm_eval.__main__ import cli_evaluate
        from lm_eval.api.registry import register_model
    except ImportError as error:
        print(f'lm-eval cannot be imported ({error}): pip install "fastqadapter[eval]"', file=sys.stderr)
        return 2
    from fastqadapter.lm_eval.model import QAdapterLM

    register_model(MODEL_NAME)(QAdapterLM)
    try:
        cli_evaluate()
    except (ValueError, OSError) as error:  # lm-eval's own too, of a task that it does not know
        if os.environ.get("FASTQADAPTER_TRACEBACK"):  # as the command line `fastqadapter` has it
            raise
        print(f"{MODEL_NAME}: {' '.join(str(error).split())[:500]}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
