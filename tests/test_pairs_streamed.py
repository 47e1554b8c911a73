"""Images that stay in a second store: the same batches as from a disk, and what goes wrong there is said."""

import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path
from random import Random

import fsspec
import pytest
import yaml
from ovsegmentor_cases import make_index
from pair_shards import write_pairs
from sseg_cases import make_project
from store_cases import clone

from pipeline import history, remote
from pipeline.artifacts.files import BadInput
from pipeline.artifacts.weights import model_digest
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


def prepare(sample, rng):
    return sample.caption(rng), sample.image.tobytes(), sample.regions.tolist(), rng.random()


def collate(items, uids):
    return items, uids


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
        "pipeline.datasets.preparing.read_ranges", lambda places: fetched.append(len(places)) or [b""] * len(places)
    )
    batches = loader(away, share=(1, 5), threads=0).batches(0)
    with pytest.raises(BadInput, match="none of the 1 images of a batch decodes"):
        next(batches)
    assert fetched == [1], "of a batch only this process's share is asked for, all of it at once"


def test_workers_read_a_second_store_too(here, tmp_path):
    away = [put(shard, tmp_path.as_uri()) for shard in here]
    assert content(loader(away, workers=2)) == content(loader(here))


def test_partners_are_drawn_from_there(here, tmp_path):
    index = make_index(tmp_path / "index", [[[0]] * 9, [[0]] * 10])
    away = [put(shard, tmp_path.as_uri()) for shard in here]
    found = []
    next(loader(here, batch_size=1, threads=0, prepare=lambda sample, rng: found.append(sample)).batches(0))

    def pictures(shards):
        drawn = [Partners(shards, index).draw(found[0], Random(seed)) for seed in range(20)]
        return [(partner.place, partner.image.tobytes()) for partner in drawn]

    assert pictures(away) == pictures(here) and len(set(pictures(here))) > 5


def test_what_cannot_be_read_stops_the_training_and_a_cut_off_picture_does_not(here, tmp_path):
    away = [put(shard, tmp_path.as_uri()) for shard in here]
    tar = tmp_path / "00001" / "00001.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[: len(whole) // 2])
    reasons = [reason for loaded in islice(loader(away).batches(0), 4) for _, reason in loaded.failures]
    assert any("00001.tar" in reason and "cut off inside" in reason for reason in reasons)
    tar.unlink()
    with pytest.raises(BadInput, match=r"00001\.tar: cannot be read .*same command again"):
        content(loader(away))
    with pytest.raises(BadInput, match=r"00001\.tar: cannot be read"):
        content(loader(away, workers=1))


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


def test_a_training_streams_to_the_same_weights(elsewhere, tmp_path, monkeypatch):
    monkeypatch.setenv("TESSERA_THREADS", "1")
    root, url = elsewhere
    other = streaming(root, tmp_path / "clone", url)
    train(open_project(root), "sseg")
    train(open_project(other), "sseg")
    assert model_digest(other / "models/sseg") == model_digest(root / "models/sseg")
    stored = {path.name for path in (other / "data/store").iterdir()}
    assert stored >= {"filter", "pseudo_masks"} and "download" not in stored


def test_a_stream_that_is_not_whole_is_refused_before_the_first_step(elsewhere, tmp_path):
    root, url = elsewhere
    project = open_project(streaming(root, tmp_path / "clone", url))
    name = next(name for name in history.current(root) if name.stage == "download")
    tar = next((tmp_path / "second" / name.path).glob("*.tar"))
    tar.write_bytes(tar.read_bytes()[:-512])
    with pytest.raises(BadInput, match=r"\.tar: \d+ bytes where \d+ were pushed"):
        project.places("download")
    remote.Remote(url).remove(name)
    with pytest.raises(MissingPayload, match="no such payload. Repair it"):
        project.places("download")
    local = replace(project, machine=replace(project.machine, stream=False))
    with pytest.raises(MissingPayload):
        local.places("download")
    assert open_project(root).places("download") == open_project(root).inputs("download")
