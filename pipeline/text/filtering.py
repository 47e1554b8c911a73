"""The `filter` and `index` stages: what each caption says, which samples are kept and why, who names which entity.

A payload of `filter` is one table, rows.parquet, with a row per downloaded sample in key order; rejected samples stay
in it with their reason. Images are not touched. Duplicates are found within a shard: a shard's verdicts then depend on
that shard alone, and adding shards recomputes none. The same sample in two shards is kept twice.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pyarrow as pa

from pipeline import params
from pipeline.artifacts import decisions
from pipeline.artifacts.files import CorruptPayload, digest
from pipeline.artifacts.shards import read_successes
from pipeline.artifacts.tables import read_table, write_table
from pipeline.engine import Counts, ShardStage, Task
from pipeline.machine import Machine
from pipeline.params import ParamsError, Range
from pipeline.project import Project
from pipeline.text import entities, tagging
from pipeline.text.entities import Annotation, Annotator, Mode, NounRule, Ragged, Vocabulary
from pipeline.text.index import EntityIndex, check_index, places_of, write_index
from pipeline.text.verdicts import KEPT, NAME, REJECTED, SCHEMA, kept

__all__ = ["INDEX", "SCHEMA", "STAGE", "Config", "EntityIndex", "kept"]

_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Block `filter`.

    Attributes:
        vocabulary: "cc4m", or the path of a JSON file of its form.
        mode: "exact": a word of the vocabulary letter by letter (CC4M's rule); "noun": tagged as a noun, in any case
            and number.
        nouns: what column `nouns` holds: "lemmas" (lower-case singulars, each once) or "groupvit" (the tokens that
            GroupViT draws prompts from, verbs among them). OVSegmentor's masked nouns and SCG need lemmas.
        tagger: "nltk", "textblob", or "auto": nltk's where its data is on this machine, TextBlob's otherwise.
        min_words, max_words: bounds on the words of a caption; of several captions one within them is enough. Words
            are counted up to `tokenise.MAX_WORDS`: a `max_words` of that or more is no bound.
        require_entity: reject samples whose captions name no entity.
        duplicates: what makes a later sample of the shard a duplicate of an earlier one: "pair" is the same image
            bytes and captions, "image" and "caption" one of them, "keep" nothing.
        reject: decisions of `tessera duplicates`, over all shards, that reject a row.
    """

    vocabulary: str
    mode: Mode
    nouns: NounRule
    tagger: tagging.Choice
    min_words: Annotated[int, Range(0)]
    max_words: Annotated[int, Range(1)]
    require_entity: bool
    duplicates: Literal["keep", "pair", "image", "caption"]
    reject: tuple[Literal["leak", "image", "near", "url", "caption"], ...]


@dataclass(frozen=True, slots=True)
class _Args:
    folder: Path
    config: Config
    vocabulary: Vocabulary
    tagger: tagging.Source
    decisions: Path | None


def _vocabulary(project: Project, name: str) -> Vocabulary:
    if name.endswith(".json"):
        return Vocabulary.read(project.path(name))
    try:
        return entities.vocabulary(name)
    except ParamsError as error:
        raise ParamsError(f"filter.vocabulary: {error}") from error


def _tasks(project: Project) -> list[Task]:
    config = project.config("filter", Config)
    vocabulary = _vocabulary(project, config.vocabulary)
    source = tagging.resolve(config.tagger)
    decisive = params.plain(config)
    if config.nouns == "lemmas":
        del decisive["nouns"]  # payloads from before there was a choice keep their keys
    decided = None
    if config.reject:
        decisive["decisions"], decided = decisions.find(project.root, project.store.root)
    else:
        del decisive["reject"]
    settings = {
        **decisive,
        "vocabulary": digest([vocabulary.words, vocabulary.classes, vocabulary.class_of]),
        "tagger": source.name,
        "tagger_data": source.digest,
    }
    return [
        Task(
            shard=row.shard,
            fields={"input": row.out, "params": settings},
            args=_Args(folder, config, vocabulary, source, decided),
            rows=row.rows,
        )
        for row, folder in project.inputs("download")
    ]


def _compute(task: Task, out: Path, machine: Machine) -> Counts:
    args: _Args = task.args
    rows = read_successes(args.folder / f"{task.shard}.parquet").sort_by("key")
    captions = _texts(rows["caption"])
    config, tagger = args.config, tagging.load(args.tagger, args.vocabulary.nouns)
    annotator = Annotator(args.vocabulary, config.mode, tagger, config.nouns)
    reasons: list[str] = []
    nouns, classes = [], []
    for start in range(0, len(captions), entities.BATCH):
        batch = captions[start : start + entities.BATCH]
        said = annotator(batch)
        reasons += _judge(batch, said, config)
        nouns.append(said.nouns)
        classes.append(said.entities)
    if args.decisions is not None:
        keys = rows["key"].to_pylist()
        uids = dict(zip(keys, rows["uid"].to_pylist(), strict=True))
        found = decisions.of_shard(args.decisions, task.shard, uids)
        _reject(reasons, [found.get(key) for key in keys], config.reject)
    _mark_duplicates(reasons, captions, rows["sha256"].to_pylist(), config.duplicates)
    lemmas = pa.array(list(annotator.lemmas), pa.string())
    table = pa.table(
        {
            "key": rows["key"],
            "uid": rows["uid"],
            "status": [REJECTED if reason else KEPT for reason in reasons],
            "reason": reasons,
            "nouns": _lists(nouns, lambda values: lemmas.take(pa.array(values, pa.int32()))),
            "entities": _lists(classes, lambda values: pa.array(values, pa.int16())),
        },
        schema=SCHEMA,
    )
    write_table(out / NAME, table)
    why = Counter(reason for reason in reasons if reason)
    detail = {f"reason: {reason}": count for reason, count in sorted(why.items())}
    detail[f"tagger: {args.tagger.name}"] = len(reasons)
    failed = sum(why.values())
    return Counts(rows_in=len(reasons), rows=len(reasons) - failed, failed=failed, detail=detail)


def _texts(captions: pa.ChunkedArray) -> list[str]:
    """Captions as text whatever the bytes: null is empty, what is not UTF-8 becomes U+FFFD, control codes blanks."""
    texts = ((data or b"").decode("utf-8", "replace") for data in captions.cast(pa.binary()).to_pylist())
    return [_CONTROL.sub(" ", text) for text in texts]


def _judge(captions: Sequence[str], said: Annotation, config: Config) -> list[str]:
    """Why each row is rejected; "" for the others."""
    named = np.diff(said.entities.offsets)
    reasons = []
    for caption, fewest, most, entities_named in zip(
        captions, said.fewest_words.tolist(), said.most_words.tolist(), named.tolist(), strict=True
    ):
        if not caption.strip():
            reasons.append("empty")
        elif most == 0:
            reasons.append("not_text")
        elif most < config.min_words:
            reasons.append("too_short")
        elif fewest > config.max_words:
            reasons.append("too_long")
        elif config.require_entity and not entities_named:
            reasons.append("no_entity")
        else:
            reasons.append("")
    return reasons


def _reject(reasons: list[str], decided: Sequence[str | None], kinds: Sequence[str]) -> None:
    """Reject rows with a decision of these kinds that had no reason before."""
    for at, kind in enumerate(decided):
        if not reasons[at] and kind in kinds:
            reasons[at] = kind if kind == "leak" else f"duplicate_{kind}"


def _mark_duplicates(reasons: list[str], captions: Sequence[str], images: Sequence[str], rule: str) -> None:
    """Reject every row that repeats an earlier kept one."""
    if rule == "keep":
        return
    seen = set()
    for at, (caption, image) in enumerate(zip(captions, images, strict=True)):
        mark = {"pair": (image, caption), "image": image, "caption": caption}[rule]
        if not reasons[at] and mark in seen:
            reasons[at] = "duplicate"
        elif not reasons[at]:
            seen.add(mark)


def _lists(parts: list[Ragged], values: Callable[[np.ndarray], pa.Array]) -> pa.ListArray:
    """The batches' lists as one column."""
    lengths = np.concatenate([[0], *(np.diff(part.offsets) for part in parts)])
    flat = np.concatenate([np.zeros(0, dtype=np.int64), *(part.values for part in parts)])
    return pa.ListArray.from_arrays(pa.array(np.cumsum(lengths), pa.int32()), values(flat))


def _check(folder: Path, counts: Counts) -> None:
    path = folder / NAME
    table = read_table(path, SCHEMA)
    keys = table["key"].to_pylist()
    if table.num_rows != counts.rows_in or kept(folder).num_rows != counts.rows:
        raise CorruptPayload(path, f"{table.num_rows} rows where {counts.rows_in} went in and {counts.rows} are kept")
    if keys != sorted(set(keys)):
        raise CorruptPayload(path, "keys are not in order, or repeat")
    statuses, reasons = table["status"].to_pylist(), table["reason"].to_pylist()
    if any((status == REJECTED) != bool(reason) for status, reason in zip(statuses, reasons, strict=True)):
        raise CorruptPayload(path, "a rejected row without a reason, or a kept one with")


STAGE = ShardStage(name="filter", schema=1, code_tag=1, tasks=_tasks, compute=_compute, check=_check)


@dataclass(frozen=True, slots=True)
class _IndexArgs:
    shards: tuple[str, ...]
    folders: tuple[Path, ...]
    images: tuple[Path | str, ...]
    vocabulary: Vocabulary


def _index_tasks(project: Project) -> list[Task]:
    vocabulary = _vocabulary(project, project.config("filter", Config).vocabulary)
    inputs = project.inputs("filter")
    images = {row.shard: (row.out, place) for row, place in project.places("download")}
    shards, folders = tuple(row.shard for row, _ in inputs), tuple(folder for _, folder in inputs)
    project.require_shards({"download": images, "filter": shards})
    return [
        Task(
            shard="index",
            fields={
                "inputs": [[row.shard, row.out, images[row.shard][0]] for row, _ in inputs],
                "classes": list(vocabulary.classes),
            },
            args=_IndexArgs(shards, folders, tuple(images[shard][1] for shard in shards), vocabulary),
            rows=sum(row.rows for row, _ in inputs),
        )
    ]


def _index_compute(task: Task, out: Path, machine: Machine) -> Counts:
    args: _IndexArgs = task.args

    def named(position: int) -> Ragged:
        column = kept(args.folders[position], "entities")["entities"].combine_chunks()
        offsets = column.offsets.to_numpy()
        return Ragged(column.values.to_numpy()[offsets[0] : offsets[-1]], offsets - offsets[0])

    def places(position: int) -> np.ndarray:
        return places_of(args.folders[position], args.images[position], args.shards[position])

    rows, mentions = write_index(out, args.vocabulary, args.shards, named, places)
    return Counts(rows_in=rows, rows=rows, failed=0, detail={"mentions": mentions})


def _index_check(folder: Path, counts: Counts) -> None:
    check_index(folder, counts.rows)


INDEX = ShardStage(name="index", schema=2, code_tag=1, tasks=_index_tasks, compute=_index_compute, check=_index_check)
