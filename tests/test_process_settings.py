"""What importing the package does to the process: OpenMP's waiting, malloc's keeping."""

import os
import platform
import subprocess
import sys

import pytest

REPO_ENTRIES = ("stages.train", "stages.encoders", "pipeline.cli", "benchmarks.ablate")
# Frees and takes a large tensor again and again; prints the pages that were cleared for it, less the first times.
TENSORS = """
import {first}
import resource, torch
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.set_num_threads(1)
for _ in range(16):
    torch.empty(1 << 24).fill_(1)
before = faults()
for _ in range(8):
    torch.empty(1 << 24).fill_(1)
print(faults() - before)
"""


def run(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("OMP_")}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment | variables, capture_output=True, text=True, check=True)


@pytest.mark.parametrize("entry", REPO_ENTRIES)
def test_every_entry_settles_openmp_before_torch_reads_it(entry):
    """OMP_DISPLAY_ENV makes the library itself say what it read."""
    said = run(f"import {entry}, torch", OMP_DISPLAY_ENV="TRUE").stderr
    policies = [line for line in said.splitlines() if "OMP_WAIT_POLICY" in line]
    if not policies:
        pytest.skip("this torch's OpenMP does not display its environment")
    assert all("PASSIVE" in line for line in policies)


def test_a_users_own_policy_stays():
    assert (
        run("import pipeline, os; print(os.environ['OMP_WAIT_POLICY'])", OMP_WAIT_POLICY="ACTIVE").stdout == "ACTIVE\n"
    )


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc is settled")
def test_a_freed_tensors_pages_are_not_cleared_again():
    """64 MiB eight times over are 131,072 pages, or with huge ones 256."""
    kept, returned = (int(run(TENSORS.format(first=first)).stdout) for first in ("pipeline", "torch"))
    assert kept < 64 < returned
