"""C2F's alignment against scikit-image, its equations against naive float64 loops, and its steps on the tiny city."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import color, exposure

import c2f
from common.data import find_pairs, read_image

IGNORE = 255


@pytest.fixture(scope="module")
def photos(city) -> tuple[torch.Tensor, torch.Tensor]:
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
    # CDF of 0 is 3/4, where the reference has 3; of 10 it is 1, where the reference has 5.
    assert c2f.match_histogram(source, reference).tolist() == [[3, 3, 3, 5]]
    counted = c2f.match_values(torch.tensor([10.0, 0, 0]), torch.tensor([1, 2, 1]), torch.tensor([5.0, 1, 2, 3]),
                               torch.ones(4).long())
    assert counted.tolist() == [5, 3, 3]
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


# ----------------------------------------------------------------------------------- whole images


def test_photometric_align_is_gamma_and_histograms_in_lab(photos):
    source, reference = photos
    lab, lab_n = (color.rgb2lab(hwc(x)) for x in photos)
    gamma = c2f.solve_gamma(torch.from_numpy(lab[..., 0] / 100), torch.from_numpy(lab_n[..., 0] / 100))
    expected = np.stack([100 * (lab[..., 0] / 100).clip(0, 1) ** gamma, exposure.match_histograms(lab[..., 1], lab_n[..., 1]),
                         exposure.match_histograms(lab[..., 2], lab_n[..., 2])], axis=-1)
    aligned = c2f.photometric_align(source, reference)
    assert aligned.shape == source.shape and gamma != 1
    error = np.abs(hwc(aligned) - color.lab2rgb(expected))
    assert np.median(error) < 1e-4 and error.max() < 0.02                        # float32 splits values that tie in float64
    assert torch.allclose(c2f.photometric_align(source, source), source, atol=1e-4)


def test_alignment_by_colors_equals_alignment_by_pixels(photos):
    source, reference = photos
    colors, count, index = c2f.distinct_colors(source)
    assert torch.allclose(colors[:, index], source, atol=1e-7) and count.sum() == source[0].numel() > len(count)
    between = [(x + 1e-5).clamp(max=1) for x in photos]                          # no longer 256 levels
    assert c2f.distinct_colors(between[0])[0].shape == (3, source[0].numel())
    for align in (c2f.photometric_align, c2f.align_by_gamma, c2f.align_by_histogram):
        error = (align(source, reference) - align(*between)).abs()
        assert error.median() < 1e-4 and error.quantile(0.98) < 0.01             # ties break where values moved by a rounding


@pytest.mark.parametrize("align", [c2f.photometric_align, c2f.align_by_gamma, c2f.align_by_histogram,
                                   c2f.align_by_frequency])
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


def test_align_writes_one_picture(photos, city, tmp_path, capsys):
    files = [str(find_pairs(city, domain)[0].image) for domain in ("gta5", "cityscapes")]
    c2f.main(["--align", *files, str(tmp_path / "out.png")])
    written = np.array(Image.open(tmp_path / "out.png"))
    assert (np.abs(written / 255 - hwc(c2f.photometric_align(*photos))) <= 0.5 / 255 + 1e-6).all()
    for wrong, words in ((files, "takes three files"), ([*files[:1], "missing.png", "out.png"], "missing.png")):
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
        exact = np.sort(c)[::-1][above - 1] if above else 1.0                    # p percent lie at or above it
        assert min(exact, 0.9) - 1 / B - 1e-9 <= got <= min(exact, 0.9) + 1e-9
        assert (c >= got).sum() >= above or got == 0.9
    assert t[3] == 0.9 and t.dtype == torch.float64


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
    for x, y in zip(rows(feat), label.flatten().tolist()):
        if y == IGNORE or math.isnan(centers[y][0]):
            continue
        g = x / math.sqrt((x ** 2).sum())
        d = [math.sqrt(((g - np.array(c)) ** 2).sum()) for c in centers.tolist()]
        others = [d[k] for k in range(len(d)) if k != y and not math.isnan(d[k])]
        total += sum(max(d[y] - o + margin, 0) for o in ([min(others)] if negatives == "nearest" else others))
        pixels += 1
    return total / pixels


@pytest.mark.parametrize("negatives", ["nearest", "all"])
def test_triplet_loss_is_eq_4(negatives):
    torch.manual_seed(0)
    feat, label = torch.randn(2, 6, 3, 4, dtype=torch.float64, requires_grad=True), labels(2, 3, 4, K=5)
    centers = torch.nn.functional.normalize(torch.randn(5, 6, dtype=torch.float64), dim=1)
    centers[3] = math.nan
    loss = c2f.triplet_loss(feat, label, centers, 0.2, negatives)
    assert loss.item() == pytest.approx(eq4(feat, label, centers, 0.2, negatives), rel=1e-9) and loss > 0
    loss.backward()
    assert feat.grad.isfinite().all() and (rows(feat.grad)[label.flatten().numpy() == IGNORE] == 0).all()
    assert (rows(feat.grad)[label.flatten().numpy() == 3] == 0).all()
    first = feat[:1].detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda f: c2f.triplet_loss(f, label[:1], centers, 0.2, negatives), first)


def test_triplet_loss_at_its_edges():
    centers = torch.eye(3, dtype=torch.float64)
    tie = torch.tensor([1.0, 1, 1])[None, :, None, None].double()                # as far from every centre
    label = torch.zeros(1, 1, 1, dtype=torch.int64)
    assert c2f.triplet_loss(tie, label, centers, 0.2).item() == pytest.approx(0.2)
    assert c2f.triplet_loss(tie, label, centers, 0.2, "all").item() == pytest.approx(0.4)
    own = torch.tensor([5.0, 0, 0])[None, :, None, None].double().requires_grad_()
    far = c2f.triplet_loss(own, label, centers, 0.2)                             # on its centre, sqrt 2 from the others
    far.backward()
    assert far.item() == 0 and (own.grad == 0).all()
    zero = torch.zeros(1, 3, 1, 1, dtype=torch.float64, requires_grad=True)      # a feature that ReLU has cut off
    c2f.triplet_loss(zero, label, centers, 0.2).backward()
    assert zero.grad.isfinite().all() and zero.grad.abs().max() < 1e5
    nothing = c2f.triplet_loss(own, label + IGNORE, centers, 0.2)
    assert nothing.item() == 0
    alone = torch.full((3, 3), math.nan).index_copy(0, torch.tensor([0]), torch.eye(3)[:1])
    assert c2f.triplet_loss(tie.float(), label, alone, 0.2).item() == 0          # no other centre
    with pytest.raises(ValueError, match="negatives"):
        c2f.triplet_loss(tie, label, centers, 0.2, "some")


def test_consistency_loss_is_eq_5_and_valid_labels():
    logits = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    label, bins = labels(2, 3, 5, K=4, seed=1), torch.randint(c2f.BINS, (2, 3, 5), generator=torch.Generator().manual_seed(0))
    thresholds = torch.tensor([0.9, 0.5, 0.0, 0.3004])
    valid = c2f.valid_labels(label, bins, thresholds)
    total = []
    for z, y, b, got in zip(rows(logits), label.flatten().tolist(), bins.flatten().tolist(), valid.flatten().tolist()):
        counts = y != IGNORE and b / c2f.BINS >= round(float(thresholds[y]), 6)
        assert got == (y if counts else IGNORE)
        if counts:
            total.append(-math.log(math.exp(z[y]) / np.exp(z).sum()))
    assert c2f.consistency_loss(logits, valid).item() == pytest.approx(np.mean(total), rel=1e-9)
    assert c2f.consistency_loss(logits, valid * 0 + IGNORE).item() == 0
    assert c2f.first_valid_bin(torch.tensor([0.9, 0.0, 0.076, 1.0]).double()).tolist() == [225, 0, 19, 250]


def test_tau_is_a_function_of_its_seeds():
    images = torch.randn(3, 3, 8, 10, generator=torch.Generator().manual_seed(0))
    a, b = c2f.tau(images, 0.5, [1, 2, 3]), c2f.tau(images[1:], 0.5, [2, 3])
    assert torch.equal(a[1:], b) and not torch.equal(a, c2f.tau(images, 0.5, [1, 2, 4])) and a.shape == images.shape
    state = torch.get_rng_state()
    c2f.tau(images, 0.5, [1, 2, 3])
    assert torch.equal(state, torch.get_rng_state())


# ------------------------------------------------------------------------------------------- on files


def test_a_step_starts_with_the_model_before_it(city, tmp_path):
    """Centres, thresholds and labels of step 2 come from step 1's model, over the aligned source."""
    small = ("--backbone resnet18 --init none --source-size 64x32 --target-size 64x32 --crop 64x32 --workers 0 --batch-size 1 "
             "--step0-iterations 2 --step-iterations 2 --K 2 --log-every 1 --device cpu --adapt-freeze-bn none --step-lr 0.01")
    c2f.main(["--data", str(city), "--runs", str(tmp_path), *small.split()])
    folder = tmp_path / "c2f-gta5"
    model = c2f.build_model("v3+", "resnet18", 19, "none").eval()
    model.load_state_dict(torch.load(folder / "step1.pt", weights_only=True)["state"]["model"])
    kept = torch.load(folder / "step2/state.pt", weights_only=True)

    cfg = c2f.Config(source_size=c2f.Size(64, 32), target_size=c2f.Size(64, 32))
    classes, targets = c2f.class_list("gta5"), find_pairs(city, "cityscapes", labels=False)
    alter = c2f.Alignment(cfg, [pair.image for pair in targets])
    source = c2f.SegmentationDataset(find_pairs(city, "gta5"), "gta5", classes, cfg.source_size, alter=alter)
    total, count = 0, 0
    for image, label, _ in (c2f.OneVersion(source, c2f.derive_seed(0, "centres"))[k] for k in range(len(source))):
        with torch.no_grad():
            feat = model(image[None])[0]
        part = c2f.class_sums(feat, c2f.resize_label(label[None], feat.shape[-2:]), 19)
        total, count = total + part[0], count + part[1]
    expected = c2f.category_centers(total, count).float()
    torch.testing.assert_close(kept["centers"], expected, rtol=1e-4, atol=1e-5, equal_nan=True)

    histogram = torch.zeros(19, c2f.BINS, dtype=torch.int64)
    target = c2f.SegmentationDataset(targets, "cityscapes", classes, cfg.target_size)
    for image, _, name in (target[k] for k in range(len(target))):
        with torch.no_grad():
            p = c2f.upsample(model(image[None])[1], (32, 64)).softmax(dim=1)[0]
        bins, label = (torch.from_numpy(np.array(Image.open(folder / f"step2/{kind}/{name}.png"))).long()
                       for kind in ("confidences", "labels"))
        assert torch.equal(label, p.argmax(dim=0)) and ((p.amax(dim=0) * c2f.BINS).long() - bins).abs().max() <= 1
        histogram += (label * c2f.BINS + bins).flatten().bincount(minlength=19 * c2f.BINS).view(19, -1)
    torch.testing.assert_close(kept["thresholds"], c2f.category_thresholds(histogram).float())
    assert Path(folder / "step2.png").exists()
