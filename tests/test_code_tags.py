"""A cache is only as good as its keys: code that decides bytes must not change behind an unchanged code tag."""

import json

import pytest
from closure import RECORD, module

from pipeline.chain import SHARD_STAGES, shard_stage
from pipeline.source_code import code_digest


@pytest.mark.parametrize("name", SHARD_STAGES)
def test_changed_code_has_a_new_code_tag_or_a_waiver(name):
    recorded = json.loads(RECORD.read_text())[name]
    same_code, tag = code_digest(module(name)) == recorded["code"], shard_stage(name).code_tag
    assert same_code and tag == recorded["code_tag"], (
        f"code that the {name} stage imports has changed. If its payloads' bytes change, raise code_tag in "
        f"{module(name)}; then, or if they do not, record the new code with `python tests/closure.py --waive {name}`"
    )
