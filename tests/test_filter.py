"""The filter and index stages on small shards: verdicts, bad captions, keys, the index against a dict of lists."""

import json
import pickle
from collections import defaultdict
from random import Random

import nltk
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from filter_cases import BLOCK, MACHINE, download, row, shard_of

from pipeline.artifacts.files import BadInput, CorruptPayload
from pipeline.artifacts.shards import SCHEMA
from pipeline.engine import Counts, Task, run
from pipeline.params import ParamsError
from pipeline.project import MissingPayload, Project
from pipeline.text import filtering, index
from pipeline.text.entities import vocabulary
from pipeline.text.filtering import INDEX, STAGE, EntityIndex, kept

CAPTIONS = [
    "a dog and two cats",
    "",
    "  \n ",
    "12 !! 34",
    "dogs",
    "the beauty of nature",
    "a dog and two cats",
    "word " * 60 + "dog",
    "🐕🐕 a happy dog 🎉",
    "كلب صغير في الحديقة",
    "a horse\nnothing to see\nA Boat on a lake",
    "x" * 100_000,
    "dog " * 25_000,
    "two people\x00in a \x1b\x7fcar",
]
REASONS = ["", "empty", "empty", "not_text", "too_short", "no_entity", "duplicate", "too_long", "", "no_entity", ""]
REASONS += ["too_short", "too_long", ""]


def table(project: Project, at: int = 0) -> pa.Table:
    return pq.read_table(project.inputs("filter")[at][1] / "rows.parquet")


def test_every_row_has_a_verdict_and_stays(tmp_path) -> None:
    rows = [*shard_of(CAPTIONS), row(99, "a dog", "x", status="failed_to_download")]
    project = download(tmp_path, {"00000": rows})
    manifest = run(STAGE, project)
    found = table(project)
    assert found["reason"].to_pylist() == REASONS
    assert found["status"].to_pylist() == ["rejected" if reason else "kept" for reason in REASONS]
    assert found["key"].to_pylist() == [f"{at:09d}" for at in range(len(CAPTIONS))]
    assert (manifest.rows[0].rows_in, manifest.rows[0].rows) == (len(CAPTIONS), REASONS.count(""))
    classes = vocabulary("cc4m").classes
    names = [[classes[number] for number in part] for part in found["entities"].to_pylist()]
    assert names[0] == ["dog", "cat"]
    assert names[10] == ["horse", "boat"]
    assert names[13] == ["people", "car"]
    assert found["nouns"].to_pylist()[0] == ["dog", "cat"]
    assert kept(project.inputs("filter")[0][1])["key"].to_pylist() == [
        key for key, reason in zip(found["key"].to_pylist(), REASONS, strict=True) if not reason
    ]
    assert kept(project.inputs("filter")[0][1]).column_names == ["key", "uid", "nouns", "entities"]


def test_an_unknown_vocabulary_is_named_by_its_key(tmp_path) -> None:
    project = download(tmp_path, {"00000": shard_of(["a dog"])}, vocabulary="foo")
    with pytest.raises(ParamsError, match="filter.vocabulary: unknown vocabulary 'foo': choose 'cc4m'"):
        STAGE.tasks(project)


def test_reasons_and_the_tagger_are_counted(tmp_path) -> None:
    project = download(tmp_path, {"00000": shard_of(CAPTIONS)})
    manifest = run(STAGE, project)
    about = project.store.describe("filter", manifest.rows[0].key)
    assert about is not None
    detail = about["counts"]["detail"]
    assert detail["reason: too_long"] == 2 and detail["reason: duplicate"] == 1
    assert detail["tagger: textblob"] == len(CAPTIONS)
    assert about["fields"]["params"]["tagger"] == "textblob"


def test_null_and_invalid_captions(tmp_path) -> None:
    rows = [row(at, "a dog", str(at)) for at in range(3)]
    project = download(tmp_path, {"00000": rows})
    path = project.inputs("download")[0][1] / "00000.parquet"
    raw = pa.array([None, b"a \xff\xfe dog", b"\xc3\x28"], pa.binary())
    torn = pa.StringArray.from_buffers(3, raw.buffers()[1], raw.buffers()[2], raw.buffers()[0])
    whole = pq.read_table(path)
    changed = whole.set_column(whole.schema.get_field_index("caption"), "caption", torn)
    pq.write_table(changed.cast(SCHEMA), path)
    out = tmp_path / "out"
    out.mkdir()
    config = project.config("filter", filtering.Config)
    source = filtering.tagging.resolve("textblob")
    args = filtering._Args(path.parent, config, vocabulary("cc4m"), source, None)
    counts = STAGE.compute(Task(shard="00000", fields={}, args=args, rows=3), out, MACHINE)
    assert pq.read_table(out / "rows.parquet")["reason"].to_pylist() == ["empty", "", "not_text"]
    assert counts.failed == 2


@pytest.mark.parametrize(("rule", "rejected"), [("keep", []), ("pair", [3]), ("image", [2, 3]), ("caption", [1, 3])])
def test_duplicates(tmp_path, rule: str, rejected: list[int]) -> None:
    rows = [row(0, "a dog", "i"), row(1, "a dog", "j"), row(2, "the dog", "i"), row(3, "a dog", "i")]
    project = download(tmp_path, {"00000": rows, "00001": rows}, duplicates=rule)
    run(STAGE, project)
    for at in (0, 1):  # each shard on its own
        reasons = table(project, at)["reason"].to_pylist()
        assert [number for number, reason in enumerate(reasons) if reason] == rejected


def test_a_rejected_row_is_no_original(tmp_path) -> None:
    rows = [row(0, "dog", "i"), row(1, "a dog", "i"), row(2, "a dog", "i")]
    project = download(tmp_path, {"00000": rows}, duplicates="image")
    run(STAGE, project)
    assert table(project)["reason"].to_pylist() == ["too_short", "", "duplicate"]


def test_an_empty_shard(tmp_path) -> None:
    project = download(tmp_path, {"00000": [row(0, "a dog", "i", status="failed_to_download")]})
    assert run(STAGE, project).totals["rows"] == 0
    assert run(INDEX, project).totals["rows"] == 0
    assert EntityIndex.open(project.inputs("index")[0][1]).rows("dog").shape == (0, 2)


def test_keys_follow_inputs_params_and_the_tagger(tmp_path, real_data, monkeypatch) -> None:
    project = download(tmp_path, {"00000": shard_of(CAPTIONS)})
    first = run(STAGE, project)
    assert run(STAGE, project).rows == first.rows
    assert "nouns" not in STAGE.key_fields(STAGE.tasks(project)[0])["params"]  # as before there was a choice
    for change in ({"min_words": 1}, {"mode": "exact"}, {"require_entity": False}, {"nouns": "groupvit"}):
        other = Project(tmp_path, {"filter": {**BLOCK, **change}}, MACHINE)
        assert STAGE.key(STAGE.tasks(other)[0]) != first.rows[0].key
    auto = Project(tmp_path, {"filter": {**BLOCK, "tagger": "auto"}}, MACHINE)
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    assert STAGE.key(STAGE.tasks(auto)[0]) == first.rows[0].key
    monkeypatch.setattr(nltk.data, "path", [str(real_data / "nltk_data")])
    assert STAGE.key(STAGE.tasks(auto)[0]) != first.rows[0].key
    again = run(STAGE, auto)
    about = project.store.describe("filter", again.rows[0].key)
    assert about is not None and about["counts"]["detail"]["tagger: nltk"] == len(CAPTIONS)


def test_groupvits_nouns_are_tokens_as_they_stand(tmp_path) -> None:
    project = download(tmp_path, {"00000": shard_of(["Dogs chase Dogs"])}, nouns="groupvit")
    run(STAGE, project)
    assert table(project)["nouns"].to_pylist() == [["Dogs", "chase", "Dogs"]]


def test_a_lost_download_stops_it(tmp_path) -> None:
    project = download(tmp_path, {"00000": shard_of(CAPTIONS)})
    (project.inputs("download")[0][1] / "00000.parquet").unlink()
    with pytest.raises(MissingPayload, match="tessera verify --repair download"):
        run(STAGE, project)


def random_shards(shards: int, rows: int) -> dict[str, list[dict]]:
    draw = np.random.default_rng(0)
    words = ["dog", "cat", "car", "man", "woman", "bus", "sky", "TV", "hotel"]
    made = {}
    for shard in range(shards):
        captions = [" and ".join(draw.choice(words, int(draw.integers(1, 5)))) + " today" for _ in range(rows)]
        made[f"{shard:05d}"] = [row(at, text, f"{shard} {at}") for at, text in enumerate(captions)]
    return made


def test_index_equals_a_dict_of_lists(tmp_path) -> None:
    project = download(tmp_path, random_shards(3, 200))
    run(STAGE, project)
    manifest = run(INDEX, project)
    expected, rows = defaultdict(list), 0
    classes = vocabulary("cc4m").classes
    for position, (_, folder) in enumerate(project.inputs("filter")):
        lists = kept(folder)["entities"].to_pylist()
        rows += len(lists)
        for at, entities in enumerate(lists):
            for number in entities:
                expected[classes[number]].append([position, at])
    opened = EntityIndex.open(project.inputs("index")[0][1])
    assert manifest.totals["rows"] == rows
    assert opened.shards == ("00000", "00001", "00002")
    for name, count in zip(opened.classes, opened.counts, strict=True):
        assert opened.rows(name).tolist() == expected[name]
        assert count == len(expected[name])
    assert opened.rows("house").dtype == np.int32 and len(opened.rows("house")) > 20
    assert isinstance(opened.rows("dog").base, np.memmap)
    with pytest.raises(KeyError, match="unicorn"):
        opened.rows("unicorn")


def test_partners_share_an_entity_and_every_one_is_drawn(tmp_path) -> None:
    project = download(tmp_path, random_shards(2, 60))
    run(STAGE, project)
    run(INDEX, project)
    opened = EntityIndex.open(project.inputs("index")[0][1])
    wanted = [opened.classes.index("dog"), opened.classes.index("bus")]
    allowed = {(number, *each) for number in wanted for each in opened.rows(number).tolist()}
    generator = Random(1)
    drawn = [opened.partner(wanted, "f" * 16, generator) for _ in range(3000)]
    assert set(drawn) == allowed
    again = Random(1)
    assert drawn == [opened.partner(wanted, "f" * 16, again) for _ in range(3000)]


def test_a_sample_is_its_own_partner_only_where_it_is_alone(tmp_path) -> None:
    project = download(tmp_path, {"00000": shard_of(["a cat here", "two dogs", "one dog", "dogs at home"])})
    run(STAGE, project)
    run(INDEX, project)
    opened = EntityIndex.open(project.inputs("index")[0][1])
    generator, uids = Random(0), table(project)["uid"].to_pylist()
    cat, dog = (opened.classes.index(name) for name in ("cat", "dog"))
    assert opened.partner([cat], uids[0], generator) == (cat, 0, 0)
    drawn = [opened.partner([dog], uids[2], generator)[2] for _ in range(4000)]
    assert set(drawn) == {1, 3} and 1800 < drawn.count(1) < 2200  # both alike: 2000 +- 6 standard deviations


def test_the_index_says_where_the_images_of_kept_rows_lie(tmp_path) -> None:
    captions = ["two dogs", "12 !! 34", "a cat here", "one dog"]
    project = download(tmp_path, {"00000": shard_of(captions), "00001": shard_of(["nothing", *captions])})
    run(STAGE, project)
    run(INDEX, project)
    opened = EntityIndex.open(project.inputs("index")[0][1])
    for position, (_, folder) in enumerate(project.inputs("download")):
        rows = {row["key"]: row for row in pq.read_table(folder / f"{opened.shards[position]}.parquet").to_pylist()}
        keys = kept(project.inputs("filter")[position][1])["key"].to_pylist()
        assert keys and len(keys) < len(rows)
        for number, key in enumerate(keys):
            expected = tuple(rows[key][name] for name in ("offset", "size", "height", "width"))
            assert opened.place(position, number) == expected and expected[0] > 0
    sent = pickle.dumps(opened)
    assert len(sent) < 1000, "it travels as its folder's name"
    assert pickle.loads(sent).place(1, 1) == opened.place(1, 1)


def test_the_index_follows_the_images(tmp_path) -> None:
    made = []
    for width in (8, 12):
        rows = [{**row, "width": width} for row in shard_of(["two dogs", "one dog"])]
        project = download(tmp_path / str(width), {"00000": rows})
        made.append([run(stage, project).rows[0] for stage in (STAGE, INDEX)])
    (small, of_small), (large, of_large) = made
    assert small.out == large.out and of_small.key != of_large.key


def test_index_is_the_same_bytes_again(tmp_path) -> None:
    shards = random_shards(2, 50)
    outs = []
    for name in ("one", "two"):
        project = download(tmp_path / name, shards)
        outs.append([stage.rows[0].out for stage in (run(STAGE, project), run(INDEX, project))])
    assert outs[0] == outs[1]


def test_torn_index_is_named(tmp_path) -> None:
    project = download(tmp_path, random_shards(1, 50))
    run(STAGE, project)
    rows = run(INDEX, project).totals["rows"]
    folder = project.inputs("index")[0][1]
    path = folder / "rows.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadInput, match="rows.npy: truncated"):
        EntityIndex.open(folder)
    path.write_bytes(whole)
    places = np.load(folder / "places.npy")
    np.save(folder / "places.npy", places[1:])
    with pytest.raises(BadInput, match=rf"places.npy: \({rows - 1},\) where {rows} rows are kept.*--repair index"):
        EntityIndex.open(folder)
    np.save(folder / "places.npy", places)
    index.check_index(folder, rows)
    with pytest.raises(CorruptPayload, match=f"{rows} rows where {rows - 1}"):
        index.check_index(folder, rows - 1)
    about = json.loads((folder / "vocabulary.json").read_text())
    about["counts"][about["classes"].index("dog")] += 1
    (folder / "vocabulary.json").write_text(json.dumps(about))
    with pytest.raises(CorruptPayload, match="'dog' is not whole"):
        index.check_index(folder, rows)


def test_check_reads_the_table_back(tmp_path) -> None:
    project = download(tmp_path, {"00000": shard_of(CAPTIONS)})
    run(STAGE, project)
    found = table(project)
    good = Counts(rows_in=len(CAPTIONS), rows=REASONS.count(""), failed=len(CAPTIONS) - REASONS.count(""))
    for name, change in {
        "good": found,
        "short": found.slice(1),
        "unordered": pa.concat_tables([found.slice(1), found.slice(0, 1)]),
        "silent": found.set_column(3, "reason", pa.array([""] * found.num_rows)),
    }.items():
        folder = tmp_path / name
        folder.mkdir()
        filtering.write_table(folder / "rows.parquet", change)
        if name == "good":
            STAGE.check(folder, good)
        else:
            with pytest.raises(CorruptPayload):
                STAGE.check(folder, good)
