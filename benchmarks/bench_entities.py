"""Entities of real captions against nltk's loop over word_tokenize and pos_tag, on one core, in one run.

    python -m benchmarks entities                               CC3M, COCO and noisy web captions
    python benchmarks/bench_entities.py --data /data --tagger textblob

Every round times nltk on a sample of a set's captions and ours on all of them; rates are of the best round. Ours starts
each round with no word seen. Agreement is counted on nltk's sample: classes of CC4M's vocabulary that the loop finds
with a noun tag, against those that `pipeline.text.entities.extract` finds. Times are the process's own, so that a busy
machine distorts both alike.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from pipeline.text import tagging
from pipeline.text.entities import Annotator, Vocabulary, extract, vocabulary
from pipeline.text.tagging import Tagger

RATIO, F1 = 20.0, 0.99  # to reach
SAMPLE = 2000  # captions that nltk tags in a round
BATCH = 4096


def captions(folder: Path) -> dict[str, list[str]]:
    """The captions of each real list under `folder`, those that are there."""
    found: dict[str, list[str]] = {}
    if (path := folder / "cc3m_validation.tsv").exists():
        found["CC3M"] = [line.rpartition("\t")[0] for line in path.read_text(encoding="utf-8").splitlines()]
    if (path := folder / "coco_captions_val2017.json").exists():
        found["COCO"] = [note["caption"] for note in json.loads(path.read_text(encoding="utf-8"))["annotations"]]
    if (path := folder / "url_text_10k.parquet").exists():
        found["noisy web"] = [text or "" for text in pq.read_table(path, columns=["TEXT"])["TEXT"].to_pylist()]
    return found


def plain_loop(lines: list[str], words: Vocabulary) -> list[list[str]]:
    """What one writes first; tokens tagged as nouns, looked up by the vocabulary's singular and plural forms."""
    import nltk
    from nltk.tokenize import word_tokenize

    found = []
    for line in lines:
        names = []
        for token, tag in nltk.pos_tag(word_tokenize(line, preserve_line=True)):
            form = words.forms.get(token.lower().rstrip("."))
            if tag in tagging.NOUNS and form and words.classes[form[0]] not in names:
                names.append(words.classes[form[0]])
        found.append(names)
    return found


def timed(call: Callable[[], object]) -> float:
    """Seconds of this process."""
    started = time.process_time()
    call()
    return time.process_time() - started


def agreement(one: list[list[str]], two: list[list[str]]) -> float:
    """F1 of the pairs (caption, class), 1 for two empty sets."""
    both = sum(len(set(a) & set(b)) for a, b in zip(one, two, strict=True))
    total = sum(map(len, one)) + sum(map(len, two))
    return 2 * both / total if total else 1.0


def whole_annotation(lines: list[str], words: Vocabulary, tagger: Tagger) -> None:
    """What stage `filter` asks for: all nouns and word counts beside the entities."""
    annotator = Annotator(words, "noun", tagger)
    for start in range(0, len(lines), BATCH):
        annotator(lines[start : start + BATCH])


def prompted(lines: list[str], words: Vocabulary, tagger: Tagger) -> int:
    """Captions with a token that GroupViT draws a prompt from."""
    annotator = Annotator(words, "noun", tagger, "groupvit")
    batches = (annotator(lines[start : start + BATCH]).nouns.offsets for start in range(0, len(lines), BATCH))
    return sum(int((np.diff(offsets) > 0).sum()) for offsets in batches)


def measure(lines: list[str], words: Vocabulary, source: tagging.Source, rounds: int) -> dict[str, float]:
    """Captions a second of the loop and of ours (noun and exact mode, the stage's whole annotation), agreement, and how
    many captions name an entity, or a noun for GroupViT's prompts.
    """
    sample = lines[:: max(1, len(lines) // SAMPLE)]
    best: dict[str, float] = dict.fromkeys(("loop", "noun", "exact", "annotation"), float("inf"))
    for _ in range(rounds):
        tagging.load.cache_clear()
        tagger = tagging.load(source, words.nouns)
        calls: dict[str, tuple[Callable[[], object], int]] = {
            "loop": (lambda: plain_loop(sample, words), len(sample)),
            "noun": (lambda tagger=tagger: extract(lines, words, tagger=tagger), len(lines)),
            "exact": (lambda tagger=tagger: extract(lines, words, mode="exact", tagger=tagger), len(lines)),
            "annotation": (lambda tagger=tagger: whole_annotation(lines, words, tagger), len(lines)),
        }
        for name, (call, count) in calls.items():
            best[name] = min(best[name], timed(call) / count)
    tagger = tagging.load(source, words.nouns)
    f1 = agreement(extract(sample, words, tagger=tagger), plain_loop(sample, words))
    named = {
        f"{mode} named": sum(map(bool, extract(lines, words, mode=mode, tagger=tagger))) for mode in ("noun", "exact")
    }
    named["prompts"] = prompted(lines, words, tagger)
    return {**{name: 1 / seconds for name, seconds in best.items()}, **named, "f1": f1}


def main() -> None:
    """Print rates, ratios and agreement per set."""
    parser = argparse.ArgumentParser(description="entities of captions, against nltk's loop")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("TESSERA_REAL_DATA", "../shared/data")))
    parser.add_argument("--tagger", choices=("nltk", "textblob"), default="nltk")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    sets = captions(options.data / "captions")
    if not sets or not (options.data / "nltk_data" / "taggers" / "averaged_perceptron_tagger_eng").is_dir():
        print(f"  skipped: no captions and nltk_data under {options.data}; say where with --data")
        return
    import nltk

    nltk.data.path.insert(0, str(options.data / "nltk_data"))
    words, source = vocabulary("cc4m"), tagging.resolve(options.tagger)
    print(f"CC4M's vocabulary, tagger {options.tagger}, one core; captions a second, best of {options.rounds} rounds")
    for name, lines in sets.items():
        found = measure(lines, words, source, options.rounds)
        print(f"  {name:10s} {len(lines):6,d} captions   nltk loop {found['loop']:8,.0f}   f1 {found['f1']:.4f}")
        kept = ", ".join(f"{mode} {int(found[f'{mode} named']):,d}" for mode in ("noun", "exact"))
        print(f"    captions with an entity: {kept}; with a noun by GroupViT's rule {int(found['prompts']):,d}")
        for mode, wanted in (("noun", f"   to reach: {RATIO:.0f} at f1 {F1}"), ("exact", ""), ("annotation", "")):
            print(f"    {mode:10s} {found[mode]:10,.0f} {found[mode] / found['loop']:7.1f} x{wanted}")


if __name__ == "__main__":
    main()
