"""Lists in one file: text of two columns, CSV, JSON lines and Parquet, each read as a stream."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.artifacts.files import BadInput
from pipeline.sources.rows import REMEDY, Row, Rows, clean, one_line

_FIELD_LIMIT = 1 << 24  # characters of a CSV field; more is a quote that never closes
_BATCH = 4096  # rows of a Parquet file that are in memory


def _lines(path: Path, start: int) -> Iterator[tuple[str, int]]:
    """Lines without their ends, each with the offset of the next."""
    with path.open("rb") as file:
        file.seek(start)
        for line in file:
            start += len(line)
            text = line.decode("utf-8", "replace").removesuffix("\n").removesuffix("\r")
            yield text.removeprefix("\ufeff"), start


def pair_rows(path: Path, url_first: bool, start: int) -> Rows:
    """Two columns parted by the first or last tab, no header, no quotes. A row without a tab has no URL."""
    for line, position in _lines(path, start):
        if url_first:
            url, _, caption = line.partition("\t")
        else:
            caption, _, url = line.rpartition("\t")
        if "\t" not in line:
            url, caption = "", line
        yield Row(url.strip(), one_line(caption), position)


class _CountedLines:
    """Lines for csv.reader, which may take several for one record; `position` is the next line's offset."""

    def __init__(self, path: Path, start: int) -> None:
        self._lines, self.position = _lines(path, start), start

    def __iter__(self) -> Iterator[str]:
        for line, position in self._lines:
            self.position = position
            yield line + "\n"


def csv_records(path: Path, start: int) -> Iterator[tuple[list[str], int]]:
    """Records that are not empty, each with the offset of the next; .tsv has tabs for commas."""
    csv.field_size_limit(_FIELD_LIMIT)
    lines = _CountedLines(path, start)
    records = csv.reader(lines, delimiter="," if path.suffix != ".tsv" else "\t")
    try:
        for record in records:
            if record:
                yield record, lines.position
    except csv.Error as error:
        problem = f"not CSV near byte {lines.position} ({error})"
        raise BadInput(path, problem, "Mend the file: a quote is left open") from error


def columns(path: Path, known: list[str], wanted: tuple[str, str]) -> tuple[int, int]:
    """Where the two wanted columns stand."""
    for name in wanted:
        if name not in known:
            raise BadInput(path, f"no column {name!r}; there are {', '.join(known) or 'none'}", REMEDY)
    return known.index(wanted[0]), known.index(wanted[1])


def csv_rows(path: Path, wanted: tuple[str, str], start: int) -> Rows:
    """Text with a header; `wanted` are the columns of link and caption. A record that is cut short is empty there."""
    header, first = next(csv_records(path, 0), ([], 0))
    url, caption = columns(path, header, wanted)
    for record, position in csv_records(path, max(start, first)):
        padded = [*record, *[""] * (len(header) - len(record))]
        yield Row(padded[url].strip(), one_line(padded[caption]), position)


def jsonl_rows(path: Path, wanted: tuple[str, str], start: int) -> Rows:
    """An object a line. A line that is not a JSON object has no URL."""
    for line, position in _lines(path, start):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        values = record if isinstance(record, dict) else {}
        url = clean(str(values.get(wanted[0]) or "")).strip()
        yield Row(url, one_line(values.get(wanted[1])), position)


def parquet_rows(path: Path, wanted: tuple[str, str], start: int, rejected: str = "") -> Rows:
    """Row groups before `start` are not read; a third column may say why a row is rejected.

    Raises:
        BadInput: not a whole Parquet file, or a column is not there.
    """
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise BadInput(path, f"not a whole Parquet file ({error})", REMEDY) from error
    with file:
        columns(path, file.schema_arrow.names, wanted)
        position, groups = 0, list(range(file.num_row_groups))
        while groups and position + file.metadata.row_group(groups[0]).num_rows <= start:
            position += file.metadata.row_group(groups.pop(0)).num_rows
        names = [*wanted, *([rejected] if rejected else [])]
        for batch in _batches(path, file, groups, names):
            skipped = min(max(start - position, 0), batch.num_rows)
            position += skipped
            for url, caption, *reason in zip(*(batch.column(name)[skipped:] for name in names), strict=True):
                position += 1
                why = _text(reason[0]) if reason else ""
                yield Row(_text(url).strip(), one_line(_text(caption)), position, why)


def _batches(path: Path, file: pq.ParquetFile, groups: list[int], names: list[str]) -> Iterator[pa.RecordBatch]:
    """Batches of some row groups, one group after the other: Arrow keeps the bytes of all groups of one call.

    A file whose end is whole may still be damaged in between.
    """
    try:
        for group in groups:
            yield from file.iter_batches(batch_size=_BATCH, row_groups=[group], columns=names)
    except (pa.ArrowException, OSError) as error:
        raise BadInput(path, f"damaged inside ({error})", "Get the file again, and compare its checksum") from error


def _text(value: pa.Scalar) -> str:
    plain = value.as_py()
    if isinstance(plain, bytes):
        return plain.decode("utf-8", "replace")
    return "" if plain is None else str(plain)
