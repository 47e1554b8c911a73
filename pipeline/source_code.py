"""Which files of the project a module imports, however deep, and a digest of what their code says.

Imports inside functions count, as do the packages above a module. Comments, docstrings and layout do not change a
digest; nor does the machinery, which runs shards and reads settings but decides no bytes.
"""

import ast
from functools import cache
from pathlib import Path

from pipeline.artifacts.files import digest

REPO = Path(__file__).resolve().parent.parent
PACKAGES = ("pipeline", "stages")
MACHINERY = {REPO / "stages/__init__.py", REPO / "pipeline/__init__.py"} | {
    REPO / f"pipeline/{name}.py"
    for name in (
        "engine",
        "runners",
        "flows",
        "serving",
        "store",
        "project",
        "remote",
        "machine",
        "params",
        "chain",
        "source_code",
    )
}


def module_file(name: str) -> Path | None:
    """The file of a module of this project, or None."""
    path = REPO.joinpath(*name.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> set[str]:
    """Names of the project's modules that a file imports, parents of packages included."""
    names: set[str] = set()
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    ours = {name for name in names if name.split(".")[0] in PACKAGES and module_file(name)}
    return ours | {name.rsplit(".", depth)[0] for name in ours for depth in range(1, name.count(".") + 1)}


def closure(*roots: str) -> set[Path]:
    """Files that the named modules import, themselves included."""
    found: set[Path] = set()
    waiting = list(roots)
    while waiting:
        path = module_file(waiting.pop())
        if path is not None and path not in found:
            found.add(path)
            waiting += imports(path)
    return found


def code_digest(*roots: str) -> str:
    """Digest of the code of the modules' closure, less the machinery.

    Raises:
        ModuleNotFoundError: a root is no module of this project.
    """
    for root in roots:
        if module_file(root) is None:
            raise ModuleNotFoundError(f"no module {root} in {REPO}")
    files = sorted(closure(*roots) - MACHINERY)
    return digest({path.relative_to(REPO).as_posix(): _meaning(path) for path in files})


@cache
def _meaning(path: Path) -> str:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)
