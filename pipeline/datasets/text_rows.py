"""Texts of any length side by side in rows of one length: the padding that is left is what no text fits into.

A caption has a fifth of CLIP's 77 tokens and the longest of a batch nearly all, so that padding to the longest leaves
most of a text tower's work to padding. Source: Krell et al. 2021, arXiv 2107.02027 (packing by descending length).
"""

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from pipeline.interfaces import TextRows
from pipeline.nn.text import inside_text

MULTIPLE = 8  # of a row's length, for the kernels of a GPU


def in_rows(token_ids: Int64[Tensor, "texts length"], end_token: int) -> TextRows:
    """The texts, from the longest to the shortest each into the fullest row that has room for it."""
    lengths = inside_text(token_ids, end_token).sum(1).tolist()
    width = -(-token_ids.shape[1] // MULTIPLE) * MULTIPLE
    with_room: list[list[int]] = [[] for _ in range(width + 1)]  # rows by the tokens that they have room for
    number, starts = 0, [0] * len(lengths)
    for text in sorted(range(len(lengths)), key=lambda text: -lengths[text]):
        length = lengths[text]
        room = next((room for room in range(length, width) if with_room[room]), width)
        if room < width:
            row = with_room[room].pop()
        else:
            row, number = number, number + 1
        starts[text] = row * width + width - room
        with_room[room - length].append(row)
    ids, places = np.zeros(number * width, np.int64), np.zeros(number * width, np.int64)
    counted = np.arange(token_ids.shape[1])
    for text, start, length in zip(token_ids.numpy(), starts, lengths, strict=True):
        ids[start : start + length] = text[:length]
        places[start : start + length] = counted[:length]
    ends = torch.tensor(starts) + torch.tensor(lengths) - 1
    shape = (number, width)
    return TextRows(torch.from_numpy(ids).view(shape), torch.from_numpy(places).view(shape), ends)
