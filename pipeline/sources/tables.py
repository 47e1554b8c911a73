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
_BLOCK = 1 << 20  # bytes in which lines are counted


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
    """Records that are not empty, each with the offset of the next; .tsv has tabs for commas.

    A .tsv may have no quoting at all: there, a quote that opens and does not close as CSV has it is text of its
    line, and so is one whose field would hold a tab and a line break: those are rows.

    Raises:
        BadInput: in another file, a quote is left open, or something stands behind one that closes.
    """
    csv.field_size_limit(_FIELD_LIMIT)
    tabs = path.suffix == ".tsv"
    while True:
        lines = _CountedLines(path, start)
        try:
            for record in csv.reader(lines, delimiter="\t" if tabs else ",", strict=True):
                if tabs and any("\n" in field and "\t" in field for field in record):
                    raise csv.Error("rows in a field")
                start = lines.position
                if record:
                    yield record, start
            return
        except csv.Error as error:
            if not tabs:
                problem = f"line {_line_number(path, start)}: not CSV ({error}): a quote is left open, or not doubled"
                remedy = 'Mend the line: a field with quotes stands in quotes, and its own are doubled ("")'
                raise BadInput(path, problem, remedy) from error
            line, start = next(_lines(path, start))
            yield _unquoted(line), start


def _unquoted(line: str) -> list[str]:
    """Fields between the tabs of a line; where every quote that opens closes, without those quotes."""
    try:
        fields, *rest = csv.reader([line + "\n", "next"], delimiter="\t")
    except csv.Error:
        rest = []
    return fields if rest else line.split("\t")


def _line_number(path: Path, position: int) -> int:
    """The number, from 1, of the line that starts at an offset."""
    found = 1
    with path.open("rb") as file:
        while position > 0 and (block := file.read(min(_BLOCK, position))):
            position -= len(block)
            found += block.count(b"\n")
    return found


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
        for batch in map(readable, _batches(path, file, groups, names)):
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


def readable(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch with U+FFFD for what is not UTF-8 in its columns of text."""
    return pa.RecordBatch.from_arrays(list(map(_readable, batch.columns)), names=batch.schema.names)


def _readable(column: pa.Array) -> pa.Array:
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()  # type: ignore[attr-defined]
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return column
    try:
        column.validate(full=True)
        return column
    except pa.ArrowInvalid:
        values = column.cast(pa.large_binary()).to_pylist()
        return pa.array([None if data is None else data.decode("utf-8", "replace") for data in values], pa.string())


def _text(value: pa.Scalar) -> str:
    plain = value.as_py()
    if isinstance(plain, bytes):
        return plain.decode("utf-8", "replace")
    return "" if plain is None else str(plain)
