"""OVSegmentor's batches: captions and their masks, and partners that share an entity."""

from random import Random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from ovsegmentor_cases import BUS, CAT, DOG, batch, config, make_index, make_shard, model, sample
from pair_shards import picture

from pipeline.artifacts.files import BadInput
from pipeline.datasets.joined import Sample
from pipeline.datasets.pairs import PairShard
from pipeline.datasets.partners import Partners
from pipeline.methods import ovsegmentor
from pipeline.text.mask_tokens import MaskedBytePairs, without_masks
from pipeline.text.tokenizers import BytePairTokenizer
from pipeline.training.phases import TrainingData

# Captions.


def test_what_a_batch_says():
    tower = model(completion={"kind": "mlm"})
    rows = batch(tower)
    assert rows.mask_classes[0][rows.mask_classes[0] >= 0].tolist() == [DOG, CAT]
    assert torch.equal(rows.mask_classes >= 0, rows.masked_ids == tower.tokenizer.mask)
    tower = model()
    rows = batch(tower, partners=True)
    say = [
        tower.tokenizer.decode([token for token in ids if 0 < token < tower.tokenizer.sot])
        for ids in rows.answer_ids.tolist()
    ]
    assert [words.strip() for words in say[:2]] == ["a photo of a dog and cat", "a photo of a dog and bus"]
    assert say[4].strip() == "a photo of a", "no entity: the template's beginning alone"
    assert torch.equal(rows.masked_ids[4], rows.token_ids[4]) and rows.paired.tolist() == [True] * 4 + [False, True]
    assert torch.equal(rows.partner_pixels[4], rows.pixels[4]) and torch.equal(rows.partner_pixels[0], rows.pixels[1])


@pytest.mark.parametrize("kind", ["all", "mlm", "multi_label", "none"])
def test_a_caption_writes_no_masks_of_its_own(kind):
    tower = model(completion={"kind": kind})
    texts = ["[MASK] [MASK]", "b", "a [MASK] dog [MASK]"]
    rows = batch(tower, samples=[sample(3)._replace(captions=[text]) for text in texts])
    mask = tower.tokenizer.mask
    assert torch.equal(rows.token_ids, BytePairTokenizer(12)(texts))
    assert rows.prompt_ids is None or not (rows.prompt_ids == mask).any()
    if rows.masked_ids is not None:
        assert (rows.masked_ids == mask).sum(dim=1).tolist() == [0, 0, 1]
    if kind == "mlm":
        assert rows.mask_classes[rows.masked_ids == mask].tolist() == [DOG]


def test_seen_tokens_are_those_of_captions_that_name_the_mask(tmp_path):
    shard = make_shard(tmp_path, "00000", 2)
    path = shard.download / "00000.parquet"
    table = pq.read_table(path)
    text = pa.array(["a [MASK] here"] * len(table), table["caption"].type)
    pq.write_table(table.set_column(table.column_names.index("caption"), "caption", text), path)
    seen = ovsegmentor.vocabulary(config(), TrainingData(shards=[shard], index=None))
    ids = MaskedBytePairs(12)([without_masks("a [MASK] here"), "[MASK]"])
    assert (seen(ids) < seen.size - 1).all(), "the last row is for what was never seen"


# Partners.


def test_partners_share_an_entity_and_are_never_the_row_itself(tmp_path):
    shards = [make_shard(tmp_path, "00000", 4), make_shard(tmp_path, "00001", 4, rejected=(1,))]
    named = [[[DOG], [DOG, CAT], [CAT], [BUS]], [[DOG], [CAT], []]]
    partners = Partners(shards, make_index(tmp_path / "index", named))
    uids = [_uids(shard) for shard in shards]
    seen, shown = set(), picture(0)
    for seed in range(80):
        row = Sample(uids[0][1], [""], [], [DOG, CAT], shown)
        entity, *place = partners.place(row, Random(seed))
        assert entity in named[place[0]][place[1]] and place != [0, 1]
        seen.add((entity, *place))
    assert seen == {(DOG, 0, 0), (DOG, 1, 0), (CAT, 0, 2), (CAT, 1, 1)}
    alone = Sample(uids[0][3], [""], [], [BUS], shown)
    assert partners.place(alone, Random(0)) == (BUS, 0, 3)
    drawn = partners.draw(alone, Random(0))
    assert np.abs(drawn.image.astype(int) - picture(3)).max() < 12
    first = partners.draw(Sample(uids[1][1], [""], [], [CAT], shown), Random(2))
    again = Partners(shards, tmp_path / "index").draw(Sample(uids[1][1], [""], [], [CAT], shown), Random(2))
    assert first.place == again.place and np.array_equal(first.image, again.image)
    assert np.abs(first.image.astype(int) - picture(first.place[1])).max() < 12
    assert partners.draw(Sample("0" * 16, [""], [], [], shown), Random(0)) is None


def test_a_broken_partner_is_passed_over(tmp_path):
    shard = make_shard(tmp_path, "00000", 3, broken=(1, 2))
    partners = Partners([shard], make_index(tmp_path / "index", [[[DOG]] * 3]))
    row = Sample(_uids(shard)[0], [""], [], [DOG], picture(0))
    assert partners.draw(row, Random(0)) is None
    with pytest.raises(BadInput, match="shard 00000"):
        Partners([], tmp_path / "index")


def _uids(shard: PairShard) -> list[str]:
    from pipeline.text.verdicts import kept

    return kept(shard.filtered, "uid")["uid"].to_pylist()
