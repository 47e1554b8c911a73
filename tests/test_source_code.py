"""A digest of code follows what the code does, through everything it imports, and nothing else."""

import pytest

from pipeline import source_code

MODULE = '''"""What it is."""

from pipeline.below import value


def double() -> int:
    """Twice."""
    return 2 * value  # a comment
'''


@pytest.fixture
def tree(tmp_path, monkeypatch):
    monkeypatch.setattr(source_code, "REPO", tmp_path)
    folder = tmp_path / "pipeline"
    folder.mkdir()
    (folder / "below.py").write_text("value = 1\n")
    (folder / "beside.py").write_text("other = 1\n")
    (folder / "top.py").write_text(MODULE)
    return folder


def digest() -> str:
    source_code._tree.cache_clear()
    source_code._meaning.cache_clear()
    return source_code.code_digest("pipeline.top")


@pytest.mark.parametrize(
    ("file", "old", "new", "same"),
    [
        ("top.py", "  # a comment", "", True),
        ("top.py", "Twice.", "Two times.", True),
        ("beside.py", "1", "2", True),
        ("top.py", "2 *", "3 *", False),
        ("below.py", "1", "2", False),
    ],
)
def test_what_changes_a_digest(tree, file, old, new, same):
    before = digest()
    text = (tree / file).read_text()
    assert old in text
    (tree / file).write_text(text.replace(old, new))
    assert (digest() == before) is same


def test_an_unknown_module_is_an_error(tree):
    with pytest.raises(ModuleNotFoundError, match="nowhere"):
        source_code.code_digest("pipeline.nowhere")
