"""common/pixels.py against torchvision and against values computed by hand."""

from __future__ import annotations

import pytest
import torch
from torchvision.transforms import v2

from common import pixels
from common.cli import Size
from common.data import resize


def test_turned_hues_are_torchvisions():
    image = torch.rand(3, 30, 40, generator=torch.Generator().manual_seed(0))
    image[:, :10] = (image[:, :10] * 3).round() / 3              # ties between channels, greys, black and white
    for turn in (-0.5, -0.2, 0.0, 0.013, 0.3, 0.5):
        expected = v2.functional.adjust_hue(image, turn)
        torch.testing.assert_close(pixels.turn_hue(image, turn), expected, rtol=0, atol=1e-5)
    red = torch.tensor([0.75, 0.25, 0.25])[:, None, None]
    assert pixels.turn_hue(red, 1 / 3).flatten().tolist() == pytest.approx([0.25, 0.75, 0.25], abs=1e-6)


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_jitter_is_torchvisions_of_the_same_seed(strength):
    image = torch.rand(3, 9, 8, generator=torch.Generator().manual_seed(1))
    reference, results = v2.ColorJitter(strength, strength, strength, 0.4 * strength), []
    for seed in range(6):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            expected = reference(image)
        results.append(pixels.jitter(image, strength, torch.Generator().manual_seed(seed)))
        torch.testing.assert_close(results[-1], expected, rtol=0, atol=2e-5)
    assert strength == 0 or all((results[0] - other).abs().max() > 0.01 for other in results[1:])


def test_a_changed_window_is_that_of_the_changed_image():
    """A window of the resized image depends on the changed pixels only, and these are few."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, 60, 80), generator=generator, dtype=torch.uint8)
    before = image.clone()
    for size in (Size(80, 60), Size(113, 85), Size(120, 90), Size(40, 30), Size(55, 41), Size(96, 31)):
        whole = resize(255 - image, size)
        for _ in range(20):
            top, left = (int(torch.randint(0, side - 11, (), generator=generator)) for side in size[::-1])
            y, x = slice(top, top + 9), slice(left, left + 12)
            changed = pixels.change_window(lambda region: 1 - region, image, size, y, x)
            assert torch.equal(resize(changed, size)[:, y, x], whole[:, y, x])
            different = (changed != image).any(dim=0)
            for axis, length, old, new in ((1, 9, 60, size.height), (0, 12, 80, size.width)):
                assert different.any(dim=axis).sum() <= length * old / new + 2 * max(1, old / new) + 4
    assert torch.equal(image, before)
    everything = pixels.change_window(lambda region: 1 - region, image, Size(80, 60), slice(0, 70), slice(0, 99))    # padded
    assert torch.equal(everything, 255 - image)


def test_strips_are_the_whole():
    image = torch.rand(3, 70, 5)
    assert torch.equal(pixels.in_strips(torch.sqrt, image), image.sqrt())


def test_a_sample_is_a_grid_of_at_most_so_many_pixels():
    image = torch.arange(2 * 7 * 10).view(2, 7, 10)
    assert torch.equal(pixels.sample(image, 70), image) and torch.equal(pixels.sample(image, 69), image[:, ::2, ::2])
    assert torch.equal(pixels.sample(image, 19), image[:, ::3, ::3])


def test_histograms_count_the_nearest_steps():
    x, n = pixels.histograms(torch.tensor([[[0.0, 1.0, 4.0], [1.3, 1.6, 2.0]], [[7.0] * 3] * 2]), 5)
    assert x.tolist() == [[0, 1, 2, 3, 4], [7] * 5] and n[0].tolist() == [1, 2, 2, 0, 1] and n[1].sum() == 6


def test_functions_are_looked_up_at_the_nearest_step():
    values, x = torch.tensor([5.0, 1.0, 3.0]), torch.tensor([[-9.0, 2.0, 2.9], [3.1, 5.9, 40.0]])
    assert pixels.look_up(values, x, 2.0, 6.0).tolist() == [[5, 5, 5], [1, 3, 3]]
    assert pixels.look_up(values, torch.tensor([0.5]), 0.5, 0.5).tolist() == [5]
    x = torch.linspace(0.1, 1, 600).view(3, 20, 10)
    torch.testing.assert_close(pixels.by_table(torch.sqrt, x), x.sqrt(), rtol=0, atol=3e-5)
