"""`python -m benchmarks [NAME...]`: run the benchmarks, each a `bench_<name>.py` with a `main()`.

Those after one that breaks run too; the exit status then is 1.
"""

import sys
import traceback
from importlib import import_module
from pathlib import Path

names = sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))
asked = sys.argv[1:] or names
if unknown := sorted(set(asked) - set(names)):
    sys.exit(f"error: no benchmark {unknown[0]!r}; there are {', '.join(names)}")
sys.argv = sys.argv[:1]
broken = []
for name in asked:
    print(f"\n== {name}", flush=True)
    try:
        import_module(f"benchmarks.bench_{name}").main()
    except Exception:
        traceback.print_exc()
        broken.append(name)
sys.exit(f"error: broken: {', '.join(broken)}" if broken else 0)
