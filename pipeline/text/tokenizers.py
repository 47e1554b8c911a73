"""Text to token ids: CLIP's byte-pair encoding as open_clip ships it.

Axis legend: batch = texts, length = context length in tokens.

Layout of a row: SOT, the pieces, EOT, zeros. Too long texts keep EOT as the last token. EOT has the largest id
of the vocabulary, so its position is `ids.argmax(-1)`, as CLIP and GroupViT read it.
Source: GroupViT card section 6; CLIP (open_clip's SimpleTokenizer).
"""

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from pipeline.text import wheel

# A text beyond this many characters per token of context is cut before cleaning. English needs 4-5 a token.
CHARACTERS_PER_TOKEN = 64
# The merge loop is quadratic in the length of a word, and captions are untrusted: longer words are cut to this.
LONGEST_WORD = 256
# Words whose pieces are remembered. An image-caption corpus of 12M has more types than memory should hold.
CACHED_WORDS = 200_000


@lru_cache(maxsize=1)
def _simple_tokenizer() -> Any:
    return wheel.module("open_clip", "tokenizer").SimpleTokenizer()


def _clean(text: str) -> str:
    """As open_clip cleans a text. Most captions have nothing that its repairs (ftfy, entities) act on."""
    if text.isascii() and text.isprintable() and "&" not in text:
        return " ".join(text.split()).lower()
    return _simple_tokenizer().clean_fn(text.encode("utf-8", "replace").decode("utf-8"))


class BytePairTokenizer:
    """Callable list[str] -> ids. Equal to open_clip's SimpleTokenizer on texts within the bounds above.

    Deviates: texts over `CHARACTERS_PER_TOKEN * context_length` characters and words over `LONGEST_WORD` characters
    are cut first, and lone surrogates become "?": a 100 kB caption must cost milliseconds and never raise.
    """

    name = "bpe"

    def __init__(self, context_length: int):
        if context_length < 3:
            raise ValueError(f"context_length must be at least 3 (SOT, one piece, EOT), not {context_length}")
        self.context_length = context_length
        base = _simple_tokenizer()
        self.vocab_size: int = base.vocab_size
        self.sot: int = base.sot_token_id
        self.eot: int = base.eot_token_id
        self._pieces: dict[str, list[int]] = {}

    def __reduce__(self) -> tuple[type, tuple[int]]:
        """Travels to a worker process as its context length; the vocabulary is read there."""
        return type(self), (self.context_length,)

    def _word(self, word: str) -> list[int]:
        """Ids of one word of the cleaned text."""
        known = self._pieces.get(word)
        if known is not None:
            return known
        base = _simple_tokenizer()
        symbols = "".join(base.byte_encoder[byte] for byte in word[:LONGEST_WORD].encode("utf-8"))
        ids = [base.encoder[piece] for piece in base.bpe(symbols).split(" ")]
        if len(self._pieces) >= CACHED_WORDS:
            self._pieces.clear()
        if len(base.cache) >= CACHED_WORDS:
            base.cache.clear()
            base.cache.update({"<start_of_text>": "<start_of_text>", "<end_of_text>": "<end_of_text>"})
        self._pieces[word] = ids
        return ids

    def encode(self, text: str) -> list[int]:
        """Ids of the text without SOT and EOT, not cut to the context length."""
        base = _simple_tokenizer()
        ids: list[int] = []
        for word in base.pat.findall(_clean(text[: CHARACTERS_PER_TOKEN * self.context_length])):
            ids += self._word(word)
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text of the ids, lower-cased and with a space after each word."""
        return _simple_tokenizer().decode(ids)

    def __call__(self, texts: list[str]) -> Int64[Tensor, "batch length"]:
        """Rows of SOT, pieces, EOT, zeros; int64."""
        rows = np.zeros((len(texts), self.context_length), np.int64)
        for row, text in zip(rows, texts, strict=True):
            ids = [self.sot, *self.encode(text)[: self.context_length - 2], self.eot]
            row[: len(ids)] = ids
        return torch.from_numpy(rows)
