"""The recorded code of the shard stages (see test_code_tags.py).

`python tests/closure.py STAGE` lists the files that a stage imports; `python tests/closure.py --waive STAGE...` records
today's code for stages (or `all`) whose bytes a change of code did not change.
"""

import json
import sys

from pipeline.chain import SHARD_STAGES, shard_stage
from pipeline.source_code import REPO, closure, code_digest

RECORD = REPO / "tests" / "code_tags.json"


def module(stage: str) -> str:
    """The module that holds a shard stage's `ShardStage`."""
    return SHARD_STAGES[stage].split(":")[0]


def waive(names: list[str]) -> None:
    """Record code tag and digest of the named stages; the others keep theirs."""
    entries = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    entries |= {n: {"code_tag": shard_stage(n).code_tag, "code": code_digest(module(n))} for n in names}
    RECORD.write_text(json.dumps(dict(sorted(entries.items())), indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1] == "--waive":
        waive(list(SHARD_STAGES) if sys.argv[2:] == ["all"] else sys.argv[2:])
    else:
        print("\n".join(sorted(str(path.relative_to(REPO)) for path in closure(module(sys.argv[1])))))
