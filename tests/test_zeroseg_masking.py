"""ZeroSeg's masked autoencoder: which patches are hidden, the decoder's order, and positions."""

import math

import pytest
import torch
from zeroseg_cases import batch, model

from pipeline import params
from pipeline.nn import masked_autoencoder as mae


def test_paper_counts():
    masking = mae.draw_masking(5, 196, 0.60, torch.device("cpu"))
    assert masking.kept.shape == (5, 78) and masking.hidden.sum(dim=1).tolist() == [118] * 5
    for kept, hidden in zip(masking.kept, masking.hidden, strict=True):
        assert len(set(kept.tolist())) == 78 and not hidden[kept].any()
    assert len({tuple(row.tolist()) for row in masking.kept.sort(dim=1).values}) == 5, "every sample its own"
    assert mae.draw_masking(2, 10, 0.0, torch.device("cpu")).hidden.sum() == 0


def test_all_places_are_hidden_equally_often():
    torch.manual_seed(0)
    share = mae.draw_masking(4000, 10, 0.6, torch.device("cpu")).hidden.float().mean(dim=0)
    torch.testing.assert_close(share, torch.full((10,), 0.6), atol=0.04, rtol=0)


def test_unshuffle_puts_every_patch_back():
    tokens = torch.arange(12.0).view(1, 12, 1).expand(3, -1, 2)
    masking = mae.draw_masking(3, 12, 0.5, torch.device("cpu"))
    visible = tokens.gather(1, masking.kept[:, :, None].expand(-1, -1, 2))
    found = mae.unshuffle(visible, torch.full((1, 1, 2), -1.0), masking.restore)
    for i in range(3):
        for n in range(12):
            assert found[i, n].tolist() == ([-1, -1] if masking.hidden[i, n] else [n, n])


def test_patches_by_loops():
    pixels = torch.randn(2, 3, 6, 9)
    found = mae.patchify(pixels, 3)
    assert found.shape == (2, 6, 27)
    for row in range(2):
        for column in range(3):
            cell = pixels[1, :, 3 * row : 3 * row + 3, 3 * column : 3 * column + 3]
            torch.testing.assert_close(found[1, row * 3 + column], cell.permute(1, 2, 0).flatten())
    patches = mae.normalise_patches(found)
    torch.testing.assert_close(patches.mean(dim=2), torch.zeros(2, 6), atol=1e-5, rtol=0)
    torch.testing.assert_close(patches.var(dim=2), torch.ones(2, 6), atol=1e-4, rtol=0)


def test_positions_by_loops():
    """MAE: zero for the class token; sine and cosine of the column, then of the row."""
    found = mae.fixed_positions(2, 3, 8)
    assert found.shape == (1, 7, 8) and found[0, 0].abs().sum() == 0
    for row in range(2):
        for column in range(3):
            expected = []
            for place in (column, row):
                frequencies = [10000 ** (-k / 2) for k in range(2)]
                expected += [math.sin(place * f) for f in frequencies] + [math.cos(place * f) for f in frequencies]
            torch.testing.assert_close(found[0, 1 + row * 3 + column], torch.tensor(expected))


def test_positions_are_fixed_and_resized_without_the_class_row():
    tower = model()
    assert not {name for name, _ in tower.named_parameters() if "pos_embed" in name}
    positions = tower.autoencoder.pos_embed
    resized = mae.resize_positions(positions, (4, 4), (8, 6))
    assert resized.shape == (1, 49, 16) and resized[0, 0].abs().sum() == 0
    assert mae.resize_positions(positions, (4, 4), (4, 4)) is positions


def test_hidden_pixels_do_not_reach_the_segments():
    """With a plain patch convolution, what is hidden changes nothing but the target."""
    tower, data = model(), batch(2)
    torch.manual_seed(5)
    encoded = tower.autoencoder.encode(data.pixels)
    hidden = encoded.masking.hidden.view(2, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    repainted = torch.where(hidden, torch.randn_like(data.pixels), data.pixels)
    torch.manual_seed(5)
    changed = tower.autoencoder.encode(repainted)
    torch.testing.assert_close(changed.tokens, encoded.tokens)
    assert encoded.tokens.shape == (2, 8, 16) and encoded.cls.shape == (2, 16)


def test_eval_hides_nothing_and_keeps_the_order():
    tower = model().eval()
    encoded = tower.autoencoder.encode(batch(2).pixels)
    assert encoded.masking.kept.tolist() == [list(range(16))] * 2 and not encoded.masking.hidden.any()


def test_an_image_of_broken_patches_is_refused():
    with pytest.raises(params.ParamsError, match="no whole number"):
        model(encoder={"image_size": 36})
