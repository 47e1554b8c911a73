"""The tokenizer against open_clip's own, on real and on hostile text."""

import pickle
import time

import pytest
import torch

from pipeline.text import wheel
from pipeline.text.tokenizers import BytePairTokenizer

ODD = [
    "",
    " ",
    "A Photo of a CAT.",
    "don't &amp;amp; stop",
    "日本語 العربية 🐕‍🦺",
    "tab\tand\nline",
    "x" * 300,
    "<b>dog</b>",
]


@pytest.fixture(scope="module")
def reference():
    return wheel.module("open_clip", "tokenizer").SimpleTokenizer()


def test_equal_to_open_clip_on_odd_text(reference) -> None:
    texts = [text for text in ODD if len(text) < 256]
    for length in (8, 77):
        assert torch.equal(BytePairTokenizer(length)(texts), reference(texts, length))


def test_equal_to_open_clip_on_real_captions(reference, real_data) -> None:
    lines = (real_data / "captions" / "cc3m_validation.tsv").read_text(encoding="utf-8").splitlines()[:2000]
    captions = [line.split("\t")[0] for line in lines]
    assert torch.equal(BytePairTokenizer(32)(captions), reference(captions, 32))


def test_vocabulary_and_end_of_text() -> None:
    bpe = BytePairTokenizer(6)
    ids = bpe(["a dog", "one two three four five six seven", ""])
    assert bpe.vocab_size == 49408
    assert ids.dtype == torch.int64
    assert ids[0].tolist() == [49406, 320, 1929, 49407, 0, 0]
    assert ids.argmax(dim=1).tolist() == [3, 5, 1]
    assert bpe.decode([320, 1929]) == "a dog "


@pytest.mark.parametrize(
    "text", ["a" * 100_000, "ab" * 50_000, "dog " * 25_000, " " * 100_000, "é🐕" * 30_000, "\ud800x"]
)
def test_hostile_text_is_cheap_and_never_raises(text: str) -> None:
    start = time.process_time()
    ids = BytePairTokenizer(77)([text])
    assert time.process_time() - start < 1.0
    assert (ids == 49407).sum() == 1


def test_travels_to_a_worker() -> None:
    bpe = BytePairTokenizer(16)
    bpe(["something cached"])
    payload = pickle.dumps(bpe)
    assert len(payload) < 200
    assert torch.equal(pickle.loads(payload)(["a dog"]), bpe(["a dog"]))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="context_length"):
        BytePairTokenizer(2)
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        wheel.module("no_such_package", "x")
    with pytest.raises(ModuleNotFoundError, match="open_clip has no nothing.py"):
        wheel.module("open_clip", "nothing")
