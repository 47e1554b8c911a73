"""Duplicates over all shards and leakage: real photographs, re-encoded and shrunk; pairs against brute force."""

import json
from pathlib import Path

import numpy as np
import pytest
from download_project import DOWNLOAD, encode, payload
from filter_cases import BLOCK
from PIL import Image, ImageFilter

from pipeline import cli
from pipeline.artifacts import decisions
from pipeline.artifacts.files import BadInput
from pipeline.artifacts.tables import read_table
from pipeline.engine import StageFailed, run
from pipeline.machine import Machine
from pipeline.project import Project
from pipeline.reporting import card
from pipeline.reporting.funnel import gather
from pipeline.sources import duplicates
from pipeline.sources.download import STAGE as DOWNLOAD_STAGE
from pipeline.text.filtering import STAGE
from pipeline.text.verdicts import kept

MACHINE = Machine(runner="inline", workers=1, device="cpu", threads=1, retries=0)


def pattern(seed: int, size: int = 64) -> Image.Image:
    """A smooth picture of its own."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(1))


def test_a_look_survives_quality_and_size_and_tells_pictures_apart(real_data) -> None:
    paths = sorted((real_data / "VOCdevkit/VOC2012/JPEGImages").glob("*.jpg"))[:60]
    looks, copies = [], []
    for path in paths:
        image = Image.open(path).convert("RGB")
        looks.append(duplicates.look(path.read_bytes(), path.name))
        copies.append(duplicates.look(encode(image.resize((160, 120)), quality=70), path.name))
    apart = np.bitwise_count(np.array(looks, np.uint64) ^ np.array(copies, np.uint64))
    assert (apart <= 3).mean() > 0.9
    first, second = np.triu_indices(len(paths), 1)
    others = np.bitwise_count(np.array(looks, np.uint64)[first] ^ np.array(looks, np.uint64)[second])
    assert (others <= 3).mean() < 0.001
    assert duplicates.look(encode(Image.new("RGB", (64, 64), "red")), "plain") == 0
    with pytest.raises(BadInput):
        duplicates.look(b"<html>", "page")


@pytest.mark.parametrize("distance", [0, 1, 3, 6])
def test_near_pairs_and_matches_equal_brute_force(distance: int) -> None:
    draw = np.random.default_rng(distance)
    looks = draw.integers(1, 2**63, 60, dtype=np.uint64)
    for row in range(30, 60):  # near copies of the first thirty
        flips = draw.choice(64, int(draw.integers(0, 9)), replace=False)
        looks[row] = looks[row - 30] ^ np.bitwise_or.reduce(
            np.uint64(1) << flips.astype(np.uint64), initial=np.uint64(0)
        )
    looks[[5, 50]] = 0
    apart = np.bitwise_count(looks[:, None] ^ looks[None])
    near = (apart <= distance) & (looks != 0)[:, None] & (looks != 0)[None]
    expected = [next((one for one in range(row) if near[row, one]), -1) for row in range(60)]
    assert duplicates._first_near(looks, distance).tolist() == expected
    assert sum(one >= 0 for one in expected) >= 1
    found = duplicates.matches(looks[30:], looks[:30], distance)
    assert ((found >= 0) == near[30:, :30].any(1)).all()
    assert all(near[30 + row, image] for row, image in enumerate(found.tolist()) if image >= 0)


@pytest.fixture
def chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """Two shards: 0 and 1 differ; 2 is 0's bytes, 3 its re-encoding, 4 repeats 1's caption, 5 is in the benchmark."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    whole = encode(pattern(0), quality=95)
    files = [whole, encode(pattern(1)), whole, encode(pattern(0), quality=60), encode(pattern(4)), encode(pattern(5))]
    captions = ["a dog", "two cats", "a brown dog", "the dog here", "Two cats", "a horse"]
    lines = ["image,caption"]
    for number, (data, caption) in enumerate(zip(files, captions, strict=True)):
        (folder / f"{number}.jpg").write_bytes(data)
        lines.append(f"{number}.jpg,{caption}")
    (tmp_path / "captions.txt").write_text("\n".join(lines) + "\n")
    (tmp_path / "benchmark").mkdir()
    (tmp_path / "benchmark" / "val.png").write_bytes(encode(pattern(5), "PNG"))
    block = DOWNLOAD | {"source": "flickr8k", "annotations": "captions.txt", "images": "pictures", "rows_per_shard": 3}
    project = Project(tmp_path, {"download": block, "filter": {**BLOCK, "duplicates": "keep"}}, MACHINE)
    monkeypatch.setattr("stages.open_project", lambda root: project)
    run(DOWNLOAD_STAGE, project)
    return project


def test_rows_are_marked_and_rejected_only_where_asked(chain: Project, capsys) -> None:
    first = run(STAGE, chain)
    assert cli.main(["duplicates", "--against", str(chain.root / "benchmark")]) == 0
    assert "4 of 6 rows" in capsys.readouterr().out
    table = read_table(decisions.find(chain.root, chain.store.root)[1], decisions.SCHEMA).to_pylist()
    assert [(row["key"], row["decision"]) for row in table] == [
        ("000000002", "image"),
        ("000010000", "near"),
        ("000010001", "caption"),
        ("000010002", "leak"),
    ]
    uids = {row["key"]: row["uid"] for shard in ("00000", "00001") for row in _rows(chain, shard)}
    assert [row["of"] for row in table[:3]] == [uids["000000000"], uids["000000000"], uids["000000001"]]
    assert table[3]["of"].endswith("val.png")
    assert decisions.counts(chain.root) == {"image": 1, "near": 1, "caption": 1, "leak": 1}
    assert run(STAGE, chain).rows == first.rows  # marked, nothing lost, no key changed
    block = chain.params["filter"] | {"reject": ["leak", "near"]}
    strict = Project(chain.root, chain.params | {"filter": block}, MACHINE)
    totals = run(STAGE, strict).totals
    assert (totals["in"], totals["rows"]) == (6, 4)
    left = [key for _, folder in strict.inputs("filter") for key in kept(folder, "key")["key"].to_pylist()]
    assert left == ["000000000", "000000001", "000000002", "000010001"]
    details = [chain.store.describe("filter", row.key)["counts"]["detail"] for row in strict.manifest("filter").rows]
    assert details[1]["reason: duplicate_near"] == details[1]["reason: leak"] == 1
    decisions.find(chain.root, chain.store.root)[1].unlink()
    with pytest.raises(BadInput, match="gone or changed"):
        STAGE.tasks(strict)


def test_decisions_on_other_samples_are_not_applied(chain: Project) -> None:
    block = chain.params["filter"] | {"reject": ["image"]}
    strict = Project(chain.root, chain.params | {"filter": block}, MACHINE)
    assert cli.main(["duplicates"]) == 0
    assert run(STAGE, strict).totals["rows"] == 5
    lines = (chain.root / "captions.txt").read_text().splitlines()
    (chain.root / "captions.txt").write_text("\n".join([lines[0], *reversed(lines[1:])]) + "\n")
    run(DOWNLOAD_STAGE, chain)
    with pytest.raises(StageFailed, match=r"row 000000002 of shard 00000 was another sample.*Run `tessera duplicates`"):
        run(STAGE, strict)
    assert cli.main(["duplicates"]) == 0
    assert run(STAGE, strict).totals["rows"] == 5


def test_the_card_counts_every_row(chain: Project, capsys, monkeypatch) -> None:
    run(STAGE, chain)
    assert cli.main(["duplicates"]) == 0
    made = card.card(chain, gather(chain))
    assert made.lists == {"captions.txt": card.Yield(listed=6, downloaded=6, kept=6)}
    assert dict(zip(card.WORDS, made.words, strict=True)) == dict.fromkeys(card.WORDS, 0) | {2: 6}
    assert dict(zip(card.SIDES, made.sides, strict=True)) == dict.fromkeys(card.SIDES, 0) | {64: 6}
    assert made.repeats == {"image": 1, "near": 1, "caption": 1}
    text = card.text(made)
    assert "captions.txt" in text and "2 to 3" in text and "64 to 127" in text and "near" in text
    assert card._histogram(np.array([0, 1, 2, 3, 4, 127, 128, 999]), card.WORDS).tolist() == [1, 1, 2, 1, 0, 0, 0, 1, 2]
    assert [card._list_of(shard, ["a", "b"]) for shard in ("00007", "10000", "90000")] == ["a", "b", card.RETRIED]
    assert card._list_of("90000", ["a"]) == card.RETRIED
    monkeypatch.setattr("pipeline.chain.SHARD_STAGES", {"download": "pipeline.sources.download:STAGE"})
    capsys.readouterr()
    assert cli.main(["status", "--card"]) == 0
    assert "shorter side of an image" in capsys.readouterr().out
    assert cli.main(["status", "--card", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["card"]["words"][2] == 6


def test_a_card_without_its_shards_is_a_note(chain: Project) -> None:
    data = gather(chain)
    assert card.drawn(chain, data) == card.card(chain, data) and not data.notes
    (payload(chain, "00001") / "00001.parquet").unlink()
    assert card.drawn(chain, data) is None
    assert "card of the data is not drawn" in data.notes[0] and "00001" in data.notes[0]
    chain.manifest_path("download").unlink()
    assert card.drawn(chain, data) is None and len(data.notes) == 1


def _rows(chain: Project, shard: str) -> list[dict]:
    from pipeline.artifacts.shards import read_rows

    return read_rows(payload(chain, shard) / f"{shard}.parquet").to_pylist()


def test_what_cannot_be_compared_is_named(chain: Project, capsys) -> None:
    (chain.root / "empty").mkdir()
    assert cli.main(["duplicates", "--against", str(chain.root / "empty")]) == 1
    assert "no images below it" in capsys.readouterr().err
    assert cli.main(["duplicates", "--distance", "40"]) == 1
    with pytest.raises(BadInput, match="no such file"):
        STAGE.tasks(
            Project(chain.root, chain.params | {"filter": chain.params["filter"] | {"reject": ["url"]}}, MACHINE)
        )
