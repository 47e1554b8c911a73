"""OVSegmentor's batches: captions and their masks, and partners that share an entity."""

from pathlib import Path
from random import Random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from ovsegmentor_cases import BUS, CAT, CC4M, DOG, batch, config, make_index, make_shard, model, sample
from pair_shards import picture, stored

from pipeline.artifacts.files import BadInput
from pipeline.datasets.entity_batches import EntityCollate, EntityTransform
from pipeline.datasets.joined import Sample
from pipeline.datasets.pairs import PairLoader, PairShard
from pipeline.datasets.partners import Partners
from pipeline.methods import ovsegmentor
from pipeline.text.mask_tokens import MaskedBytePairs, without_masks
from pipeline.text.tokenizers import BytePairTokenizer
from pipeline.training import Loaded
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
    partners = Partners(shards, make_index(tmp_path / "index", shards, named))
    uids = [_uids(shard) for shard in shards]
    seen, image = set(), stored()
    for seed in range(80):
        row = Sample(uids[0][1], [""], [], [DOG, CAT], image)
        partner = partners.draw(row, Random(seed))
        shard, kept_row = partner.place
        assert partner.entity in named[shard][kept_row] and partner.place != (0, 1)
        seen.add((partner.entity, shard, kept_row))
    assert seen == {(DOG, 0, 0), (DOG, 1, 0), (CAT, 0, 2), (CAT, 1, 1)}
    alone = Sample(uids[0][3], [""], [], [BUS], image)
    drawn = partners.draw(alone, Random(0))
    assert (drawn.entity, drawn.place) == (BUS, (0, 3))
    assert np.abs(drawn.image.read().astype(int) - picture(3)).max() < 12
    first = partners.draw(Sample(uids[1][1], [""], [], [CAT], image), Random(2))
    again = Partners(shards, tmp_path / "index").draw(Sample(uids[1][1], [""], [], [CAT], image), Random(2))
    assert first == again
    assert np.abs(first.image.read().astype(int) - picture(first.place[1])).max() < 12
    assert partners.draw(Sample("0" * 16, [""], [], [], image), Random(0)) is None


def loaded(shard: PairShard, index: Path) -> Loaded:
    """The first batch of a shard's six rows, which all name class 0, with partners."""
    tower = model()
    prepare = EntityTransform(
        views=tower.config.mask.views,
        vocabulary=CC4M,
        completion="none",
        strip="clean",
        templates=(),
        num_prompts=0,
        partners=Partners([shard], index),
    )
    collate = EntityCollate(tower.tokenizer, "none", partners=True, longest=True)
    settings = {"batch_size": 6, "seed": 0, "shuffle": tower.config.shuffle, "threads": 0}
    return next(PairLoader([shard], **settings, prepare=prepare, collate=collate).batches(0))


def test_a_row_whose_partner_does_not_decode_is_left_out_and_listed(tmp_path):
    shard = make_shard(tmp_path, "00000", 6, broken=(1,))
    found = loaded(shard, make_index(tmp_path / "index", [shard], [[[0], [0], [], [], [], []]]))
    uids, reasons = _uids(shard), dict(found.failures)
    assert "000000001.jpg" in reasons.pop(uids[1]) and uids[0] in reasons, "the only other that names it is broken"
    assert all("partner row 1" in reason for reason in reasons.values())
    shown = found.batch.to("cpu")
    assert set(shown.uids) == {*uids} - {uids[1], *reasons} and shown.paired.all()


def test_where_there_is_no_partner_a_rows_own_view_stands(tmp_path):
    shard = make_shard(tmp_path, "00000", 6)
    shown = loaded(shard, make_index(tmp_path / "index", [shard], [[[DOG]] * 6])).batch.to("cpu")
    assert not shown.paired.any() and torch.equal(shown.pixels, shown.partner_pixels)


def test_an_index_of_other_shards_is_refused(tmp_path):
    with pytest.raises(BadInput, match="shard 00000"):
        Partners([], make_index(tmp_path / "index", [make_shard(tmp_path, "00000", 1)], [[[DOG]]]))


def _uids(shard: PairShard) -> list[str]:
    from pipeline.text.verdicts import kept

    return kept(shard.filtered, "uid")["uid"].to_pylist()
