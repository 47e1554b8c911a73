"""Texts side by side in rows: none lost, next to no padding, and the vectors, losses and gradients of each alone."""

from contextlib import nullcontext
from dataclasses import replace
from random import Random

import groupvit_cases
import pseudo_mask_vit_cases
import pytest
import sseg_cases
import torch
from encoders_cases import clip_config

from pipeline.cli.fit_batch import longest_texts
from pipeline.datasets.batches import PairCollate, Prepared
from pipeline.datasets.entity_batches import EntityCollate
from pipeline.datasets.text_rows import in_rows
from pipeline.encoders.clip_training import ClipTraining
from pipeline.encoders.small_clip import SmallClip
from pipeline.interfaces import TextRows, TrainBatch
from pipeline.methods import groupvit
from pipeline.nn.attention import one_kernel
from pipeline.nn.text import TextSizes, TextTransformer, Vocabulary
from pipeline.text.mask_tokens import MaskedBytePairs
from pipeline.text.tokenizers import BytePairTokenizer
from pipeline.training import Progress
from pipeline.training.phases import TrainingData

END, CONTEXT = 99, 21


def texts(number: int, context: int = CONTEXT, seed: int = 0) -> torch.Tensor:
    """Texts of 2 tokens to all that the context has, noise behind their ends."""
    rng = Random(seed)
    rows = []
    for text in range(number):
        length = context if text == 1 else rng.randint(2, context)
        noise = [rng.randint(1, 97) for _ in range(context - length)]
        rows.append([98, *(rng.randint(1, 97) for _ in range(length - 2)), END, *noise])
    return torch.tensor(rows)


def tower(pooling="eos", block="timm", vocabulary=None) -> TextTransformer:
    torch.manual_seed(0)
    sizes = TextSizes(context_length=CONTEXT, width=16, layers=3, heads=2, pooling=pooling)
    found = TextTransformer(sizes, vocab_size=100, end_token=END, out_dim=8, vocabulary=vocabulary, block=block)
    torch.nn.init.normal_(found.position)  # that a wrong place shows
    return found


def read_back(rows: TextRows) -> list[list[int]]:
    """Every text, backwards from its end to its place 0."""
    ids, places = rows.token_ids.flatten().tolist(), rows.places.flatten().tolist()
    found = []
    for end in rows.ends.tolist():
        start = end - places[end]
        assert places[start : end + 1] == list(range(end + 1 - start))
        assert start // rows.token_ids.shape[1] == end // rows.token_ids.shape[1], "a text goes on in the next row"
        found.append(ids[start : end + 1])
    return found


@pytest.mark.parametrize("number", [1, 2, 7, 300])
def test_every_text_is_there_once(number):
    ids = texts(number)
    rows = in_rows(ids, END)
    expected = [text[: text.index(END) + 1] for text in ids.tolist()]
    assert read_back(rows) == expected
    assert rows.token_ids.shape[1] == 24 and rows.token_ids.dtype == rows.places.dtype == torch.int64
    tokens = sum(len(text) for text in expected)
    assert int((rows.token_ids != 0).sum()) == tokens, "no text lies on another"
    assert bool((rows.places[rows.token_ids == 0] == 0).all())


def test_a_text_without_an_end_counts_whole():
    ids = torch.tensor([[98, 5, 6, 7], [98, END, 0, 0]])
    rows = in_rows(ids, END)
    assert read_back(rows) == [[98, 5, 6, 7], [98, END]]


def test_hardly_anything_is_padding():
    """Lengths like CC3M's, a fifth of the context: padded they are 77 long."""
    rng = Random(0)
    ids = torch.zeros(1000, 77, dtype=torch.int64)
    for row in ids:
        length = min(77, 5 + int(rng.expovariate(1 / 8)))
        row[: length - 1] = 5
        row[length - 1] = END
    rows = in_rows(ids, END)
    assert (ids != 0).sum() / rows.token_ids.numel() > 0.98
    assert torch.equal(in_rows(ids, END).token_ids, rows.token_ids), "the same texts lie in the same rows"


@pytest.mark.parametrize("kernel", [one_kernel, nullcontext])
@pytest.mark.parametrize("block", ["timm", "clip"])
def test_vectors_and_gradients_are_those_of_each_text_alone(block, kernel):
    ids = texts(40)
    models = [tower(block=block).double() for _ in range(2)]
    rows = in_rows(ids, END)
    assert len(rows.token_ids) < 30
    weight = torch.randn(40, 8, generator=torch.Generator().manual_seed(1)).double()
    with kernel():
        alone, together = models[0](ids), models[1](rows)
        for vectors in (alone, together):
            (vectors * weight).sum().backward()
    torch.testing.assert_close(together, alone)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad)


def test_the_table_of_seen_tokens_and_half_precision():
    ids = texts(20)
    model = tower(vocabulary=Vocabulary.of(ids[:9].flatten(), vocab_size=100)).eval()
    rows = in_rows(ids, END)
    torch.testing.assert_close(model(rows), model(ids))
    with torch.autocast("cpu", torch.bfloat16), one_kernel():
        torch.testing.assert_close(model(rows), model(ids), rtol=0.05, atol=0.05)


def test_a_mean_takes_each_text_alone():
    sizes = TextSizes(context_length=8, width=16, layers=1, heads=2, pooling="mean")
    assert not sizes.takes_rows and replace(sizes, pooling="eos").takes_rows
    with pytest.raises(ValueError, match="side by side in a tower that takes their mean"):
        tower("mean")(in_rows(texts(3), END))


# ---- batches


def prepared(captions: list[str], prompts: list[list[str]]) -> list[Prepared]:
    return [Prepared(caption, None, own) for caption, own in zip(captions, prompts, strict=True)]


def test_a_batchs_texts_are_captions_then_first_prompts_then_second():
    tokenise = BytePairTokenizer(12)
    captions, prompts = ["a dog", "two red cars"], [["dog one", "dog two"], ["car one", "car two"]]
    order = [*captions, "dog one", "car one", "dog two", "car two"]
    made = PairCollate(tokenise, rows=True)(prepared(captions, prompts), ["u", "v"], {}).others
    pixels = torch.zeros(2, 3, 4, 4)
    batch = TrainBatch(pixels=pixels, **made).to("meta").to("meta")
    assert isinstance(batch.texts, TextRows) and batch.texts.token_ids.is_meta and batch.texts.ends.is_meta
    found = [tokenise.decode(ids[1:-1]).strip() for ids in read_back(made["rows"])]
    assert found == order
    plain = TrainBatch(pixels=pixels, **PairCollate(tokenise)(prepared(captions, prompts), ["u", "v"], {}).others)
    assert plain.rows is None and torch.equal(plain.texts, tokenise(order))
    alone = PairCollate(tokenise, rows=True)(prepared(captions, [[], []]), ["u", "v"], {}).others
    assert alone["prompt_ids"] is None and len(alone["rows"].ends) == 2


def test_a_batch_that_must_fit_has_texts_of_the_whole_context():
    pairs = PairCollate(BytePairTokenizer(12), rows=True)
    assert longest_texts(pairs) == replace(pairs, rows=False)
    entities = EntityCollate(MaskedBytePairs(12), "none", partners=False, longest=True)
    assert longest_texts(entities) == replace(entities, longest=False)
    assert longest_texts(print) is print


def with_rows(batch: TrainBatch, end: int) -> TrainBatch:
    return replace(batch, rows=in_rows(batch.texts, end))


def groupvit_case():
    return groupvit_cases.model(), groupvit_cases.batch(groupvit_cases.model())


def sseg_case():
    return sseg_cases.model(), sseg_cases.batch(sseg_cases.model())


def pseudo_mask_case():
    return pseudo_mask_vit_cases.model(), pseudo_mask_vit_cases.batch()


def test_a_training_makes_rows_for_a_tower_that_takes_them():
    for text, rows in (({}, True), ({"layers": 0, "pooling": "mean"}, False)):
        [phase] = groupvit.phases(
            groupvit_cases.model(text=text), groupvit_cases.config(text=text), TrainingData(shards=[], index=None)
        )
        assert phase.collate.rows == rows


@pytest.mark.parametrize("case", [groupvit_case, sseg_case, pseudo_mask_case])
def test_a_methods_loss_and_gradients_stay(case):
    losses, grads = [], []
    for rows in (False, True):
        model, batch = case()
        model.train()
        torch.manual_seed(1)
        losses.append(model.loss(with_rows(batch, model.tokenizer.eot) if rows else batch))
        losses[-1]["total"].backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-5)
    assert any(name.startswith("text.") for name in grads[0])


def test_the_clips_loss_stays():
    text = TextSizes(context_length=12, width=16, layers=2, heads=2, pooling="eos")
    config = clip_config()
    config = replace(config, architecture=replace(config.architecture, text=text))
    tokenise = BytePairTokenizer(12)
    captions = ["a dog", "a red car", "the house on a hill", "a dog"]
    ids, prompts = tokenise(captions), tokenise(["a photo of a dog.", "a car.", "a house.", "a dog."] * 2)
    pixels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    batch = TrainBatch(pixels, captions, ids, None, list("abcd"), prompts.unflatten(0, (2, 4)))
    seen = Vocabulary.of(torch.cat([ids.flatten(), prompts.flatten()]), vocab_size=49408)
    torch.manual_seed(0)
    model = ClipTraining(SmallClip(config.architecture, seen, None), config)
    progress = Progress(0, 24, 24)
    torch.testing.assert_close(
        model.loss(with_rows(batch, tokenise.eot), progress), model.loss(batch, progress), rtol=1e-4, atol=1e-5
    )
