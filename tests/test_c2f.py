"""C2F: alignment against scikit-image, equations against naive float64 loops, steps on the tiny city."""

from __future__ import annotations

import contextlib
import inspect
import math
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import color, exposure
from torch import nn
from torchvision.transforms import v2

import c2f
from common.data import class_list, read_image
from common.deeplab import DeepLab, build_model
from common.files import read_log
from common.layouts import find_pairs
from common.run import Run

IGNORE = 255
ALIGNMENTS = (c2f.photometric_align, partial(c2f.photometric_align, kind="gamma"),
              partial(c2f.photometric_align, kind="histogram"), c2f.align_by_frequency)
MEAN, STD = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))     # ImageNet's


@pytest.fixture(scope="module")
def photos(city: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """A source and a target image of the tiny city, in [0, 1]."""
    return tuple(read_image(find_pairs(city, domain)[0].image).float() / 255 for domain in ("gta5", "cityscapes"))


def hwc(image: torch.Tensor) -> np.ndarray:
    return image.double().permute(1, 2, 0).numpy()


# ------------------------------------------------------------------------------------------- Lab


def test_lab_equals_scikit_image_both_ways():
    values = torch.linspace(0, 1, 18, dtype=torch.float64)
    rgb = torch.stack(torch.meshgrid(values, values, values, indexing="ij")).flatten(2)            # (3, 18, 324)
    expected = color.rgb2lab(hwc(rgb))
    np.testing.assert_allclose(hwc(c2f.rgb_to_lab(rgb)), expected, atol=1e-9)
    np.testing.assert_allclose(hwc(c2f.rgb_to_lab(rgb.float())), expected, atol=1e-3)
    lab = torch.from_numpy(expected).permute(2, 0, 1)
    np.testing.assert_allclose(hwc(c2f.lab_to_rgb(lab)), hwc(rgb), atol=1e-4)
    outside = torch.tensor([[100.0, 50, 0, 40], [120, -128, 90, 0], [-120, 127, -90, 127]], dtype=torch.float64)[:, :, None]
    with pytest.warns(UserWarning, match="negative Z"):
        np.testing.assert_allclose(hwc(c2f.lab_to_rgb(outside)), color.lab2rgb(hwc(outside)), atol=1e-4)
    batch = torch.stack([rgb, rgb.flip(2)])
    assert torch.equal(c2f.rgb_to_lab(batch)[1], c2f.rgb_to_lab(batch[1])) and c2f.lab_to_rgb(batch * 50).shape == batch.shape


def test_lab_by_hand():
    primaries = torch.tensor([[1.0, 0, 0, 1, 0], [0, 1, 0, 1, 0], [0, 0, 1, 1, 0]])[:, :, None]
    expected = [(53.24, 80.09, 67.20), (87.74, -86.18, 83.18), (32.30, 79.19, -107.86), (100, 0, 0), (0, 0, 0)]
    np.testing.assert_allclose(c2f.rgb_to_lab(primaries)[..., 0].T, expected, atol=0.02)


# ------------------------------------------------------------------------------ histogram matching


@pytest.mark.parametrize("case", ["continuous", "ties", "one value", "to one value", "one pixel"])
def test_match_histogram_equals_scikit_image(case):
    generator = torch.Generator().manual_seed(0)
    source = torch.randn(40, 50, generator=generator, dtype=torch.float64)
    reference = 3 * torch.randn(30, 70, generator=generator, dtype=torch.float64).abs()
    if case == "ties":
        source, reference = source.round(), (2 * reference).round()
    source = source * 0 + 1 if case == "one value" else source[:1, :1] if case == "one pixel" else source
    reference = reference * 0 + 7 if case == "to one value" else reference
    got = c2f.match_histogram(source, reference)
    np.testing.assert_allclose(got, exposure.match_histograms(source.numpy(), reference.numpy()), atol=1e-9)
    if case in ("one value", "one pixel"):
        assert (got == reference.max()).all()                                    # its CDF is 1


def test_match_histogram_by_hand_and_with_counts():
    source, reference = torch.tensor([[0.0, 0, 0, 10]]), torch.tensor([[1.0, 2], [3, 5]])
    # The CDF of 0 is 3/4: the reference has 3 there. The CDF of 10 is 1: the reference has 5 there.
    assert c2f.match_histogram(source, reference).tolist() == [[3, 3, 3, 5]]
    counted = c2f.match_histogram(torch.tensor([[10.0, 0, 0]]), torch.tensor([[5.0, 1, 2, 3]]), torch.tensor([[1, 2, 1]]),
                                  torch.ones(1, 4).long())
    assert counted.tolist() == [[5, 3, 3]]
    # The CDF of 0 is 1/2: the reference has 2 there, because its 5 occurs six times.
    often = c2f.match_histogram(torch.tensor([0.0, 10]), torch.tensor([1.0, 2, 5]), reference_count=torch.tensor([5, 1, 6]))
    assert often.tolist() == [2, 5]
    image = torch.rand(64, 64, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(c2f.match_histogram(image, image), image, atol=1e-6)


# ---------------------------------------------------------------------------------- Eq. (2), gamma


def objective(gamma, lightness, reference, beta):
    return (np.mean(lightness ** gamma) - np.mean(reference)) ** 2 + beta * (gamma - 1) ** 2


@pytest.mark.parametrize("beta", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("kind", ["darker", "brighter", "black", "white", "to black", "to white"])
def test_gamma_is_the_minimum_of_eq_2(kind, beta):
    rng = np.random.default_rng(0)
    lightness, reference = rng.uniform(size=(40, 50)), rng.uniform(size=(30, 30))
    reference = {"darker": reference ** 2, "brighter": reference ** 0.4, "to black": reference * 0,
                 "to white": reference * 0 + 1}.get(kind, reference)
    lightness = {"black": lightness * 0, "white": lightness * 0 + 1}.get(kind, lightness)
    gamma = c2f.solve_gamma(torch.from_numpy(lightness), torch.from_numpy(reference), beta)
    assert 0.05 <= gamma <= 6
    grid = np.linspace(0.05, 6, 5951)
    best = min(objective(g, lightness, reference, beta) for g in grid)
    assert objective(gamma, lightness, reference, beta) <= best + 1e-3           # the histograms have 1,024 levels
    if kind in ("darker", "brighter"):
        assert gamma == pytest.approx(grid[np.argmin([objective(g, lightness, reference, beta) for g in grid])], abs=0.02)


def test_gamma_of_equal_images_is_one_and_counts_count():
    lightness = torch.rand(30, 40, generator=torch.Generator().manual_seed(0))
    assert c2f.solve_gamma(lightness, lightness.flip(1)) == 1 and c2f.solve_gamma(lightness, lightness, 0) == 1
    other = lightness ** 3
    counts = torch.full((30, 40), 7)
    assert c2f.solve_gamma(lightness, other) == c2f.solve_gamma(lightness, other, 0.01, counts, counts)
    doubled = torch.cat([lightness, lightness[:3], lightness[:3]])
    counts = torch.ones(30, 40, dtype=torch.long).index_fill(0, torch.arange(3), 3)
    assert c2f.solve_gamma(doubled, other) == c2f.solve_gamma(lightness, other, 0.01, counts)


def best_gamma(lightness, reference, beta):
    """The optimum of Eq. (2) for histograms of 1,024 levels, by exhaustive search."""
    p_s, p_t = (np.bincount(np.floor(x.clip(0, 1).ravel() * 1023 + 0.5).astype(int), minlength=1024) / x.size
                for x in (lightness, reference))
    L = np.arange(1024) / 1023
    present, reference_mean = p_s > 0, sum(L * p_t)
    gammas = np.linspace(0.05, 6, 1191)                                          # in steps of 0.005
    for _ in range(2):
        mean = (L[present, None] ** gammas * p_s[present, None]).sum(axis=0)
        best = gammas[((mean - reference_mean) ** 2 + beta * (gammas - 1) ** 2).argmin()]
        gammas = np.linspace(best - 0.005, best + 0.005, 2001).clip(0.05, 6)
    return best


@pytest.mark.parametrize("beta", [0.0, 0.01, 0.3])
def test_gamma_is_the_optimum_of_histograms_of_1024_levels(beta):
    # With 64 or 256 levels, rounding would move these few values by up to 1/126 or 1/510.
    few = [([0.3007], [0.4504]), ([0.2095, 0.2095, 0.6517], [0.3137]), ([0.7055], [0.333, 0.1234]), ([0.1137, 0.9], [0.6])]
    rng = np.random.default_rng(0)
    images = [(rng.uniform(size=900), rng.uniform(size=900) ** power) for power in (3.0, 0.7, 0.2)]
    for lightness, reference in [*few, *images]:
        lightness, reference = np.array(lightness), np.array(reference)
        best = best_gamma(lightness, reference, beta)
        assert c2f.solve_gamma(*map(torch.tensor, (lightness, reference)), beta) == pytest.approx(best, abs=1e-4) and best != 1
        assert beta != 0.01 or c2f.solve_gamma(*map(torch.tensor, (lightness, reference))) == pytest.approx(best, abs=1e-4)
    for equal in ([0.0], [1.0], [0.0, 1, 1], [1.0, 0, 0, 0]):                    # no gamma changes the mean
        assert c2f.solve_gamma(torch.tensor(equal), torch.tensor(equal), beta) == 1


# ----------------------------------------------------------------------------------- whole images


def unit(lab):
    """L, a and b from their ranges to [0, 1]."""
    return (lab + np.array([0, 128, 128])) / np.array([100, 256, 256])


def aligned_in_lab(which, lab, lab_n, beta):
    (x, x_n), matched = (unit(lab), unit(lab_n)), [exposure.match_histograms(lab[..., k], lab_n[..., k]) for k in range(3)]
    powers = np.stack([x[..., k].clip(0, 1) ** best_gamma(x[..., k], x_n[..., k], beta) for k in range(3)], axis=-1)
    powers = powers * np.array([100, 256, 256]) - np.array([0, 128, 128])
    return {"gpa": np.stack([powers[..., 0], *matched[1:]], axis=-1), "gamma": powers, "histogram": np.stack(matched, axis=-1)}[
        which]


@pytest.mark.filterwarnings("ignore:Conversion from CIE-LAB")
@pytest.mark.parametrize(("which", "beta"), [("gpa", None), ("gpa", 0.0), ("gpa", 1.0), ("gamma", None), ("gamma", 0.0),
                                             ("gamma", 1.0), ("histogram", None)])
def test_alignments_in_lab(which, beta, photos):
    align = partial(c2f.photometric_align, kind=which)
    beta_argument = [] if beta is None else [beta]
    colorful = [(torch.rand(3, 20, n, generator=torch.Generator().manual_seed(n)) ** torch.tensor(powers)[:, None, None] * 255
                 ).round() / 255 for n, powers in ((30, (1.5, 1.0, 0.7)), (25, (0.7, 0.8, 2.5)))]
    for source, reference in (photos, colorful):
        lab, lab_n = (color.rgb2lab(hwc(x)) for x in (source, reference))
        aligned = align(source, reference, *beta_argument)
        expected = color.lab2rgb(aligned_in_lab(which, lab, lab_n, 0.01 if beta is None else beta)).clip(0, 1)
        error = np.abs(hwc(aligned) - expected)
        assert aligned.shape == source.shape and (aligned - source).abs().max() > 0.03
        assert np.median(error) < 1e-5 and error.max() < 2e-3                    # float32 splits ties of float64
        assert torch.allclose(align(source, source, *beta_argument), source, atol=1e-4)


def test_alignment_by_colors_equals_alignment_by_pixels(photos):
    source, reference = photos
    colors, index, count = c2f.distinct_colors(source)
    assert torch.allclose(colors[:, 0, index], source, atol=1e-7) and count.sum() == source[0].numel() > count.numel()
    assert torch.equal(index.flatten().bincount(), count[0]) and colors.shape == (3, *count.shape)
    between = [(x + 1e-5).clamp(max=1) for x in photos]                          # no longer 256 levels
    assert c2f.distinct_colors(between[0])[0].shape == (3, 1, source[0].numel())
    for align in ALIGNMENTS[:3]:
        error = (align(source, reference) - align(*between)).abs()
        assert error.median() < 1e-4 and error.quantile(0.98) < 0.01             # rounding breaks ties


@pytest.mark.parametrize("align", ALIGNMENTS)
def test_degenerate_images_stay_finite(align, photos):
    flat = [torch.full((3, 4, 6), value) for value in (0.0, 1.0, 0.5)]
    red = torch.tensor([1.0, 0, 0])[:, None, None].expand(3, 4, 6)
    images = [*flat, red, torch.rand(3, 1, 1), torch.rand(3, 1, 9), photos[0]]
    for source in images:
        for reference in images:
            aligned = align(source, reference)
            assert aligned.shape == source.shape and aligned.isfinite().all() and 0 <= aligned.min() <= aligned.max() <= 1


def test_frequency_alignment_swaps_the_lowest_amplitudes():
    torch.manual_seed(0)
    source, reference = 0.3 + torch.rand(2, 3, 24, 36, dtype=torch.float64) / 4
    aligned = c2f.align_by_frequency(source, reference, window=0.1)              # half width int(0.1 * 24) = 2
    spectra = [np.fft.fft2(x.numpy()) for x in (source, reference, aligned)]
    for v in range(24):
        for u in range(36):
            low = min(v, 24 - v) <= 2 and min(u, 36 - u) <= 2
            amplitude = np.abs(spectra[1 if low else 0][:, v, u])
            np.testing.assert_allclose(np.abs(spectra[2][:, v, u]), amplitude, atol=1e-9)
    np.testing.assert_allclose(np.angle(spectra[2] / spectra[0])[:, 3:8, 3:8], 0, atol=1e-6)


def test_frequency_alignment_by_default_to_a_reference_of_another_size():
    torch.manual_seed(0)
    source, reference = torch.rand(3, 110, 130) ** 2, 0.6 + 0.4 * torch.rand(3, 37, 200) ** 2
    size = (source.shape[2], source.shape[1])
    for x, n, got in zip(source.double().numpy(), reference.numpy(), c2f.align_by_frequency(source, reference)):
        n = np.array(Image.fromarray(n).resize(size, Image.Resampling.BILINEAR))             # antialiased
        spectrum, other = np.fft.fft2(x), np.fft.fft2(n)
        low = np.ix_((-1, 0, 1), (-1, 0, 1))                                     # 0.01 * 110 is 1
        spectrum[low] *= np.abs(other[low]) / np.abs(spectrum[low])
        np.testing.assert_allclose(got, np.fft.ifft2(spectrum).real.clip(0, 1), atol=1e-5)


@pytest.mark.parametrize("which", ["gpa", "gamma", "histogram", "frequency"])
def test_the_seed_chooses_among_all_references(which, city, photos):
    cfg = c2f.Config(alignment=which, beta=0.3, window=0.1)
    files = [pair.image for pair in find_pairs(city, "cityscapes")][:3]
    align = partial(c2f.photometric_align, beta=0.3, kind=which) if which != "frequency" else (
        lambda m, n: c2f.align_by_frequency(m, n, 0.1))
    expected = [align(photos[0], v2.functional.resize(read_image(file), [20, 48], antialias=True) / 255) for file in files]
    alignment, chosen, photo = c2f.Alignment(cfg, files, c2f.Size(48, 20)), [], (photos[0] * 255).round().byte()

    def aligned(seed, name):
        image, change = alignment(photo, seed, name)
        assert image.dtype == torch.uint8
        height, width = photo.shape[1:]
        return (change(photo, c2f.Size(width, height), slice(0, height), slice(0, width)) if change else image) / 255
    for seed in range(12):
        got = aligned(seed, "name")
        chosen.append(min(range(3), key=lambda k, got=got: (got - expected[k]).abs().mean()))
        assert ((got - expected[chosen[-1]]).abs() <= 1 / 255).float().mean() > 0.98
        assert torch.equal(aligned(seed, "other"), got)
    assert set(chosen) == {0, 1, 2}


@pytest.mark.parametrize("kind", ["gpa", "gamma", "histogram"])
def test_a_crop_is_aligned_as_a_part_of_its_image(kind, tmp_path):
    """Smooth pictures of 720 x 480, more than 2**18 pixels: a crop has the colours of that window of the aligned image."""
    rng, files = np.random.default_rng(0), []
    for k in range(2):
        small = rng.integers(0, 256, (9, 13, 3)) ** (0.8 + 0.2 * k)
        photo = Image.fromarray((small * 255 / small.max()).astype(np.uint8)).resize((720, 480), Image.Resampling.BICUBIC)
        noisy = np.asarray(photo).astype(int) + rng.integers(-5, 6, (480, 720, 3))
        files.append(tmp_path / f"{k}.png")
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(files[k])
    source, reference = map(read_image, files)
    window = np.s_[:, 200:420, 350:690]
    expected = c2f.photometric_align(source / 255, reference / 255, 0.01, kind)[window]
    error = (c2f.photometric_fit(source, files[1], None, 0.01, kind)(source[window] / 255) - expected).abs()
    assert error.mean() < 0.3 / 255 and (error <= 1 / 255).float().mean() > 0.97 and (error <= 3 / 255).float().mean() > 0.99
    assert (expected - source[window] / 255).abs().mean() > 5 / 255
    for flat in (torch.zeros(3, 5, 7, dtype=torch.uint8), torch.full((3, 1, 1), 90, dtype=torch.uint8)):
        aligned = c2f.photometric_fit(flat, files[1], None, 0.01, kind)(flat / 255)
        assert aligned.isfinite().all() and aligned.shape == flat.shape and 0 <= aligned.min() <= aligned.max() <= 1


def test_align_writes_one_picture(photos, city, tmp_path, capsys):
    files = [str(find_pairs(city, domain)[0].image) for domain in ("gta5", "cityscapes")]
    c2f.main(["--align", *files, str(tmp_path / "out.png")])
    written = np.array(Image.open(tmp_path / "out.png"))
    assert (np.abs(written / 255 - hwc(c2f.photometric_align(*photos))) <= 0.5 / 255 + 1e-6).all()
    for wrong, words in ((files, "--align: expected 3 arguments"), ([*files[:1], "missing.png", "out.png"], "missing.png")):
        with pytest.raises(SystemExit) as stop:
            c2f.main(["--align", *wrong])
        assert stop.value.code == 2 and words in capsys.readouterr().err


# ------------------------------------------------------------------------- categories, Eqs. (3) to (5)


def rows(x):
    return np.moveaxis(x.detach().double().numpy(), 1, -1).reshape(-1, x.shape[1])


def labels(*shape, K, seed=0):
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(K, shape, generator=generator)
    return label.masked_fill(torch.rand(shape, generator=generator) < 0.3, IGNORE)


@pytest.mark.parametrize("p", [0.0, 10.0, 37.0, 100.0])
def test_thresholds_are_quantiles_of_all_confidences(p):
    rng = np.random.default_rng(0)
    B, confidences = 200, [rng.uniform(0.2, 1, 5000), rng.uniform(0.1, 0.6, 3000), np.array([0.7301]), np.array([])]
    histogram = torch.stack([torch.from_numpy(np.histogram(c, B, (0, 1))[0]) for c in confidences])
    t = c2f.category_thresholds(histogram, 0.9, p)
    for c, got in zip(confidences[:3], t.tolist()):
        above = math.ceil(p / 100 * len(c))
        exact = np.sort(c)[::-1][above - 1] if above else 1.0                    # p percent are at or above it
        assert min(exact, 0.9) - 1 / B - 1e-9 <= got <= min(exact, 0.9) + 1e-9
        assert (c >= got).sum() >= above or got == 0.9
    assert t[3] == 0.9 and t.dtype == torch.float64


def test_thresholds_by_hand():
    at_ten, below_ten, at_the_cap, low, lowest = torch.zeros(5, 20, dtype=torch.int64)
    at_ten[5], at_ten[12] = 90, 10
    below_ten[5], below_ten[12] = 901, 99
    at_the_cap[19] = 3
    low[0], low[6], low[14] = 60, 35, 5                                          # 5 of 100; 5 of 40 above the first bin
    lowest[0] = 7
    t = c2f.category_thresholds(torch.stack([at_ten, below_ten, at_the_cap, low, lowest]))
    assert t.tolist() == pytest.approx([0.6, 0.25, 0.9, 0.3, 0], abs=1e-12)


def test_centers_are_eq_3():
    feat, label = torch.randn(3, 5, 4, 6, dtype=torch.float64), labels(3, 4, 6, K=3)
    label[label == 1] = 2
    sums = [c2f.class_sums(f, y, 3) for f, y in zip(feat.split([1, 2]), label.split([1, 2]))]
    centers = c2f.category_centers(*map(sum, zip(*sums)))
    for c in (0, 2):
        mean = rows(feat)[label.flatten().numpy() == c].mean(axis=0)
        np.testing.assert_allclose(centers[c], mean / np.sqrt((mean ** 2).sum()), rtol=1e-12)
    assert centers[1].isnan().all()


def eq4(feat, label, centers, margin, negatives):
    total, pixels = 0.0, 0
    for x, y in zip(feat.movedim(1, -1).flatten(0, 2), label.flatten().tolist()):
        if y == IGNORE or centers[y].isnan().any():
            continue
        g = x / (x ** 2).sum().sqrt()
        d = [((g - c) ** 2).sum().sqrt() for c in centers]
        others = [d[k] for k in range(len(d)) if k != y and not d[k].isnan()]
        total += sum((d[y] - o + margin).clamp(min=0) for o in ([min(others)] if negatives == "nearest" else others))
        pixels += 1
    return total / pixels


@pytest.mark.parametrize("negatives", ["nearest", "all"])
def test_triplet_loss_is_eq_4(negatives):
    torch.manual_seed(0)
    feat, label = torch.randn(2, 6, 3, 4, dtype=torch.float64, requires_grad=True), labels(2, 3, 4, K=5)
    centers = torch.nn.functional.normalize(torch.randn(5, 6, dtype=torch.float64), dim=1)
    centers[3] = math.nan
    loss = c2f.triplet_loss(feat, label, centers, 0.2, negatives)
    assert loss.item() == pytest.approx(eq4(feat, label, centers, 0.2, negatives).item(), rel=1e-9) and loss > 0
    loss.backward()
    assert feat.grad.isfinite().all() and (rows(feat.grad)[label.flatten().numpy() == IGNORE] == 0).all()
    assert (rows(feat.grad)[label.flatten().numpy() == 3] == 0).all()
    first = feat[:1].detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda f: c2f.triplet_loss(f, label[:1], centers, 0.2, negatives), first)


def test_triplet_loss_at_its_edges():
    centers = torch.eye(3, dtype=torch.float64)
    tie = torch.tensor([1.0, 1, 1])[None, :, None, None].double()                # equally far from all centres
    label = torch.zeros(1, 1, 1, dtype=torch.int64)
    assert c2f.triplet_loss(tie, label, centers).item() == c2f.triplet_loss(tie, label, centers, 0.2).item()
    assert c2f.triplet_loss(tie, label, centers, 0.2).item() == pytest.approx(0.2)
    assert c2f.triplet_loss(tie, label, centers, 0.3).item() == pytest.approx(0.3)
    assert c2f.triplet_loss(tie, label, centers, 0.2, "all").item() == pytest.approx(0.4)
    on_center = torch.tensor([5.0, 0, 0])[None, :, None, None].double().requires_grad_()
    far = c2f.triplet_loss(on_center, label, centers, 0.2)                       # on its centre, sqrt 2 from the others
    far.backward()
    assert far.item() == 0 and (on_center.grad == 0).all()
    zero = torch.zeros(1, 3, 1, 1, dtype=torch.float64, requires_grad=True)      # a feature after ReLU
    c2f.triplet_loss(zero, label, centers, 0.2).backward()
    assert zero.grad.isfinite().all() and zero.grad.abs().max() < 1e5
    nothing = c2f.triplet_loss(on_center, label + IGNORE, centers, 0.2)
    assert nothing.item() == 0
    alone = torch.full((3, 3), math.nan).index_copy(0, torch.tensor([0]), torch.eye(3)[:1])
    assert c2f.triplet_loss(tie.float(), label, alone, 0.2).item() == 0          # no other centre
    with pytest.raises(ValueError, match="negatives"):
        c2f.triplet_loss(tie, label, centers, 0.2, "some")


def test_bfloat16_features_give_a_float32_triplet_loss():
    torch.manual_seed(0)
    feat, label = (100 * torch.randn(2, 6, 16, 32)).bfloat16(), labels(2, 16, 32, K=5)
    feat[0, :, 0] = 0
    centers = nn.functional.normalize(torch.randn(5, 6), dim=1)
    exact = c2f.triplet_loss(feat.double(), label, centers.double())
    loss = c2f.triplet_loss(feat.requires_grad_(), label, centers)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact.item(), rel=1e-5) and loss > 0
    assert feat.grad.isfinite().all() and (feat.grad != 0).any()


def test_labels_come_to_the_grid_by_the_nearest_centre():
    got = c2f.resize_label(torch.arange(64).view(1, 8, 8), (2, 2))
    assert got.tolist() == [[[18, 22], [50, 54]]] and got.dtype == torch.int64   # rows and columns 2 and 6


def test_consistency_loss_is_eq_5_and_valid_labels():
    logits = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    label, bins = (torch.randint(n, (2, 3, 5), generator=generator) for n in (4, c2f.BINS))
    thresholds = torch.tensor([0.9, 0.5, 0.0, 0.3004])
    valid = c2f.valid_labels(label, bins, thresholds)
    total = []
    for z, y, b, got in zip(rows(logits), label.flatten().tolist(), bins.flatten().tolist(), valid.flatten().tolist()):
        counts = b / c2f.BINS >= round(float(thresholds[y]), 6)
        assert got == (y if counts else IGNORE)
        if counts:
            total.append(-math.log(math.exp(z[y]) / np.exp(z).sum()))
    assert c2f.consistency_loss(logits, valid).item() == pytest.approx(np.mean(total), rel=1e-9)
    assert c2f.consistency_loss(logits, valid * 0 + IGNORE).item() == 0
    assert c2f.first_valid_bin(torch.tensor([0.9, 0.0, 0.076, 1.0]).double()).tolist() == [225, 0, 19, 250]
    edges = torch.arange(c2f.BINS + 1)
    for t in (edges.double() / c2f.BINS, (edges.double() / c2f.BINS).float()):
        assert torch.equal(c2f.first_valid_bin(t), edges)
        assert torch.equal(c2f.first_valid_bin(t[:-1] + 0.3 / c2f.BINS), edges[1:])
    label, bins = torch.tensor([[0, 0, 0, 1, 1, 1]]), torch.tensor([[18, 19, 20, 224, 225, 249]])
    assert c2f.valid_labels(label, bins, torch.tensor([0.076, 0.9])).tolist() == [[IGNORE, 0, 0, IGNORE, 1, 1]]


def test_the_report_of_a_step_by_hand(capsys):
    histogram = torch.zeros(3, c2f.BINS, dtype=torch.int64)
    histogram[0, [224, 225, 249]] = torch.tensor([5, 2, 1])                      # a: 3 of 8 are >= 0.9; b: both are >= 0.1
    histogram[1, 25] = 2
    centers = torch.tensor([[1.0, 0], [math.nan] * 2, [0, 1]])
    run = SimpleNamespace(classes=SimpleNamespace(names=("a", "b", "c")))
    thresholds = torch.tensor([0.9, 0.1, 0.9], dtype=torch.float64)
    note = c2f.report_labels(run, "step4", centers, thresholds, histogram)
    assert note == {"thresholds": {"a": 0.9, "b": 0.1, "c": 0.9}, "without_center": ["b"],
                    "valid_percent": {"a": 37.5, "b": 100}}
    title, _, _, *table, last = capsys.readouterr().out.strip().split("\n")
    assert title.startswith("step4: ") and last == "step4: no source pixel, so no centre: b"
    assert [line.split() for line in table] == [["a", "90.0", "37.5"], ["b", "10.0", "100.0"], ["c", "90.0", "-"],
                                                ["all", "-", "50.0"]]


def test_tau_is_a_function_of_its_seeds():
    images = torch.randn(3, 3, 8, 10, generator=torch.Generator().manual_seed(0))
    a, b = c2f.tau(images, 0.5, [1, 2, 3]), c2f.tau(images[1:], 0.5, [2, 3])
    assert torch.equal(a[1:], b) and not torch.equal(a, c2f.tau(images, 0.5, [1, 2, 4])) and a.shape == images.shape
    state = torch.get_rng_state()
    c2f.tau(images, 0.5, [1, 2, 3])
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("strength", [0.0, 0.3, 0.8])
def test_tau_jitters_the_image_before_normalisation(strength):
    images = 2 * torch.randn(3, 3, 8, 10, generator=torch.Generator().manual_seed(0))        # also out of [0, 1]
    got = c2f.tau(images, strength, [5, 6, 7])
    jitter = v2.ColorJitter(strength, strength, strength, 0.4 * strength)
    for image, seed, x in zip(images, (5, 6, 7), got):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            expected = (jitter((image * STD + MEAN).clamp(0, 1)) - MEAN) / STD
        torch.testing.assert_close(x, expected, rtol=0, atol=1e-5)
    last = images.contiguous(memory_format=torch.channels_last)
    assert got.is_contiguous() and c2f.tau(last, strength, [5, 6, 7]).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(c2f.tau(last, strength, [5, 6, 7]), got, rtol=0, atol=1e-5)


# -------------------------------------------------------------------------------------- golden numbers


def test_golden_numbers_of_the_alignment():
    """Values from scikit-image, from an exhaustive search of Eq. (2) and from a naive Fourier transform."""
    m = torch.tensor([[[200, 30], [90, 12]], [[180, 60], [90, 240]], [[10, 200], [91, 130]]]) / 255
    n = torch.tensor([[[40, 250, 128]], [[80, 220, 30]], [[60, 90, 201]]]) / 255
    lab, lab_n = c2f.rgb_to_lab(m.double()), c2f.rgb_to_lab(n.double())
    golden = {
        "lab": [[[72.856361, 33.298771], [38.272086, 83.968838]], [[-7.691216, 42.262753], [0.2114, -71.369506]],
                [[73.675264, -74.71349], [-0.573296, 39.937645]]],
        "a": [[-11.743985, 66.919732], [13.751119, -19.516218]],
        "gamma": 1.168215,
        "gpa": [[[0.707987, 0.390634], [0.271333, 0.709766]], [[0.675203, 0], [0.281138, 0.831166]],
                [[0.129114, 0.681687], [0.488658, 0.6304]]],
        "gamma on all": [[[0.877794, 0.180573], [0.41405, 0.489195]], [[0.609076, 0.099595], [0.246379, 0.878066]],
                         [[0.105276, 0.773709], [0.358407, 0.542873]]],
        "histogram on all": [[[0.495187, 0.425227], [0.285624, 0.78089]], [[0.481167, 0], [0.294335, 0.903841]],
                             [[0, 0.714417], [0.503336, 0.699788]]],
    }
    got = {"lab": lab, "a": c2f.match_histogram(lab[1], lab_n[1]), "gamma": c2f.solve_gamma(lab[0] / 100, lab_n[0] / 100),
           "gpa": c2f.photometric_align(m, n), "gamma on all": c2f.photometric_align(m, n, kind="gamma"),
           "histogram on all": c2f.photometric_align(m, n, kind="histogram")}
    for name, values in golden.items():
        np.testing.assert_allclose(torch.as_tensor(got[name]).numpy(), values, atol=1e-4, err_msg=name)
    np.testing.assert_allclose(c2f.lab_to_rgb(torch.tensor(golden["lab"])), m, atol=1e-5)

    x, x_n = (torch.from_numpy(values) for values in np.random.default_rng(2103).uniform(0.3, 0.7, (2, 3, 3, 4)).round(2))
    swapped = c2f.align_by_frequency(x, x_n, window=0.34)                       # int(0.34 * 3) = 1
    np.testing.assert_allclose(swapped[0], [[0.564154547, 0.548020871, 0.380010173, 0.466143849], [0.5114995, 0.605023828,
                               0.36830628, 0.294781952], [0.60794516, 0.280496156, 0.53808434, 0.645533344]], atol=1e-8)


def test_golden_numbers_of_the_categories():
    """Values of the loops above: a changed reading of an equation shows even if loop and code change together."""
    rng = np.random.default_rng(2103)
    rng.uniform(size=72)
    feat, logits = (torch.from_numpy(rng.normal(size=(1, n, 2, 3)).round(2)) for n in (2, 4))
    label = torch.tensor([[[0, 2, IGNORE], [1, 0, 3]]])
    centers = torch.tensor([[1.0, 0], [0.6, -0.8], [-0.28, 0.96], [math.nan, math.nan]], dtype=torch.float64)
    valid = c2f.valid_labels(label.clamp(max=3), torch.tensor([[[226, 125, 0], [124, 225, 25]]]),
                             torch.tensor([0.9, 0.5, 0.104, 0.104]))
    assert valid.tolist() == [[[0, 2, IGNORE], [IGNORE, 0, IGNORE]]]
    got = [c2f.triplet_loss(feat, label, centers), c2f.triplet_loss(feat, label, centers, 0.2, "all"),
           c2f.segmentation_loss(logits, label), c2f.consistency_loss(logits, valid)]
    assert [x.item() for x in got] == pytest.approx([0.8172870340374812, 0.8685472191144787, 1.201192394540137,
                                                     1.4506083290459701], rel=1e-12)
    np.testing.assert_allclose(c2f.category_centers(*c2f.class_sums(feat, label, 3)), [
        [-0.6606278948920247, -0.7507135169227552], [-0.9500918071358831, 0.3119704441341706],
        [0.6964753771686599, 0.7175806916283163]], rtol=1e-12)
    histogram = torch.tensor([[0, 1, 2, 3, 4], [5, 0, 0, 0, 1], [0, 0, 0, 0, 9], [0, 0, 0, 0, 0]])
    assert c2f.category_thresholds(histogram, P_h=0.75, p=41).tolist() == pytest.approx([0.6, 0, 0.75, 0.75])


# ----------------------------------------------------------------------------------------------- the steps


class Tiny(nn.Module):
    """Stride 4, six features, four classes."""

    def __init__(self):
        super().__init__()
        self.encoder, self.head = nn.Conv2d(3, 6, 3, stride=4, padding=1), nn.Conv2d(6, 4, 1)

    def forward(self, x):
        feat = self.encoder(x).tanh()
        return feat, self.head(feat)

    def parameter_groups(self, lr, encoder_rate):
        return [{"params": self.head.parameters(), "lr": lr}, {"params": self.encoder.parameters(), "lr": encoder_rate * lr}]


class FakeRun:
    """The part of a Run that a step uses."""

    rank = 0
    item_seeds = Run.item_seeds

    def __init__(self, batches, seed=3):
        self.batches, self.losses, self.options = batches, [], SimpleNamespace(seed=seed)

    def autocast(self):
        return contextlib.nullcontext()

    def stage(self, *call, batch_size, note=None):
        (self.name, self.iterations, self.state, *self.data), self.batch_size, self.note = call, batch_size, note
        yield from ((it, *batch) for it, batch in enumerate(self.batches))

    def report(self, **losses):
        self.losses.append({name: loss.item() for name, loss in losses.items()})


def tiny_models():
    torch.manual_seed(0)
    models = [Tiny().double(), Tiny().double()]
    models[1].load_state_dict(models[0].state_dict())
    return models


def tiny_batches():
    batches = []
    for it in range(2):
        torch.manual_seed(it)
        x_s, x_t = torch.randn(2, 3, 16, 32, dtype=torch.float64), 0.3 + 0.5 * torch.randn(2, 3, 16, 32, dtype=torch.float64)
        y_s, y_t = labels(2, 16, 32, K=4, seed=it), labels(2, 16, 32, K=4, seed=10 + it)
        y_s[0, :4], y_t[1, :, :9] = IGNORE, IGNORE                               # images with different numbers of labels
        batches.append(((x_s, y_s), (x_t, torch.ones_like(y_t), y_t)))
    return batches


def cross_entropy(logits, label):
    p = nn.functional.interpolate(logits, label.shape[-2:], mode="bilinear", align_corners=True).softmax(dim=1)
    n, i, j = (label != IGNORE).nonzero(as_tuple=True)
    return -p[n, label[n, i, j], i, j].log().sum() / len(n)


def train_by_hand(model, cfg, lr, batches, losses):
    """SGD written out. losses(it, *batch) -> reported losses, minimised loss."""
    weights = [(p, rate, torch.zeros_like(p)) for part, rate in ((model.encoder, cfg.encoder_rate * lr), (model.head, lr))
               for p in part.parameters()]
    reported = []
    for it, batch in enumerate(batches):
        parts, total = losses(it, *batch)
        reported.append({name: loss.item() for name, loss in parts.items()})
        grads = torch.autograd.grad(total, [p for p, _, _ in weights])
        with torch.no_grad():
            for (p, rate, v), grad in zip(weights, grads):
                v.copy_(cfg.momentum * v + grad + cfg.weight_decay * p)
                p -= rate * v
    return reported


def check_step(run, models, expected):
    assert len(run.losses) == 2 and run.state["model"] is models[0] and run.state.keys() == {"model", "optimizer"}
    for reported, by_hand in zip(run.losses, expected):
        assert reported.keys() == by_hand.keys() and reported == pytest.approx(by_hand, rel=1e-9)
    for key, value in models[1].state_dict().items():
        torch.testing.assert_close(models[0].state_dict()[key], value, rtol=1e-9, atol=1e-12)


def test_step_0_minimises_l_seg():
    cfg = c2f.Config(lr=0.3, step_lr=0.05, encoder_rate=0.5, momentum=0.9, weight_decay=0.03, batch_size=2)
    models, batches = tiny_models(), [(source,) for source, _ in tiny_batches()]

    def losses(it, source):
        seg = cross_entropy(models[1](source[0])[1], source[1])
        return {"seg_s": seg}, seg
    run, source = FakeRun(batches), object()
    c2f.train_step0(run, cfg, models[0], source, 77)
    assert (run.name, run.iterations, run.data, run.batch_size) == ("step0", 77, [source], 2)
    check_step(run, models, train_by_hand(models[1], cfg, 0.3, batches, losses))


@pytest.mark.parametrize(("triplet_target", "negatives"), [(False, "nearest"), (True, "all")])
def test_a_step_minimises_the_three_losses(triplet_target, negatives, monkeypatch):
    """Sec. 3.1, step 1: L_seg on the source and on valid pseudo labels, Eq. (4) on the source, Eq. (5) on tau(n)."""
    cfg = c2f.Config(lambda_pseudo=0.7, lambda_triplet=1.9, lambda_consist=0.4, jitter=0.6, margin=0.3, negatives=negatives,
                     triplet_target=triplet_target, lr=0.3, step_lr=0.05, encoder_rate=0.5, momentum=0.9, weight_decay=0.03,
                     step_iterations=77, batch_size=2)
    (models, batches), jittered = (tiny_models(), tiny_batches()), []
    centers = nn.functional.normalize(torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), dim=1)
    centers[3] = math.nan

    def spy(images, strength, seeds, _tau=c2f.tau):
        jittered.append((images, strength, seeds, _tau(images, strength, seeds)))
        return jittered[-1][3]
    monkeypatch.setattr(c2f, "tau", spy)

    def losses(it, source, target):
        (x_s, y_s), (x_t, _, y_t) = source, target
        (feat_s, logits_s), (feat_t, logits_t), (_, logits_tau) = (models[1](x) for x in (x_s, x_t, jittered[it][3]))
        triplet = eq4(feat_s, y_s[:, 2::4, 2::4], centers, 0.3, negatives)       # nearest: the third of 4 pixels
        if triplet_target:
            triplet = triplet + eq4(feat_t, y_t[:, 2::4, 2::4], centers, 0.3, negatives)
        seg_s, seg_t, consist = cross_entropy(logits_s, y_s), cross_entropy(logits_t, y_t), cross_entropy(logits_tau, y_t)
        parts = {"seg_s": seg_s, "seg_t": seg_t, "triplet": triplet, "consist": consist}
        return parts, seg_s + 0.7 * seg_t + 1.9 * triplet + 0.4 * consist
    run, data, note = FakeRun(batches), [object(), object()], {"thresholds": {}}
    c2f.train_step(run, cfg, 2, models[0], centers, *data, note)
    assert (run.name, run.iterations, run.data, run.batch_size, run.note) == ("step2", 77, data, 2, note)
    for (images, strength, _, result), (_, (x_t, *_)) in zip(jittered, batches, strict=True):
        assert images is x_t and strength == 0.6 and (result - x_t).abs().mean() > 0.05
    check_step(run, models, train_by_hand(models[1], cfg, 0.05, batches, losses))
    assert run.losses[0]["triplet"] > 0.05 and abs(run.losses[0]["consist"] - run.losses[0]["seg_t"]) > 1e-3

    seeds = [seeds for *_, seeds, _ in jittered]
    for seed, i in ((3, 2), (4, 2), (3, 1)):                                     # the same seeds again; others
        c2f.train_step(FakeRun(batches, seed), cfg, i, models[0], centers, *data)
        again = [seeds for *_, seeds, _ in jittered[-2:]]
        assert again == seeds or (seed, i) != (3, 2)
        assert len({*sum(seeds, []), *sum(again, [])}) == (4 if (seed, i) == (3, 2) else 8)


# ------------------------------------------------------------------------------------ what a step receives


STAGES = ("train_step0", "prepare_step", "train_step")
SMALL = ("--backbone resnet18 --init none --workers 0 --freeze-bn encoder --source-size 80x40 --target-size 48x24 --crop 40x20 "
         "--scale 1.0 1.25 --jitter 0.3 --lr 0.004 --step-lr 0.001 --encoder-rate 0.5 --momentum 0.8 --weight-decay 0.02 "
         "--batch-size 1 --K 2 --step0-iterations 2 --step-iterations 3")
FROZEN, TRAINED = (False, False), (True, True)                                  # (in training mode, has a gradient)


@pytest.fixture
def uneven(city, tmp_path):
    """The tiny city with 5 source, 8 target and 3 validation images."""
    root = shutil.copytree(city, tmp_path / "city")
    for pair in find_pairs(root, "gta5")[5:]:
        pair.image.unlink()
        pair.label.unlink()
    return root


def described(value):
    """The relevant parts of a stage's argument."""
    if isinstance(value, c2f.Subset):
        return described(value.dataset)
    if isinstance(value, c2f.SegmentationDataset):
        split = {split for pair in value.pairs for split in ("train", "val") if split in pair.image.parts}
        references = {str(path) for path in value.transform.references} if value.transform else None
        return {"domain": value.dataset, "split": split, "images": len(value), "size": value.size, "augment": value.augment,
                "labelled": all(pair.label for pair in value.pairs), "aligned to": references, "maps": len(value.maps)}
    if isinstance(value, nn.Module):
        norms = {(m.training, m.weight.requires_grad) for m in value.modules() if isinstance(m, nn.BatchNorm2d)}
        return {"weights": {key: x.clone() for key, x in value.state_dict().items()}, "norms": norms}
    return value


class Wiring:
    """Runs c2f.main and records in `log` the arguments of its stages, optimizers, data sets and networks."""

    def __init__(self, monkeypatch):
        self.log, self.patch = [], monkeypatch
        for name in STAGES:
            self.watch(c2f, name, lambda given: {k: described(v) for k, v in given.items()})
        self.watch(c2f, "sgd", lambda given: None)
        self.watch(c2f.SegmentationDataset, "__getitem__", lambda given: (described(given["self"]), given["key"]))
        self.watch(DeepLab, "forward", lambda given: None if given["self"].training else given["x"])

    def watch(self, owner, name, record):
        function = getattr(owner, name)

        def watched(*args, **kwargs):
            given = inspect.signature(function).bind(*args, **kwargs).arguments
            self.log.append((name, record(given)))
            result = function(*args, **kwargs)
            if name in STAGES:
                self.log.append((f"end of {name}", {k: described(v) for k, v in given.items()}))
            elif name == "sgd":
                self.log[-1] = name, [dict(group) for group in result.param_groups]
            return result
        self.patch.setattr(owner, name, watched)

    def run(self, *argv):
        """Returns: (stage, its i) -> (arguments, the same at its end, inputs of the evaluation after it, rates)."""
        self.log.clear()
        c2f.main([*SMALL.split(), *argv])
        stages, stage = {None: [None, {}, [], None]}, None
        for name, value in self.log:
            if name in STAGES:
                stages[stage := (name, value.get("i", 0))] = [value, None, [], None]
            elif name.startswith("end of"):
                stages[stage][1] = value
            elif name == "sgd":
                stages[stage][3] = sorted({group["lr"] for group in value})
                assert {(group["momentum"], group["weight_decay"]) for group in value} == {(0.8, 0.02)}
            elif stages[stage][1] is not None:                                  # after a stage: its evaluation
                stages[stage][2].append(value)
        return stages


def same(a, b):
    return all(torch.equal(a["weights"][key], b["weights"][key]) for key in a["weights"])


def test_each_step_receives_the_right_arguments(uneven, tmp_path, monkeypatch):
    wiring, paths = Wiring(monkeypatch), ["--data", str(uneven), "--runs", str(tmp_path)]
    references = {str(pair.image) for pair in find_pairs(uneven, "cityscapes", labels=False)}
    augment = c2f.Augment(scale=(1.0, 1.25), crop=c2f.Size(40, 20))
    jittered = c2f.replace(augment, jitter=0.3)
    of_source = {"domain": "gta5", "split": set(), "images": 5, "size": c2f.Size(80, 40), "augment": jittered, "labelled": True,
                 "aligned to": references, "maps": 0}
    of_target = {"domain": "cityscapes", "split": {"train"}, "images": 8, "size": c2f.Size(48, 24), "augment": augment,
                 "labelled": False, "aligned to": None, "maps": 0}
    tested = {**of_target, "split": {"val"}, "images": 3, "augment": c2f.Augment(), "labelled": True}

    def check_evaluation(seen):
        items = [x for x in seen if isinstance(x, tuple)]
        assert items and all(item == tested and isinstance(key, int) for item, key in items)
        assert {tuple(x.shape[-2:]) for x in seen if isinstance(x, torch.Tensor)} == {(24, 48)}

    stages = wiring.run(*paths)
    assert [*stages] == [None, ("train_step0", 0), *((name, i) for i in (1, 2) for name in ("prepare_step", "train_step"))]
    given, before, seen, rates = stages["train_step0", 0]
    assert given["source"] == of_source and given["iterations"] == 2 and rates == pytest.approx([0.002, 0.004])
    assert given["model"]["norms"] == {FROZEN, TRAINED} and not same(given["model"], before["model"])
    check_evaluation(seen)
    for i in (1, 2):
        given, end, *_ = stages["prepare_step", i]
        assert given["aligned"] == {**of_source, "augment": c2f.Augment()} and given["target"] == of_target
        assert same(given["model"], before["model"])                            # T_{i-1} labels,
        given, end, seen, rates = stages["train_step", i]
        assert given["source"] == of_source and given["target"] == {**of_target, "maps": 1}
        assert same(given["model"], before["model"]) and not same(given["model"], end["model"])   # and becomes T_i
        assert given["model"]["norms"] == {FROZEN} and rates == pytest.approx([0.0005, 0.001])
        check_evaluation(seen)
        before = end

    checkpoint = str(tmp_path / "c2f-gta5/step0.pt")
    restarted = wiring.run(*paths, "--from", checkpoint, "--stage", "step1", "--adapt-freeze-bn", "none", "--alignment", "none",
                       "--tag", "unaligned")
    given, *_ = restarted["train_step", 1]
    assert all(same(restarted[stage, 1][0]["model"], stages["train_step0", 0][1]["model"]) for stage in STAGES[1:])
    assert given["source"] == {**of_source, "aligned to": None} and given["model"]["norms"] == {TRAINED}
    check_evaluation(wiring.run(*paths, "--eval")[None][2])

    given, _, seen, _ = wiring.run(*paths, "--target-labels", "--stage", "step0", "--tag", "bound")["train_step0", 0]
    assert given["source"] == {**of_target, "augment": jittered, "labelled": True} and given["iterations"] == 2 + 2 * 3
    check_evaluation(seen)


# ------------------------------------------------------------------------------------------- on files


def test_a_step_starts_with_the_model_before_it(city, tmp_path, monkeypatch):
    """A step's weights, thresholds and labels come from the previous step's model; its centres too, on the aligned source."""
    started = {}

    def train_step(run, cfg, i, model, centers, source, target, note, _train=c2f.train_step):
        weights = {key: value.clone() for key, value in model.state_dict().items()}
        started[i] = weights, model.training, model.frozen_bn, centers, source, target, note
        _train(run, cfg, i, model, centers, source, target, note)
    monkeypatch.setattr(c2f, "train_step", train_step)
    small = ("--backbone resnet18 --init none --source-size 64x32 --target-size 48x24 --crop 48x24 --workers 0 --batch-size 1 "
             "--step0-iterations 2 --step-iterations 2 --K 2 --log-every 1 --device cpu --adapt-freeze-bn encoder "
             "--step-lr 0.008 --P-h 0.11 --p 45 --beta 0.002")
    c2f.main(["--data", str(city), "--runs", str(tmp_path), *small.split()])
    folder, model = tmp_path / "c2f-gta5", build_model("v3+", "resnet18", 19, "none").eval()
    trained = [torch.load(folder / f"step{i}.pt", weights_only=True)["state"]["model"] for i in range(3)]

    # --adapt-freeze-bn encoder: after step 0 the encoder's batch norm is frozen, the rest is not.
    for before, after in zip(trained, trained[1:]):
        changed = {key.split(".")[0] for key in before if "running" in key and not torch.equal(before[key], after[key])}
        assert changed == {"aspp", "low", "decoder"}

    classes, targets = class_list("gta5"), find_pairs(city, "cityscapes", labels=False)
    resized = [v2.functional.resize(read_image(pair.image), [24, 48], antialias=True) / 255 for pair in targets]
    source, images = c2f.SegmentationDataset(find_pairs(city, "gta5"), "gta5", classes, None), []
    for k, pair in enumerate(source.pairs):
        seed = c2f.derive_seed(c2f.derive_seed(0, "centres"), k)
        reference, photo = targets[c2f.derive_seed(seed, "reference") % len(targets)].image, read_image(pair.image)
        aligned = c2f.photometric_fit(photo, reference, c2f.Size(48, 24), 0.002)(photo / 255)
        images.append(((255 * aligned).round() / 255 - MEAN) / STD)

    capped, written, log = [], [], read_log(folder)
    for i in (1, 2):
        weights, training, frozen, centers, of_source, of_target, note = started[i]
        assert training and frozen == "encoder" and all(torch.equal(weights[key], trained[i - 1][key]) for key in weights)
        assert isinstance(of_source.transform, c2f.Alignment) and of_target.transform is None
        assert (of_source.augment.jitter, of_target.augment.jitter) == (0.5, 0)
        model.load_state_dict(trained[i - 1])
        total, count = 0, 0
        for k, image in enumerate(images):
            with torch.no_grad():
                feat = model(image[None])[0]
            part = c2f.class_sums(feat, source[k][1][None, 2::4, 2::4], 19)      # nearest: the third of 4 pixels
            total, count = total + part[0], count + part[1]
        torch.testing.assert_close(centers, c2f.category_centers(total, count).float(), rtol=1e-4, atol=1e-5, equal_nan=True)

        predicted, confidences, pngs = [], [], []
        for k, (pair, image) in enumerate(zip(targets, resized)):
            with torch.no_grad():
                logits = model(((image - MEAN) / STD)[None])[1]
            p = nn.functional.interpolate(logits, (24, 48), mode="bilinear", align_corners=True).softmax(dim=1)[0]
            _, ground_truth, _, label = of_target[k]
            assert (ground_truth == IGNORE).all()
            assert (label.numpy() == np.array(Image.open(folder / f"step{i}/labels/{pair.name}.png"))).all()
            for values, value in ((predicted, p.argmax(dim=0)), (confidences, p.amax(dim=0)), (pngs, label)):
                values.append(value)
        predicted, confidences, pngs = map(torch.stack, (predicted, confidences, pngs))
        record, = (line for line in log if line["stage"] == f"step{i}" and line["iteration"] == 0)
        assert list(note["thresholds"]) == list(classes.names) and note.items() <= record.items()
        assert note["without_center"] == [name for name, center in zip(classes.names, centers) if center.isnan().any()]
        for c, (name, t) in enumerate(note["thresholds"].items()):
            confidence, valid = confidences[predicted == c], pngs[predicted == c] == c
            if not len(confidence):                                              # never predicted
                assert t == 0.11 and name not in note["valid_percent"]
                continue
            assert (confidence > t - 1e-5).float().mean() >= 0.45                # at or above t_c, an edge of a bin
            assert t == 0.11 or (t * c2f.BINS) % 1 == pytest.approx(0, abs=1e-9) and t < 0.11
            assert t == 0.11 or (confidence > t + 1 / c2f.BINS + 1e-5).float().mean() < 0.45
            first = math.ceil(t * c2f.BINS - 1e-6) / c2f.BINS                    # 0.11 counts as the next edge
            assert valid[confidence > first + 1e-5].all() and not valid[confidence < first - 1e-5].any()
            assert note["valid_percent"][name] == pytest.approx(100 * valid.float().mean().item(), abs=0.006)
            capped.append(t == 0.11)
        assert ((pngs == predicted) | (pngs == IGNORE)).all() and 0.1 < (pngs == IGNORE).float().mean() < 0.9
        written.append(pngs)
        assert (folder / f"step{i}.png").exists()
    assert len(set(capped)) == 2 and not torch.equal(*written) and not torch.equal(started[1][3], started[2][3])
