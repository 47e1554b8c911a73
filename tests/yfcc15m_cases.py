"""YFCC15M's list of photos and their metadata in the official forms, compressed and not."""

import bz2
import hashlib
from pathlib import Path

DESCRIPTIONS = {
    9_000_000_001: "A+dog%2C+%3Ca+href%3D%22http%3A%2F%2Fa.test%22%3Erunning%3C%2Fa%3E",
    17: "Two%0Awords",
    5_000_000_000: "caf%C3%A9+%F0%9F%90%B6",
    12: "one",
    13: "",
    14: "%3Cb%3E+%3C%2Fb%3E",
    15: "a+film",
}
VIDEO, UNLISTED, ABSENT = 15, 99, 77


def md5(photo: int) -> str:
    return hashlib.md5(str(photo).encode()).hexdigest()


def line(number: int, photo: int, columns: int, description: str) -> str:
    """A metadata line as the dataset's README orders it; the older form lacks line number and hash."""
    fields = [str(number), str(photo), md5(photo), "39019111@N00", "guckxzs", "2012-02-16 09:56:37.0", "1331840483"]
    fields += ["Canon+PowerShot", f"Title+of+{photo}", description, "canon,beach", "", "-81.8", "24.5", "12"]
    fields += [f"http://www.flickr.com/photos/39019111@N00/{photo}/", f"http://farm8.test/7205/{photo}_df77.jpg"]
    fields += ["Attribution License", "http://creativecommons.org/licenses/by/2.0/", "7205", "8", "df77", "5ee9", "jpg"]
    fields += ["1" if photo == VIDEO else "0"]
    assert len(fields) == 25
    return "\t".join(fields if columns == 25 else [fields[1], *fields[3:]]) + "\n"


def lines(columns: int = 25) -> list[str]:
    photos = [(UNLISTED, "not+in+the+list"), *DESCRIPTIONS.items()]
    return [line(number, photo, columns, text) for number, (photo, text) in enumerate(photos)]


def write(folder: Path, form: str) -> Path:
    """The official files: unpacked, compressed, or the ten parts of the first release."""
    folder.mkdir(exist_ok=True)
    subset = "".join(f"{photo % 7}\t{photo}\t{md5(photo)}\n" for photo in [*DESCRIPTIONS, ABSENT]).encode()
    if form == "plain":
        (folder / "yfcc100m_subset_data.tsv").write_bytes(subset)
        (folder / "yfcc100m_dataset").write_text("".join(lines()))
        return folder
    (folder / "yfcc100m_subset_data.tsv.bz2").write_bytes(bz2.compress(subset))
    if form == "bz2":
        halves = "".join(lines()[:3]).encode(), "".join(lines()[3:]).encode()
        (folder / "yfcc100m_dataset.bz2").write_bytes(
            b"".join(map(bz2.compress, halves))
        )  # two streams, as pbzip2 does
    else:
        for part in range(4):
            data = "".join(lines(23)[2 * part : 2 * part + 2]).encode()
            (folder / f"yfcc100m_dataset-{part}.bz2").write_bytes(bz2.compress(data))
    return folder
