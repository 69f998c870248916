"""`python -m fastqadapter` is the command `fastqadapter`."""

import sys

from fastqadapter.cli import main

sys.exit(main())
