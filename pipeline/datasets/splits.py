"""Image ids of a split: a text file that lists them, or the images that lie in a folder.

An id is the path of an image without what the layout puts around it: `2007_000033`, or with folders
`val/frankfurt/frankfurt_000000_000294`. It never leads out of the benchmark's folder.
"""

import re
from pathlib import Path

from pipeline.artifacts.files import BadInput

NO_IMAGE = "Write one image id per line, without extension"
_PART = r"[A-Za-z0-9][\w.-]*"
_ID = re.compile(rf"{_PART}(/{_PART})*")


def is_image_id(text: str) -> bool:
    """Whether the text is an id: parts that begin with a letter or digit, so that none is `..`."""
    return _ID.fullmatch(text) is not None


def listed_ids(path: Path, remedy: str) -> list[str]:
    """The ids that a text file lists, one per line.

    Raises:
        BadInput: absent (with the caller's remedy), not text, an id twice, or a line that is none.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise BadInput(path, "no such file", remedy) from None
    except UnicodeDecodeError as error:
        raise BadInput(path, f"not UTF-8 ({error.reason})", "Write one image id per line") from error
    found = [line.strip() for line in lines if line.strip()]
    for image_id in found:
        if not is_image_id(image_id):
            raise BadInput(path, f"{image_id!r} is no image id", "Write one file name per line, without extension")
    if len(set(found)) != len(found):
        twice = next(image_id for image_id in found if found.count(image_id) > 1)
        raise BadInput(path, f"lists {twice} twice", "Delete one of the two lines")
    return found


def matching_ids(folder: Path, images: str, ids: str) -> list[str]:
    """The ids, sorted, of the images below `folder`: `images` is their path with {id}, `ids` a pattern for the id."""
    before, after = images.split("{id}")
    found = (file.relative_to(folder).as_posix() for file in folder.glob(f"{before}{ids}{after}"))
    return sorted(filter(is_image_id, (name[len(before) : len(name) - len(after)] for name in found)))
