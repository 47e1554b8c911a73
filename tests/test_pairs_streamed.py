"""Images that stay in a second store: the same batches as from a disk, and what goes wrong there is said."""

import json
import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path

import fsspec
import pytest
import yaml
from ovsegmentor_cases import make_index
from pair_shards import write_pairs
from sseg_cases import make_project
from store_cases import clone

from pipeline import history, remote
from pipeline.artifacts import urls
from pipeline.artifacts.files import BadInput
from pipeline.artifacts.urls import Unreachable
from pipeline.artifacts.weights import model_digest
from pipeline.datasets import images
from pipeline.datasets.looks import Drawn, Look
from pipeline.datasets.pairs import PairLoader, PairShard, Shuffle, captions
from pipeline.datasets.partners import Partners
from pipeline.project import MissingPayload
from pipeline.trainer import train
from stages import open_project


def put(shard: PairShard, url: str) -> PairShard:
    """The shard with its download in a second store."""
    place = f"{url}/{shard.name}"
    files, root = fsspec.core.url_to_fs(place)
    files.makedirs(root, exist_ok=True)
    for path in Path(shard.download).iterdir():
        files.put_file(str(path), f"{root}/{path.name}")
    return replace(shard, download=place)


def whole(image, out):
    out[: len(image)] = image
    return out


def prepare(sample, rng):
    return Drawn((sample.caption(rng), sample.regions.tolist(), rng.random()), {"": Look(sample.image, 32, whole)})


def collate(items, uids, shown):
    return items, uids, shown[""].images[:, :24].numpy().tobytes()


def loader(shards, **changes):
    settings = {"batch_size": 5, "seed": 7, "threads": 2, "prepare": prepare, "collate": collate}
    return PairLoader(shards, **settings | {"shuffle": Shuffle(block_rows=4, window_blocks=3, weights=None)} | changes)


def content(pairs, count=8):
    """Everything of the first batches."""
    batches = pairs.batches(0)
    found = [(loaded.batch, loaded.position, [uid for uid, _ in loaded.failures]) for loaded in islice(batches, count)]
    batches.close()
    return found


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    root = tmp_path_factory.mktemp("pairs")
    return [write_pairs(root, "00000", 11, rejected=(2, 5), broken=(7,)), write_pairs(root, "00001", 10)]


@pytest.mark.filterwarnings("default")  # botocore's and moto's own
def test_the_batches_of_a_bucket_are_those_of_a_disk(here, s3, monkeypatch):
    away = [put(shard, f"{s3}/store") for shard in here]
    expected = content(loader(here))
    assert any(failures for *_, failures in expected), "a picture that does not decode is left out and listed"
    assert content(loader(away)) == expected
    assert content(loader([here[0], away[1]])) == expected, "one shard here, one there"
    assert captions(away[0]) == captions(here[0])
    fetched = []
    monkeypatch.setattr(
        "pipeline.datasets.images.read_ranges", lambda places: fetched.append(len(places)) or [b""] * len(places)
    )
    batches = loader(away, share=(1, 5), threads=0).batches(0)
    with pytest.raises(BadInput, match="none of the 1 images of a batch decodes"):
        next(batches)
    assert fetched == [1], "of a batch only this process's share is asked for, all of it at once"


def test_workers_read_a_second_store_too(here, tmp_path):
    away = [put(shard, tmp_path.as_uri()) for shard in here]
    assert content(loader(away, workers=2)) == content(loader(here))


def with_partners(shards, index):
    """Pictures of rows and partners in one size, asked for together."""
    partners = Partners(shards, index)

    def prepare(sample, rng):
        partner = partners.draw(sample, rng)
        return Drawn(partner.place, {"own": Look(sample.image, 32, whole), "other": Look(partner.image, 32, whole)})

    def collate(items, uids, shown):
        return items, uids, [pixels.images[:, :24].numpy().tobytes() for pixels in shown.values()]

    return loader(shards, prepare=prepare, collate=collate)


def test_partners_come_from_there_with_the_rows_own_images(here, tmp_path, monkeypatch):
    index = make_index(tmp_path / "index", here, [[[0]] * 9, [[0]] * 10])
    away = [put(shard, tmp_path.as_uri()) for shard in here]
    expected = content(with_partners(here, index))
    asked = []
    read = images.read_ranges
    monkeypatch.setattr(images, "read_ranges", lambda places: asked.append(len(places)) or read(places))
    assert content(with_partners(away, index)) == expected
    assert set(asked) == {10} and len({place for (places, *_), *_ in expected for place in places}) > 10


@pytest.fixture(params=["disk", "bucket"])
def second(request, tmp_path) -> str:
    """URL of a second store: a folder, or a bucket."""
    return tmp_path.as_uri() if request.param == "disk" else request.getfixturevalue("s3")


@pytest.mark.filterwarnings("default")  # botocore's and moto's own
def test_what_cannot_be_read_stops_the_training_and_a_cut_off_picture_does_not(here, second, monkeypatch):
    monkeypatch.setattr(urls, "PAUSES", ())
    away = [put(shard, second) for shard in here]
    files, tar = fsspec.core.url_to_fs(f"{second}/00001/00001.tar")
    files.pipe_file(tar, files.cat_file(tar)[:20_000])
    reasons = [reason for loaded in islice(loader(away).batches(0), 4) for _, reason in loaded.failures]
    assert sum("00001.tar: cut off inside" in reason and "push it from" in reason for reason in reasons) > 2
    files.rm_file(tar)
    with pytest.raises(Unreachable, match=r"00001\.tar: cannot be read .*same command again"):
        content(loader(away))


def test_workers_and_partners_stop_too(here, tmp_path, monkeypatch):
    monkeypatch.setattr(urls, "PAUSES", ())
    away = [put(shard, tmp_path.as_uri()) for shard in here]
    index = make_index(tmp_path / "index", here, [[[0]] * 9, [[0]] * 10])
    for number in range(2):
        (tmp_path / f"0000{number}/0000{number}.tar").unlink()
    with pytest.raises(Unreachable, match=r"\.tar: cannot be read"):
        content(with_partners(away, index))
    with pytest.raises(Unreachable, match=r"\.tar: cannot be read"):
        content(loader(away, workers=1))


class Flaky:
    """A file system of ten bytes that fails the first times, or that knows no parts of files."""

    def __init__(self, failing=0, whole=False):
        self.failing, self.whole, self.asked = failing, whole, []

    def cat_ranges(self, paths, starts, ends, on_error):
        self.asked.append(list(zip(starts, ends, strict=True)))
        self.failing -= 1
        return [self._answer(start, end) for start, end in self.asked[-1]]

    def _answer(self, start, end):
        if self.failing >= 0 and start:
            return OSError("the line is down")
        return b"0123456789"[slice(0, 10) if self.whole else slice(start, end)]


def test_only_what_failed_is_asked_for_again(monkeypatch):
    pauses = []
    monkeypatch.setattr(urls.time, "sleep", pauses.append)
    places = [("x://a", 0, 2), ("x://a", 3, 4), ("x://a", 5, 0)]
    flaky = Flaky(failing=2)
    monkeypatch.setattr(urls, "open_url", lambda url: (flaky, "a"))
    assert urls.read_ranges(places) == [b"01", b"3456", b""]
    assert flaky.asked == [[(0, 2), (3, 7)], [(3, 7)], [(3, 7)]] and pauses == [0, 1, 2]
    flaky = Flaky(failing=99)
    with pytest.raises(Unreachable, match="OSError: the line is down"):
        urls.read_ranges(places)
    assert len(flaky.asked) == 1 + len(urls.PAUSES) and sum(urls.PAUSES) > 60
    flaky = Flaky(whole=True)
    with pytest.raises(BadInput, match="10 bytes came where 2 were asked for: the server gives no parts"):
        urls.read_ranges(places)


@pytest.fixture
def elsewhere(tmp_path) -> tuple[Path, str]:
    """A checkout with everything in its store and in the second one."""
    root, url = make_project(tmp_path / "made", images=80), (tmp_path / "second").as_uri()
    store = open_project(root).store
    remote.push(store, remote.Remote(url), history.current(root), dry_run=False)
    return root, url


def streaming(root: Path, other: Path, url: str) -> Path:
    """A clone without payloads, on a machine that streams."""
    clone(root, other)
    shutil.copytree(root / "models", other / "models")
    shutil.copy(root / "params.yaml", other)
    (other / "machine.yaml").write_text(yaml.safe_dump({"remote": url, "stream": True}))
    return other


def test_a_training_streams_to_the_same_weights(elsewhere, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TESSERA_THREADS", "1")
    root, url = elsewhere
    other = streaming(root, tmp_path / "clone", url)
    train(open_project(root), "sseg")
    train(open_project(other), "sseg")
    assert model_digest(other / "models/sseg") == model_digest(root / "models/sseg")
    stored = {path.name for path in (other / "data/store").iterdir()}
    assert stored >= {"filter", "pseudo_masks"} and "download" not in stored
    assert f"download: 3 of 3 payloads stay at {url}" in capsys.readouterr().err


def test_a_training_whose_store_goes_away_keeps_what_it_did(elsewhere, tmp_path, monkeypatch):
    """No checkpoint is due before the end: what is saved was saved because no batch came; the rest is the same."""
    monkeypatch.setenv("TESSERA_THREADS", "1")
    root, url = elsewhere
    other = streaming(root, tmp_path / "clone", url)
    for folder in (root, other):
        values = yaml.safe_load((folder / "params.yaml").read_text())
        values["train"]["sseg"]["optimisation"]["checkpoint_images"] = 1000
        (folder / "params.yaml").write_text(yaml.safe_dump(values))
    train(open_project(root), "sseg")
    read, left = images.read_ranges, iter(range(6))

    def fails(places):
        if next(left, None) is None:
            raise Unreachable(url, "cannot be read", "Wait")
        return read(places)

    monkeypatch.setattr(images, "read_ranges", fails)
    with pytest.raises(Unreachable):
        train(open_project(other), "sseg")
    saved = json.loads(next(other.glob("data/checkpoints/sseg/*/state-*.json")).read_text())["images"]
    assert 0 < saved <= 48
    monkeypatch.undo()
    monkeypatch.setenv("TESSERA_THREADS", "1")
    train(open_project(other), "sseg")
    assert model_digest(other / "models/sseg") == model_digest(root / "models/sseg")


@pytest.mark.parametrize("name", ["~/second", "file:HOME/second"])
def test_a_remote_may_be_named_without_a_protocol(elsewhere, tmp_path, monkeypatch, name):
    root, _ = elsewhere
    monkeypatch.setenv("HOME", str(tmp_path))
    place = remote.Remote(name.replace("HOME", str(tmp_path)))
    payload = next(name for name in history.current(root) if name.stage == "download")
    assert place.locate(payload) == f"{tmp_path.as_uri()}/second/{payload.path}"


def test_a_stream_that_is_not_whole_is_refused_before_the_first_step(elsewhere, tmp_path):
    root, url = elsewhere
    project = open_project(streaming(root, tmp_path / "clone", url))
    name = next(name for name in history.current(root) if name.stage == "download")
    tar = next((tmp_path / "second" / name.path).glob("*.tar"))
    tar.write_bytes(tar.read_bytes()[:-512])
    with pytest.raises(BadInput, match=r"\.tar: \d+ bytes where \d+ were pushed"):
        project.places("download")
    tar.unlink()
    with pytest.raises(BadInput, match=r"\.tar: missing, though its payload is said to be there"):
        project.places("download")
    remote.Remote(url).remove(name)
    with pytest.raises(MissingPayload, match="no such payload. Repair it"):
        project.places("download")
    local = replace(project, machine=replace(project.machine, stream=False))
    with pytest.raises(MissingPayload):
        local.places("download")
    assert open_project(root).places("download") == open_project(root).inputs("download")
