"""RedCaps' annotations: a JSON file per subreddit and year, in a folder or in the zip they are released in.

Source: the release, redcaps_v1.0_annotations.zip, which holds annotations/<subreddit>_<year>.json; a file is
{"info": ..., "annotations": [{"image_id", "author", "url", "raw_caption", "caption", "subreddit", ...}]}. `raw_caption`
is the post's title, `caption` the title lower-cased and cleaned; GroupViT trains on `caption` (card groupvit.md 7).
"""

import json
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from pipeline.artifacts.files import BadInput
from pipeline.sources.rows import Row, Rows, chained, clean, one_line

CAPTIONS = ("caption", "raw_caption")
_REMEDY = "Get redcaps_v1.0_annotations.zip again (redcaps.xyz), unzip it or leave it as it is, or delete this one file"


def read(path: Path, caption: str, start: int) -> Rows:
    """Rows file after file in the order of their names, one file in memory at a time.

    Args:
        path: a folder of JSON files (or one with such a folder `annotations`), or a zip of them.
        caption: `caption` or `raw_caption`.
    Raises:
        BadInput: there is no such folder, zip or caption, or a file is not RedCaps' JSON.
    """
    if caption not in CAPTIONS:
        remedy = f"Set download.caption_column to {' or '.join(CAPTIONS)}"
        raise BadInput(path, f"RedCaps' annotations have no {caption!r}", remedy)
    if path.is_dir():
        return chained(_files(path), lambda file: _rows(file, file.read_bytes(), caption), start)
    return _zipped(path, caption, start)


def _files(folder: Path) -> list[Path]:
    inner = folder / "annotations"
    files = sorted((inner if inner.is_dir() else folder).glob("[!.]*.json"))
    if not files:
        raise BadInput(folder, "no <subreddit>_<year>.json in it", _REMEDY)
    return files


def _zipped(path: Path, caption: str, start: int) -> Rows:
    def rows(member: zipfile.ZipInfo) -> Rows:
        try:
            data = archive.read(member)
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
            raise BadInput(f"{path}/{member.filename}", f"damaged in the zip ({error})", _REMEDY) from error
        return _rows(f"{path}/{member.filename}", data, caption)

    try:
        archive = zipfile.ZipFile(path)
    except FileNotFoundError:
        raise BadInput(path, "no such folder or zip of annotations", _REMEDY) from None
    except (zipfile.BadZipFile, OSError) as error:
        raise BadInput(path, f"not a whole zip ({error})", _REMEDY) from error
    with archive:
        members = [member for member in archive.infolist() if _is_annotation(PurePosixPath(member.filename))]
        if not members:
            raise BadInput(path, "no <subreddit>_<year>.json in it", _REMEDY)
        yield from chained(sorted(members, key=lambda member: PurePosixPath(member.filename).name), rows, start)


def _is_annotation(name: PurePosixPath) -> bool:
    """Files whose name starts with a dot, and the folder __MACOSX, are what macOS adds to a zip."""
    return name.suffix == ".json" and not name.name.startswith(".") and "__MACOSX" not in name.parts


def _rows(file: Path | str, data: bytes, caption: str) -> Rows:
    """A file's annotations; one without a link or a caption is a rejected row."""
    try:
        notes = json.loads(data)["annotations"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:  # a JSON or UTF-8 error is a ValueError
        raise BadInput(file, f"not RedCaps' annotations ({error!r})", _REMEDY) from error
    if not isinstance(notes, list):
        raise BadInput(file, "not RedCaps' annotations (`annotations` is not a list)", _REMEDY)
    for note in notes:
        values = note if isinstance(note, dict) else {}
        url, text = values.get("url"), values.get(caption)
        whole = isinstance(url, str) and isinstance(text, str)
        rejected = "" if whole else f"an annotation without url and {caption}"
        yield Row(clean(str(url or "")).strip(), one_line(text), 0, rejected)
