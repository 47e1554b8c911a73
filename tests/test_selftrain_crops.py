"""Self-training's labels and crops: which pixels are kept, that labels move with pixels, and what ignored ones cost."""

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.inference import Geometry
from pipeline.selftraining import students
from pipeline.selftraining.config import CropConfig
from pipeline.selftraining.crops import IGNORED, CropLoader, LabelledBatch, random_crop
from pipeline.selftraining.labels import PseudoLabels, floors
from pipeline.training import Progress

GEOMETRY = Geometry(short_side=32, long_side=2048, window=32, stride=16, multiple=1, antialias=True)


def test_floors_keep_a_share_of_every_class():
    counts = np.zeros((3, 256), np.int64)
    counts[0, [10, 20, 30, 40]] = 25  # four quarters
    counts[1, 200] = 7  # all tie
    got = floors(counts, 0.5)
    assert got.tolist() == [30, 200, 0]
    assert floors(counts, 0.51).tolist() == [20, 200, 0] and floors(counts, 1.0)[0] == 10


def test_the_filter_ignores_the_least_sure_pixels_of_each_class(tmp_path):
    rng = np.random.default_rng(0)
    labels, sure = rng.integers(0, 3, (2, 20, 30), dtype=np.uint8), rng.integers(0, 256, (2, 20, 30), dtype=np.uint8)
    for index in range(2):
        Image.fromarray(np.stack([labels[index], sure[index]], 2), "LA").save(tmp_path / f"{index}.png")
    pseudo = PseudoLabels(tmp_path, ["0", "1"], 3, 0.6)
    kept = np.stack([pseudo("0"), pseudo("1")])
    assert ((kept == labels) | (kept == IGNORED)).all()
    for index in range(3):
        mine = labels == index
        floor = sure[mine & (kept != IGNORED)].min()
        assert (sure[mine & (kept == IGNORED)] < floor).all()
        assert 0.6 <= (kept[mine] != IGNORED).mean() < 0.63
    assert np.array_equal(PseudoLabels(tmp_path, ["0", "1"], 3, 1.0)("0"), labels[0])


def coordinates(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """An image whose first channels are its rows and columns, and labels that are the cells of 8 pixels."""
    rows, columns = np.mgrid[:height, :width]
    image = np.stack([4 * rows, 4 * columns, np.zeros_like(rows)], 2).astype(np.uint8)
    return image, ((rows // 8) * 8 + columns // 8).astype(np.uint8)


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.7])
def test_pixels_and_labels_move_together(factor):
    image, labels = coordinates(32, 48)
    config = CropConfig(size=24, scale=(factor, factor), flip_chance=0.5)
    for seed in range(20):
        pixels, moved = random_crop(image, labels, config, GEOMETRY, np.random.default_rng(seed))
        assert pixels.shape == (24, 24, 3) and moved.shape == (24, 24)
        inside = moved != IGNORED
        assert inside.mean() == pytest.approx(min(1, 32 * factor / 24) * min(1, 48 * factor / 24), abs=1e-6)
        down, across = pixels[..., 0] / 4, pixels[..., 1] / 4
        off_edge = inside & (np.abs(down % 8 - 4) < 2.4) & (np.abs(across % 8 - 4) < 2.4)
        assert off_edge.sum() > 20
        assert (moved == (down // 8) * 8 + across // 8)[off_edge].all()


def test_the_loader_starts_at_any_sample_and_visits_every_image_once_an_epoch():
    config = CropConfig(size=16, scale=(0.8, 1.2), flip_chance=0.5)

    def loader(threads):
        return CropLoader(
            [f"id{i}" for i in range(10)],
            lambda image_id: coordinates(32, 40),
            crops=config,
            geometry=GEOMETRY,
            batch_size=4,
            seed=3,
            threads=threads,
        )

    def first(count, position=0, threads=0):
        batches = loader(threads).batches(position)
        found = [next(batches) for _ in range(count)]
        batches.close()
        return [(loaded.position, loaded.batch.to("cpu")) for loaded in found]

    whole, later, threaded = first(5), first(3, position=8), first(5, threads=3)
    uids = [uid for _, batch in whole for uid in batch.uids]
    assert sorted(uids[:10]) == sorted(uids[10:]) == sorted(f"id{i}" for i in range(10)) and uids[:10] != uids[10:]
    assert [position for position, _ in whole] == [4, 8, 12, 16, 20]
    for (_, a), (_, b) in [*zip(whole[2:], later, strict=True), *zip(whole, threaded, strict=True)]:
        assert a.uids == b.uids and torch.equal(a.pixels, b.pixels) and torch.equal(a.labels, b.labels)


def test_ignored_pixels_cost_nothing():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    labels = torch.randint(0, 3, (2, 8, 8), dtype=torch.uint8)
    labels[0, :, :4] = IGNORED

    class Given(torch.nn.Module):
        def forward(self, pixels):
            return logits

    def terms(labels):
        batch = LabelledBatch(torch.zeros(2, 3, 8, 8), labels, ["a", "b"])
        return students.loss(Given(), batch, Progress(0, 2, 2))

    large = torch.nn.functional.interpolate(logits, (8, 8), mode="bilinear")
    costs = [
        -large[i, :, y, x].log_softmax(0)[labels[i, y, x].long()]
        for i in range(2)
        for y in range(8)
        for x in range(8)
        if labels[i, y, x] != IGNORED
    ]
    torch.testing.assert_close(terms(labels)["total"], torch.stack(costs).mean())
    nothing = terms(torch.full_like(labels, IGNORED))
    assert nothing["total"] == 0 and nothing["agreement"] == 0
