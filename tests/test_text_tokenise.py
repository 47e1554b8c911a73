"""Our tokens are nltk's: on real captions, and on strings made of everything its rules look at."""

import json
import random
import time

import numpy as np
import pytest
from nltk.tokenize import word_tokenize

from pipeline.text.tokenise import MAX_WORDS, Tokens, TypeColumns, Types, tokenise, words

PARTS = (
    [
        "a",
        "dog",
        "t-shirt",
        "I'm",
        "x'",
        "s'",
        "'s",
        "'S",
        "n't",
        "N'T",
        "'ll",
        "'RE",
        "'M",
        "'D",
        "'90s",
        "'em",
        "'word'",
    ]
    + ["'", "''", '"', "`", "``", "“", "”", "‘", "’", "«", "»", "„", ".", "..", "...", ",", ":", ";", "-", "--", "—"]
    + [
        "(",
        ")",
        "[",
        "]",
        "<",
        ">",
        "{",
        "}",
        "$",
        "&",
        "?",
        "!",
        "#",
        "@",
        "*",
        "%",
        "1",
        "10:30",
        "3,000",
        "é",
        "日",
        "ß",
    ]
    + [" ", "  ", "\t", "\n", "\u3000", "\xa0", "cannot", "gonna", "wanna", "gimme", "Lemme", "gotta", "more'n", "d'ye"]
    + ["'tis", "'Twas", "e.g.", "U.S.", "0"]
)


def test_made_up_strings() -> None:
    draw = random.Random(0)
    for _ in range(8_000):
        count = draw.randint(0, 8)
        text = "".join(draw.choice(PARTS) + (" " if draw.random() < 0.4 else "") for _ in range(count))
        assert words(text) == word_tokenize(text, preserve_line=True), repr(text)


def test_real_captions(real_data) -> None:
    lines = (real_data / "captions" / "cc3m_validation.tsv").read_text(encoding="utf-8").splitlines()
    coco = json.loads((real_data / "captions" / "coco_captions_val2017.json").read_text())["annotations"]
    captions = [line.split("\t")[0] for line in lines][::4] + [each["caption"] for each in coco][::6]
    assert len(captions) > 8000
    for caption in captions:
        assert words(caption) == word_tokenize(caption, preserve_line=True), caption


def texts_of(tokens: Tokens) -> list[list[str]]:
    names = list(tokens.types)
    parts = [names[number] for number in tokens.ids]
    return [parts[one:two] for one, two in zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True)]


def test_the_short_way_for_plain_lines_gives_the_same_tokens(real_data) -> None:
    draw = random.Random(1)
    coco = json.loads((real_data / "captions" / "coco_captions_val2017.json").read_text())["annotations"]
    lines = [each["caption"].replace("\n", " ") for each in coco][::6]
    lines += [
        "g\u0130mme that",
        "a dog .",
        ".",
        " . ",
        "a dog.  ",
        "U.S.",
        "x..",
        "\u3000",
        "can not",
        "he Cannot sit.",
    ]
    for _ in range(20_000):
        count = draw.randint(0, 5)
        lines.append("".join(draw.choice(PARTS) + (" " if draw.random() < 0.6 else "") for _ in range(count)))
    for line, ours in zip(lines, texts_of(tokenise(lines, Types())), strict=True):
        assert ours == words(line), repr(line)
    broken = [*lines[:50], "a \ud800 cat, two dogs."]
    assert texts_of(tokenise(broken, Types())) == [words(line) for line in broken]


@pytest.mark.parametrize(
    "text", ["a" * 100_000, "a. " * 40_000, "'" * 100_000, ". " + " " * 100_000 + "x", ",:" * 50_000]
)
def test_hostile_lines_are_cheap(text: str) -> None:
    start = time.process_time()
    tokens = tokenise([text], Types())
    assert time.process_time() - start < 0.5
    assert len(tokens.ids) <= MAX_WORDS


def test_numbers_of_types() -> None:
    types = Types()
    tokens = tokenise(["a dog, a cat", "", "cat"], types)
    assert list(types) == ["a", "dog", ",", "cat"]
    assert tokens.ids.tolist() == [0, 1, 2, 0, 3, 3]
    assert tokens.offsets.tolist() == [0, 5, 5, 6]
    assert tokens.line.tolist() == [0, 0, 0, 0, 0, 2]
    taken = tokens.take(np.array([2, 1, 0]))
    assert taken.ids.tolist() == [3, 0, 1, 2, 0, 3]
    assert taken.offsets.tolist() == [0, 1, 1, 6]


def test_columns_are_worked_out_once_per_type() -> None:
    asked: list[str] = []

    def length(word: str) -> tuple[int]:
        asked.append(word)
        return (len(word),)

    columns, types = TypeColumns(length, 1), Types()
    tokenise(["a dog"], types)
    assert columns.of(types).tolist() == [[1], [3]]
    tokenise(["a horse"], types)
    assert columns.of(types).tolist() == [[1], [3], [5]]
    assert asked == ["a", "dog", "horse"]
    assert columns.of(Types()).shape == (0, 1)
    other = Types()
    tokenise(["a dog barks"], other)
    assert columns.some(other, np.array([2])).tolist() == [[0], [0], [5]]
    assert asked[3:] == ["barks"]
    assert columns.of(other).tolist() == [[1], [3], [5]]
    assert asked[3:] == ["barks", "a", "dog"]


def test_no_lines() -> None:
    empty = tokenise([], Types())
    assert isinstance(empty, Tokens) and empty.ids.shape == (0,) and empty.offsets.tolist() == [0]
