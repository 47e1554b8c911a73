"""Download from lists that name their own rejects, and from several lists at once."""

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
import yfcc15m_cases as yfcc
from download_project import DOWNLOAD, encode, payload, picture, project, public_web

from pipeline import params
from pipeline.artifacts.files import BadInput
from pipeline.artifacts.manifest import Manifest
from pipeline.artifacts.shards import SUCCESS, make_uid, read_rows
from pipeline.engine import run
from pipeline.machine import Machine
from pipeline.params import ParamsError
from pipeline.project import Project
from pipeline.source_code import REPO
from pipeline.sources import download
from pipeline.sources.annotations import read_slice
from pipeline.sources.download import REJECTED, STAGE, Config

IMAGE = encode(picture(), quality=95)


class Web(BaseHTTPRequestHandler):
    """A picture at every path; `asked` holds the paths."""

    asked: list[str] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(IMAGE)

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def web_host(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """`127.0.0.1:<port>`, which the stage may ask as if it were public."""
    Web.asked = []
    with public_web(Web, monkeypatch) as host:
        yield host


def keys(chain: Project) -> dict[str, str]:
    return {task.shard: STAGE.key(task) for task in STAGE.tasks(chain)}


def rows_of(chain, shard: str = "00000") -> list[dict]:
    return read_rows(payload(chain, shard) / f"{shard}.parquet").to_pylist()


def test_a_rejected_row_is_recorded_and_its_image_not_asked_for(web_host: str, tmp_path: Path) -> None:
    folder = tmp_path / "redcaps"
    folder.mkdir()
    notes = [
        {"url": f"http://{web_host}/1.jpg", "caption": "a dog"},
        {"url": f"http://{web_host}/2.jpg"},
        {"url": f"http://{web_host}/3.jpg", "caption": "a cat"},
    ]
    (folder / "dogs_2019.json").write_text(json.dumps({"annotations": notes}))
    chain = project(tmp_path, source="redcaps", annotations="redcaps")
    totals = run(STAGE, chain).totals
    assert (totals["in"], totals["rows"], totals["failed"]) == (3, 2, 1)
    rows = rows_of(chain)
    assert [row["status"] for row in rows] == [SUCCESS, REJECTED, SUCCESS]
    assert rows[1]["error_message"] == "an annotation without url and caption"
    assert rows[1]["url"] == f"http://{web_host}/2.jpg" and sorted(Web.asked) == ["/1.jpg", "/3.jpg"]
    stats = json.loads((payload(chain) / "00000_stats.json").read_text())
    assert stats["status_dict"][rows[1]["error_message"]] == 1
    counts = json.loads((payload(chain) / "payload.json").read_text())["counts"]
    assert counts["detail"] == {"rejected: an annotation without url and caption": 1}


def test_yfcc15m_is_downloaded_and_its_losses_are_rows(web_host: str, tmp_path: Path) -> None:
    folder = yfcc.write(tmp_path / "yfcc", "plain")
    metadata = folder / "yfcc100m_dataset"
    metadata.write_text(metadata.read_text().replace("http://farm8.test", f"http://{web_host}"))
    fields = {"source": "yfcc15m", "annotations": "yfcc", "url_column": "download_url"}
    chain = project(tmp_path, caption_column="description", **fields)
    totals = run(STAGE, chain).totals
    assert (totals["in"], totals["rows"], totals["failed"]) == (len(yfcc.DESCRIPTIONS) + 1, 3, 5)
    assert json.loads((payload(chain) / "payload.json").read_text())["counts"]["detail"] == {
        "rejected: fewer than 2 words in the description": 3,
        "rejected: a video": 1,
        "rejected: no metadata": 1,
    }
    assert sorted(Web.asked) == ["/7205/17_df77.jpg", "/7205/5000000000_df77.jpg", "/7205/9000000001_df77.jpg"]


def test_a_link_is_the_same_sample_whichever_list_names_it(web_host: str, tmp_path: Path) -> None:
    url = f"http://{web_host}/1.jpg"
    (tmp_path / "list.tsv").write_text(f"a dog\t{url}\n")
    (tmp_path / "dogs_2019.json").write_text(json.dumps({"annotations": [{"url": url, "caption": "a dog"}]}))
    uids = []
    for source, annotations in (("urls", "list.tsv"), ("redcaps", ".")):
        chain = project(tmp_path, source=source, annotations=annotations, layout="cc3m")
        run(STAGE, chain)
        uids += [row["uid"] for row in rows_of(chain)]
    assert uids == [make_uid("urls", url, "a dog")] * 2


def part(annotations: str, source: str = "urls", **changes) -> dict:
    """A list of a mix."""
    block = {"source": source, "annotations": annotations, "images": "", "layout": "cc3m"}
    return block | {"url_column": "url", "caption_column": "caption", "limit": None, "weight": 1.0} | changes


@pytest.fixture
def lists(tmp_path: Path) -> Path:
    """Two lists as CC3M and CC12M spell them, and RedCaps' folder, in one folder."""
    folder = tmp_path / "lists"
    (folder / "redcaps").mkdir(parents=True)
    (folder / "cc3m.tsv").write_text("".join(f"three {n}\thttp://a.test/3/{n}\n" for n in range(400)))
    (folder / "cc12m.tsv").write_text("".join(f"http://a.test/12/{n}\ttwelve {n}\n" for n in range(5)))
    notes = [{"url": f"http://a.test/r/{n}", "caption": f"red {n}"} for n in range(7)]
    (folder / "redcaps" / "dogs_2019.json").write_text(json.dumps({"annotations": notes}))
    return tmp_path


def mixed(root: Path, *parts: dict, **changes) -> Project:
    return project(root, source="mix", annotations="lists", mix=list(parts), **changes)


def listed_rows(chain: Project) -> dict[str, list[str]]:
    """Captions by shard, as the stage's tasks would read them."""
    tasks = STAGE.tasks(chain)
    return {task.shard: [row.caption for row in read_slice(task.args.annotations, task.args.part)] for task in tasks}


def test_a_mix_is_its_lists_each_with_shards_of_its_own(lists: Path) -> None:
    cc12m = part("cc12m.tsv", layout="cc12m")
    chain = mixed(lists, cc12m, part("redcaps", "redcaps", limit=4), rows_per_shard=3)
    assert listed_rows(chain) == {
        "00000": ["twelve 0", "twelve 1", "twelve 2"],
        "00001": ["twelve 3", "twelve 4"],
        "10000": ["red 0", "red 1", "red 2"],
        "10001": ["red 3"],
    }


def test_a_list_in_a_mix_has_the_keys_that_it_has_alone(lists: Path) -> None:
    alone = project(lists, source="urls", annotations="lists/cc12m.tsv", layout="cc12m", rows_per_shard=3)
    cc12m, redcaps = part("cc12m.tsv", layout="cc12m"), part("redcaps", "redcaps")
    both = keys(mixed(lists, cc12m, redcaps, rows_per_shard=3))
    assert {shard: key for shard, key in both.items() if shard < "10000"} == keys(alone)
    shorter = keys(mixed(lists, cc12m | {"limit": 3}, redcaps, rows_per_shard=3))
    assert {shard: both[shard] for shard in both if shard != "00001"} == shorter


def test_a_weight_takes_that_share_and_the_same_rows_every_time(lists: Path) -> None:
    def taken(weight: float, size: int, limit: int | None = None) -> list[str]:
        found = listed_rows(mixed(lists, part("cc3m.tsv", weight=weight, limit=limit), rows_per_shard=size))
        assert [len(rows) for rows in found.values()][:-1] == [size] * (len(found) - 1)
        return [caption for rows in found.values() for caption in rows]

    whole = [f"three {n}" for n in range(400)]
    assert taken(1.0, 64) == whole
    half, most = taken(0.5, 7), taken(0.8, 64)
    assert half == taken(0.5, 64) and half == [caption for caption in whole if caption in set(half)]
    assert 0.4 < len(half) / 400 < 0.6 and 0.7 < len(most) / 400 < 0.9 and set(half) < set(most)
    assert taken(0.5, 64, limit=100) == [caption for caption in half if int(caption.split()[1]) < 100]


def test_a_mix_is_downloaded(web_host: str, lists: Path) -> None:
    (lists / "lists" / "cc3m.tsv").write_text(f"a dog\thttp://{web_host}/1.jpg\n")
    notes = [{"url": f"http://{web_host}/2.jpg", "caption": "a cat"}, {"caption": "lost"}]
    (lists / "lists" / "redcaps" / "dogs_2019.json").write_text(json.dumps({"annotations": notes}))
    chain = mixed(lists, part("cc3m.tsv"), part("redcaps", "redcaps"))
    totals = run(STAGE, chain).totals
    assert (totals["shards"], totals["in"], totals["rows"], totals["failed"]) == (2, 3, 2, 1)
    assert [row["key"] for row in rows_of(chain, "10000")] == ["100000000", "100000001"]
    assert sorted(Web.asked) == ["/1.jpg", "/2.jpg"]


def test_a_mix_that_cannot_be_is_refused(lists: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for change, message in (
        ({"source": "mix", "mix": []}, "download.mix: 0 lists, but download.source is 'mix'"),
        ({"source": "urls", "mix": [part("a.tsv")]}, "download.mix: 1 lists, but download.source is 'urls'"),
        ({"source": "mix", "mix": [part("a.tsv")] * 11}, "download.mix: 11 lists, more than 10"),
        ({"source": "mix", "mix": [part("a.tsv", weight=0.0)]}, r"download.mix\[0\].weight: 0.0 is outside"),
        ({"source": "mix", "mix": [part("a.tsv", "scenes")]}, r"download.mix\[0\].source: 'scenes' is not one of"),
        ({"source": "mix", "mix": [{"source": "urls"}]}, r"download.mix\[0\].annotations: missing key"),
    ):
        with pytest.raises(ParamsError, match=message):
            params.build(Config, DOWNLOAD | change, "download")
    with pytest.raises(BadInput, match="lists/absent.tsv: no such list"):
        STAGE.tasks(mixed(lists, part("absent.tsv")))
    monkeypatch.setattr(download, "LIST_SHARDS", 2)
    with pytest.raises(BadInput, match="more than 2 shards of one list of a mix. Raise download.rows_per_shard"):
        STAGE.tasks(mixed(lists, part("cc12m.tsv", layout="cc12m"), rows_per_shard=2))


def test_the_default_profile_asks_for_the_shards_that_are_committed(monkeypatch: pytest.MonkeyPatch) -> None:
    """New sources and keys of params.yaml must not make anybody download again."""
    machine = Machine(runner="inline", workers=1, device="cpu", threads=1, retries=0)
    chain = Project(REPO, params.read(REPO / "params.yaml"), machine)
    monkeypatch.setattr(Project, "inputs", lambda self, stage: [(row, REPO) for row in self.manifest(stage).rows])
    assert keys(chain) == {row.shard: row.key for row in Manifest.read(chain.manifest_path("download")).rows}


def test_real_lists_in_a_mix(real_data: Path, tmp_path: Path) -> None:
    cc3m = part("cc3m_validation.tsv", weight=0.25)
    alt = part("url_text_10k.parquet", layout="named", url_column="URL", caption_column="TEXT", limit=1000)
    chain = project(
        tmp_path, source="mix", annotations=str(real_data / "captions"), mix=[cc3m, alt], rows_per_shard=900
    )
    rows = {task.shard: task.rows for task in STAGE.tasks(chain)}
    of_cc3m = sum(count for shard, count in rows.items() if shard < "10000")
    assert 0.23 < of_cc3m / 15_833 < 0.27 and (rows["10000"], rows["10001"]) == (900, 100)
