"""`python -m benchmarks [NAME...]`: run the benchmarks, each a `bench_<name>.py` with a `main()`."""

import sys
from importlib import import_module
from pathlib import Path

names = sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))
asked = sys.argv[1:] or names
if unknown := sorted(set(asked) - set(names)):
    sys.exit(f"error: no benchmark {unknown[0]!r}; there are {', '.join(names)}")
sys.argv = sys.argv[:1]
for name in asked:
    print(f"\n== {name}", flush=True)
    import_module(f"benchmarks.bench_{name}").main()
