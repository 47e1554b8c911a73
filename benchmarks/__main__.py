"""`python -m benchmarks [NAME...]`: run the benchmarks, each a `bench_<name>.py`, in a process of its own.

Threads, memory and what is compiled are then each one's alone. Those after one that breaks run too; the exit status is
then 1.
"""

import subprocess
import sys
import time
from pathlib import Path

names = sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))
asked = sys.argv[1:] or names
if unknown := sorted(set(asked) - set(names)):
    sys.exit(f"error: no benchmark {unknown[0]!r}; there are {', '.join(names)}")
broken = []
for name in asked:
    print(f"\n== {name}", flush=True)
    started = time.perf_counter()
    if subprocess.run([sys.executable, "-m", f"benchmarks.bench_{name}"]).returncode:
        broken.append(name)
    print(f"({name}: {(time.perf_counter() - started) / 60:.1f} minutes)", flush=True)
sys.exit(f"error: broken: {', '.join(broken)}" if broken else 0)
