"""Run a script without the suite's run-time type checks: they wrap functions, which compilers cannot read."""

import os
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent


def run(script: str, **environment: str) -> None:
    """In a process of its own, in the repository's root; it must print "equal" and nothing else."""
    variables = {**os.environ, **environment, "PYTHONPATH": os.pathsep.join([str(REPO), *sys.path])}
    done = subprocess.run([sys.executable, "-c", script], env=variables, cwd=REPO, capture_output=True, text=True)
    assert done.stdout == "equal\n", done.stderr
