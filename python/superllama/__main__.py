"""`python -m superllama` is the `superllama` command."""

import sys

from .cli import main

sys.exit(main())
