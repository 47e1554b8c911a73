"""`python -m pipeline.cli`: the console script where it is not on the path."""

import sys

from pipeline.cli import main

sys.exit(main())
