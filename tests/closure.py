"""Which files of the project a module imports, however deep; and whether their code has changed.

`python tests/closure.py STAGE` lists a stage's closure, `python tests/closure.py --waive STAGE...` records today's code
for stages whose bytes a change of code did not change (see test_code_tags.py).
"""

import ast
import hashlib
import json
import sys
from functools import cache
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
RECORD = REPO / "tests" / "code_tags.json"
# What runs shards and reads settings decides no bytes.
MACHINERY = {REPO / "stages/__init__.py", REPO / "pipeline/__init__.py"} | {
    REPO / f"pipeline/{name}.py" for name in ("engine", "runners", "store", "project", "machine", "params", "chain")
}


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def module_file(name: str) -> Path | None:
    """The file of a module of this project, or None."""
    path = REPO.joinpath(*name.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


def imports(path: Path) -> set[str]:
    """Names of the project's modules that a file imports, inside functions as well; parents of packages included."""
    names: set[str] = set()
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    ours = {name for name in names if name.split(".")[0] in ("pipeline", "stages") and module_file(name)}
    return ours | {name.rsplit(".", depth)[0] for name in ours for depth in range(1, name.count(".") + 1)}


def closure(*roots: str) -> set[Path]:
    """Files that the named modules import, themselves included."""
    found, waiting = set(), list(roots)
    while waiting:
        path = module_file(waiting.pop())
        if path is not None and path not in found:
            found.add(path)
            waiting += imports(path)
    return found


def code_digest(stage_module: str) -> str:
    """Digest of the code that decides a stage's bytes; comments, docstrings and layout do not count."""
    lines = []
    for path in sorted(closure(stage_module) - MACHINERY):
        lines.append(f"{path.relative_to(REPO).as_posix()} {ast.dump(_without_docstrings(_tree(path)))}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    return tree


def record(stages: dict[str, tuple[int, str]]) -> None:
    """Write code tag and digest of each stage."""
    entries = {name: {"code_tag": tag, "code": digest} for name, (tag, digest) in sorted(stages.items())}
    RECORD.write_text(json.dumps(entries, indent=1) + "\n")


if __name__ == "__main__":
    sys.path.insert(0, str(REPO))
    from pipeline.chain import SHARD_STAGES, shard_stage

    if sys.argv[1] == "--waive":
        known = json.loads(RECORD.read_text()) if RECORD.exists() else {}
        names = list(SHARD_STAGES) if sys.argv[2:] == ["all"] else sys.argv[2:]
        entries = {name: (entry["code_tag"], entry["code"]) for name, entry in known.items()}
        entries |= {n: (shard_stage(n).code_tag, code_digest(SHARD_STAGES[n].split(":")[0])) for n in names}
        record(entries)
    else:
        print("\n".join(sorted(str(path.relative_to(REPO)) for path in closure(sys.argv[1]))))
