"""Tokenizers that know a mask token: CLIP's byte pairs with one more id, and BERT's WordPiece from a vocab.txt.

A row is a start token (BERT's [CLS]), the pieces, an end token and zeros. In both, "[MASK]" in a text is one token;
captions are untrusted and go through `without_masks` first.
Axes: batch = texts, length = context length in tokens.
"""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from pipeline.artifacts.files import BadInput
from pipeline.text.tokenizers import CHARACTERS_PER_TOKEN, BytePairTokenizer

MASK = "[MASK]"
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", MASK)


class MaskedBytePairs(BytePairTokenizer):
    """CLIP's tokenizer with the mask as the id behind its last one.

    NOTE the end token no longer has the largest id: find it with `pipeline.nn.text.inside_text`.
    """

    name = "bpe"

    def __init__(self, context_length: int) -> None:
        super().__init__(context_length)
        self.mask = self.vocab_size
        self.vocab_size += 1

    def encode(self, text: str) -> list[int]:
        """Ids of the text without start and end."""
        first, *others = text[: CHARACTERS_PER_TOKEN * self.context_length].split(MASK)
        ids = super().encode(first)
        for part in others:
            ids += [self.mask, *super().encode(part)]
        return ids


class WordPieces:
    """BERT's tokenizer (lower-cased), from the vocab.txt beside its weights.

    Deviates: as the byte pairs, texts over `CHARACTERS_PER_TOKEN * context_length` characters are cut first.

    Raises:
        BadInput: no such file, or one without BERT's special tokens.
    """

    name = "wordpiece"

    def __init__(self, vocab_file: Path, context_length: int) -> None:
        remedy = "Copy vocab.txt of the BERT whose weights are used, such as bert-base-uncased"
        if not vocab_file.is_file():
            raise BadInput(vocab_file, "no such file", remedy)
        self.context_length, self._file = context_length, vocab_file
        words = vocab_file.read_text(encoding="utf-8").splitlines()
        number = {word: index for index, word in enumerate(words)}
        absent = [word for word in _SPECIAL if word not in number]
        if absent or number["[PAD]"]:
            raise BadInput(vocab_file, f"not BERT's vocabulary: lacks {absent or '[PAD] as its first word'}", remedy)
        self.vocab_size = len(words)
        self.sot, self.eot, self.mask = number["[CLS]"], number["[SEP]"], number[MASK]

    def __reduce__(self) -> tuple[type, tuple[Path, int]]:
        """Travels to a worker process as its file."""
        return type(self), (self._file, self.context_length)

    @cached_property
    def _pieces(self) -> Any:
        from transformers import BertTokenizer

        return BertTokenizer(vocab=str(self._file))

    def encode(self, text: str) -> list[int]:
        """Ids of the text without start and end."""
        cut = text[: CHARACTERS_PER_TOKEN * self.context_length].encode("utf-8", "replace").decode("utf-8")
        # Without truncation or padding the tokenizer keeps no state, so that threads can share it.
        return self._pieces(cut, add_special_tokens=False)["input_ids"]

    def __call__(self, texts: list[str]) -> Int64[Tensor, "batch length"]:
        """Rows of start, pieces, end, zeros; too long texts keep their end token."""
        rows = torch.zeros(len(texts), self.context_length, dtype=torch.int64)
        for row, text in enumerate(texts):
            ids = [self.sot, *self.encode(text)[: self.context_length - 2], self.eot]
            rows[row, : len(ids)] = torch.tensor(ids)
        return rows


MaskTokenizer = MaskedBytePairs | WordPieces


def without_masks(text: str) -> str:
    """The text with a "[MASK]" of its own in lower case: the pieces of what was written, and no mask token."""
    return text.replace(MASK, MASK.lower())
