"""Names in backticks that docstrings send their reader to are there."""

import ast
import re
from importlib import import_module
from importlib.util import find_spec

import pytest

from pipeline.source_code import REPO

FILES = sorted((REPO / "pipeline").rglob("*.py"))
OWNERS = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def docstrings(tree: ast.Module) -> str:
    return "\n".join(ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, OWNERS))


def is_there(name: str) -> bool:
    """A module, or an attribute of one; the last part that is a module is imported."""
    parts = name.split(".")
    for depth in range(len(parts), 0, -1):
        module = ".".join(parts[:depth])
        try:
            found = find_spec(module)
        except ModuleNotFoundError:
            continue
        if found is not None:
            place = import_module(module)
            for part in parts[depth:]:
                if not hasattr(place, part):
                    return False
                place = getattr(place, part)
            return True
    return False


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(REPO / "pipeline")))
def test_names_in_docstrings_are_there(path):
    text = path.read_text(encoding="utf-8")
    said = docstrings(ast.parse(text))
    dotted = re.findall(r"`(pipeline(?:\.\w+)+)`", said)
    assert [name for name in dotted if not is_there(name)] == []
    private = re.findall(r"`(_[a-z]\w+)`", said)
    assert [name for name in private if len(re.findall(rf"\b{name}\b", text)) <= said.count(f"`{name}`")] == []
