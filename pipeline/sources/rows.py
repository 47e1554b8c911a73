"""What a reader of a list yields: rows, each with the position at which reading can start again.

A position is one number: a byte offset, a row of a Parquet file, or file and row of a list of many files. Captions are
untrusted: what is not UTF-8 becomes U+FFFD, line breaks become spaces.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

Part = TypeVar("Part")

REMEDY = "Set download.annotations (and download.source, layout, url_column, caption_column) to a list that is there"
_FILE = 1 << 32  # a position in many files is the file's number times this, plus rows read of it


class Row(NamedTuple):
    """A captioned image of a list.

    Attributes:
        url: the link, or the name that the list gives the image.
        position: where reading goes on after this row.
        rejected: why the row is recorded without its image being asked for; empty for all others.
        image: where the list says that the image is, in a folder of shards; `size`, its bytes.
        uid: the sample's name, where it was given one before.
    """

    url: str
    caption: str
    position: int
    rejected: str = ""
    image: str = ""
    size: int = -1
    uid: str = ""


Rows = Iterator[Row]


def one_line(text: object) -> str:
    """A caption's text on one line; None becomes empty."""
    return "" if text is None else " ".join(clean(str(text)).replace("\0", " ").split())


def clean(text: str) -> str:
    """Without the lone surrogates that JSON can spell and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode()


def chained(files: Sequence[Part], read: Callable[[Part], Rows], start: int) -> Rows:
    """Rows of many files, one after the other, from a position on; files before it are not opened."""
    first, done = divmod(start, _FILE)
    for number, file in enumerate(files[first:], first):
        for index, row in enumerate(read(file), 1):
            if index > done:
                yield row._replace(position=number * _FILE + index)
        done = 0
