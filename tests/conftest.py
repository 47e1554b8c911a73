"""Fixtures for the whole suite; jaxtyping annotations of `pipeline` are checked while it runs."""

import os
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

# Before any test imports `pipeline`: every annotated shape is then checked at run time.
install_import_hook("pipeline", "typechecker.check")

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Root of the real photographs, captions and masks; the test skips where they are absent."""
    root = Path(os.environ.get("TESSERA_REAL_DATA", REPO.parent / "shared" / "data"))
    if not root.is_dir():
        pytest.skip(f"no real data at {root}: set TESSERA_REAL_DATA")
    return root
