"""Shards: tars read by offset, untrusted images, and the same bytes for the same rows."""

import io
import json
import pickle
import tarfile
import warnings
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.artifacts import shards
from pipeline.artifacts.files import BadInput
from pipeline.artifacts.shards import SUCCESS, Shard, decode_rgb, decode_stored, make_uid, write_shard
from pipeline.artifacts.tars import BLOCK, index_tar, write_tar


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(width: int = 8, height: int = 6, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def row(key: str, status: str = SUCCESS, caption: str = "a dog") -> dict:
    return {
        "url": f"http://x.localhost/{key}",
        "caption": caption,
        "key": key,
        "status": status,
        "error_message": None if status == SUCCESS else "HTTP Error 404: Not Found",
        "width": 8 if status == SUCCESS else None,
        "height": 6 if status == SUCCESS else None,
        "original_width": None,
        "original_height": None,
        "sha256": None,
        "uid": make_uid("x", key, caption),
    }


@pytest.fixture
def shard_folder(tmp_path: Path) -> Path:
    rows = [row("000000002", caption="two"), row("000000000"), row("000000001", "failed_to_download")]
    write_shard(tmp_path, "00000", rows, lambda key: encode(picture(seed=int(key)), "JPEG"))
    return tmp_path


def test_a_written_shard_reads_back(shard_folder: Path) -> None:
    shard = Shard.open(shard_folder, "00000")
    assert shard.table["key"].to_pylist() == ["000000000", "000000002"]
    assert shard.table.column_names == ["key", "uid", "caption", "width", "height"]
    assert shard.image_bytes("000000002") == encode(picture(seed=2), "JPEG")
    assert pq.read_table(shard_folder / "00000.parquet").num_rows == 3
    stats = json.loads((shard_folder / "00000_stats.json").read_text())
    assert (stats["count"], stats["successes"], stats["failed_to_download"]) == (3, 2, 1)
    assert stats["status_dict"] == {"HTTP Error 404: Not Found": 1, "success": 2}
    assert not {"start_time", "end_time", "duration"} & set(stats)


def test_a_shard_travels_to_another_process(shard_folder: Path) -> None:
    shard = Shard.open(shard_folder, "00000")
    first = shard.image_bytes("000000000")
    copy = pickle.loads(pickle.dumps(shard))
    assert copy.image_bytes("000000000") == first


def test_webdataset_reads_it(shard_folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import webdataset

        samples = list(webdataset.WebDataset(str(shard_folder / "00000.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == ["000000000", "000000002"]
    assert samples[1]["txt"] == b"two"


def test_order_of_rows_does_not_change_the_bytes(tmp_path: Path) -> None:
    rows = [row(f"{index:09d}") for index in range(5)]
    for name, some in (("a", rows), ("b", rows[::-1])):
        (tmp_path / name).mkdir()
        write_shard(tmp_path / name, "00007", some, lambda key: encode(picture(seed=int(key)), "JPEG"))
    for file in ("00007.tar", "00007.parquet", "00007_stats.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_tar_whose_keys_are_not_the_successes_is_refused(shard_folder: Path) -> None:
    write_tar(shard_folder / "00000.tar", [("000000000.jpg", b"x")])
    with pytest.raises(BadInput, match="1 images, but 2 successes"):
        Shard.open(shard_folder, "00000")


def test_a_truncated_parquet_is_refused(shard_folder: Path) -> None:
    path = shard_folder / "00000.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(BadInput, match="not a whole Parquet file"):
        Shard.open(shard_folder, "00000")
    path.unlink()
    with pytest.raises(BadInput, match="no such file"):
        Shard.open(shard_folder, "00000")


def test_index_agrees_with_tarfile(tmp_path: Path) -> None:
    members = [(f"{index:09d}.jpg", bytes([index]) * (index * 37 % 1100)) for index in range(40)]
    write_tar(tmp_path / "a.tar", members)
    index, data = index_tar(tmp_path / "a.tar"), (tmp_path / "a.tar").read_bytes()
    assert {name: data[start : start + size] for name, (start, size) in index.items()} == dict(members)
    with tarfile.open(tmp_path / "a.tar") as archive:
        assert {m.name: (m.offset_data, m.size) for m in archive} == index
        assert {m.mtime for m in archive} == {0}


def test_an_extended_header_as_webdataset_writes_it_is_read(tmp_path: Path) -> None:
    long = "k" * 120 + ".txt"
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        for name in ("1.txt", long):
            header = tarfile.TarInfo(name)
            header.size, header.mtime = 3, 12.5  # type: ignore[assignment]
            archive.addfile(header, io.BytesIO(b"abc"))
    index = index_tar(tmp_path / "a.tar")
    assert list(index) == ["1.txt", long]
    start, size = index[long]
    assert (tmp_path / "a.tar").read_bytes()[start : start + size] == b"abc"


@pytest.mark.parametrize("fraction", np.linspace(0.01, 0.99, 15))
def test_a_truncated_tar_is_refused_wherever_it_ends(tmp_path: Path, fraction: float) -> None:
    write_tar(tmp_path / "a.tar", [(f"{index:09d}.jpg", b"x" * 700) for index in range(9)])
    data = (tmp_path / "a.tar").read_bytes()
    content = 9 * (BLOCK + 1024)
    (tmp_path / "a.tar").write_bytes(data[: int(content * fraction)])
    with pytest.raises(BadInput, match="cut off"):
        index_tar(tmp_path / "a.tar")


def test_an_empty_or_absent_tar_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such file"):
        index_tar(tmp_path / "a.tar")
    (tmp_path / "a.tar").touch()
    with pytest.raises(BadInput, match="empty file"):
        index_tar(tmp_path / "a.tar")


@pytest.mark.parametrize("where", [0, 130, 150, 156])
def test_a_damaged_header_is_refused(tmp_path: Path, where: int) -> None:
    write_tar(tmp_path / "a.tar", [("1.txt", b"abc")])
    data = bytearray((tmp_path / "a.tar").read_bytes())
    data[where] ^= 0x05
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(BadInput):
        index_tar(tmp_path / "a.tar")


@pytest.mark.parametrize("name", ["../1.jpg", "/etc/1.jpg", "a/b.jpg", ".hidden.jpg", "..\\1.jpg"])
def test_a_name_that_leaves_the_shard_is_refused(tmp_path: Path, name: str) -> None:
    write_tar(tmp_path / "a.tar", [(name, b"x")])
    with pytest.raises(BadInput, match="leaves the shard"):
        index_tar(tmp_path / "a.tar")


@pytest.mark.parametrize("name", ["1.pkl", "1.pickle", "1.pyd", "1.pth", "1.npy", "1"])
def test_a_pickle_or_unknown_member_is_refused(tmp_path: Path, name: str) -> None:
    write_tar(tmp_path / "a.tar", [(name, pickle.dumps([1]))])
    with pytest.raises(BadInput, match="is none of"):
        index_tar(tmp_path / "a.tar")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE])
def test_links_folders_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
        header = tarfile.TarInfo("1.jpg")
        header.type, header.linkname = kind, "/etc/passwd"
        archive.addfile(header)
    with pytest.raises(BadInput, match="not a plain file"):
        index_tar(tmp_path / "a.tar")


def test_a_member_twice_is_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("1.jpg", b"x"), ("1.jpg", b"y")])
    with pytest.raises(BadInput, match="twice"):
        index_tar(tmp_path / "a.tar")


def test_plain_images_decode_exactly() -> None:
    image = picture()
    assert np.array_equal(decode_rgb(encode(image)), np.asarray(image))
    assert decode_rgb(encode(picture(1, 1))).shape == (1, 1, 3)
    assert decode_rgb(encode(picture(20_000, 2))).shape == (2, 20_000, 3)


def test_cmyk_becomes_rgb() -> None:
    cyan = Image.new("CMYK", (4, 4), (255, 0, 0, 0))
    red, green, blue = decode_rgb(encode(cyan, "JPEG", quality=95))[0, 0]
    assert red < 60 < 150 < min(green, blue)


def test_sixteen_bits_keep_their_brightness() -> None:
    grey = Image.fromarray(np.array([[0, 257 * 100], [257 * 200, 65535]], np.uint16))
    assert decode_rgb(encode(grey))[..., 0].tolist() == [[0, 100], [200, 255]]


def test_palette_and_transparency_lie_on_white() -> None:
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), mode=None).convert("P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    assert decode_rgb(encode(palette)).tolist() == [[[10, 20, 30], [40, 50, 60]]]
    assert decode_rgb(encode(palette, transparency=0)).tolist() == [[[255, 255, 255], [40, 50, 60]]]
    clear = Image.new("RGBA", (2, 2), (9, 9, 9, 0))
    assert decode_rgb(encode(clear)).min() == 255


def test_an_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_rgb(data)[0, 0].tolist() == [255, 0, 0]


def test_exif_rotation_is_applied() -> None:
    image = picture(8, 4)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned: to be shown turned by 90 degrees clockwise
    shown = decode_rgb(encode(image, "PNG", exif=exif))
    assert np.array_equal(shown, np.rot90(np.asarray(image), -1))


def test_bombs_are_refused_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "MAX_PIXELS", 99)
    assert decode_rgb(encode(picture(9, 11))).shape == (11, 9, 3)
    with pytest.raises(BadInput, match="10 x 10 px is more than 99"):
        decode_rgb(encode(picture(10, 10)))


def test_a_real_bomb_header_is_refused() -> None:
    image = encode(Image.new("1", (14_000, 14_000)))
    with pytest.raises(BadInput):
        decode_rgb(image, "bomb.png")


def smooth(width: int, height: int) -> Image.Image:
    """Colours that run into each other, as a photograph's."""
    return Image.fromarray(cv2.resize(np.asarray(picture(9, 7)), (width, height), interpolation=cv2.INTER_CUBIC))


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (23, 17), (341, 256)])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("quality", [20, 95])
def test_stored_jpegs_decode_to_pillows_bits(size, subsampling, progressive, quality) -> None:
    options = {"subsampling": subsampling, "progressive": progressive, "quality": quality}
    data = encode(smooth(*size), "JPEG", restart_marker_rows=2, comment=b"x" * 300, **options)
    assert shards._is_plain_jpeg(data)
    assert np.array_equal(decode_stored(data), decode_rgb(data))


def test_other_images_of_a_shard_are_left_to_pillow() -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    jpeg, photo = encode(smooth(40, 30), "JPEG"), smooth(40, 30)
    others = [
        encode(photo, "JPEG", exif=turned),
        encode(photo, "JPEG", xmp=b'<x tiff:Orientation="6"/>'),
        encode(photo.convert("L"), "JPEG"),
        encode(photo.convert("CMYK"), "JPEG"),
        encode(photo, "PNG"),
        jpeg + b"\0\0",
    ]
    for data in others:
        assert not shards._is_plain_jpeg(data)
        pixels = decode_stored(data)
        assert np.array_equal(pixels, decode_rgb(data)) and pixels.flags.writeable
    assert decode_stored(others[0]).shape == (40, 30, 3)


def test_damaged_and_huge_stored_images_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    jpeg = encode(smooth(40, 30), "JPEG")
    for data in (
        jpeg[:200],
        jpeg[:-2],
        jpeg[:2] + jpeg[-2:],
        jpeg[:300] + jpeg[-2:],
        b"",
        b"\xff\xd8" * 20 + b"\xff\xd9",
    ):
        with pytest.raises(BadInput, match="photo"):
            decode_stored(data, "photo")
    monkeypatch.setattr(shards, "MAX_PIXELS", 1199)
    with pytest.raises(BadInput, match="40 x 30 px is more than 1199"):
        decode_stored(jpeg)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP"])
@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.9])
def test_truncated_images_are_refused_or_whole(kind: str, fraction: float) -> None:
    data = encode(picture(64, 64), kind)
    with pytest.raises(BadInput, match="photo"):
        decode_rgb(data[: int(len(data) * fraction)], "photo")


@pytest.mark.parametrize("data", [b"", b"<html><body>404</body></html>", b"\0" * 100, b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_what_is_no_image_is_refused(data: bytes) -> None:
    with pytest.raises(BadInput, match="not a readable image"):
        decode_rgb(data)


def test_uid_depends_on_every_part() -> None:
    uids = {make_uid("a", "b", "c"), make_uid("ab", "", "c"), make_uid("a", "bc", ""), make_uid("a", "b", "c d")}
    assert len(uids) == 4 and all(len(uid) == 16 for uid in uids)
