"""BiSMAP: equations against naive float64 loops written from the paper, and against numbers of such loops; mixtures against
scikit-learn; the sample; the passes over the data; the arguments of each stage."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
from PIL import Image
from sklearn.mixture import GaussianMixture
from torch import nn
from torchvision import models

import bismap
from bismap import Gmm
from common import metrics
from common.cli import Size
from common.data import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Augment,
    SegmentationDataset,
    class_list,
    read_label,
    read_resized,
    save_label,
)
from common.deeplab import build_model
from common.layouts import find_pairs
from common.run import Run

IGNORE = 255


def random(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(*shape, K, seed=0, ignored=0.2):
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(K, shape, generator=generator)
    return label.masked_fill(torch.rand(shape, generator=generator) < ignored, IGNORE)


def softmax(z):
    e = [math.exp(v - max(z)) for v in z]
    return [v / sum(e) for v in e]


def pixels(x):
    """(N, C, h, w) as a list of pixels, each a list of C values."""
    return x.movedim(1, -1).flatten(0, 2).tolist()


def mixture(G=3, D=4, seed=0):
    weight = random(G, seed=seed).softmax(dim=0)
    return Gmm(weight, random(G, D, seed=seed + 1, scale=3.0), 0.2 + random(G, D, seed=seed + 2).square())


def draw(gmm, n, seed=0):
    rng = np.random.default_rng(seed)
    k = rng.choice(len(gmm.weight), n, p=gmm.weight.numpy())
    return torch.from_numpy(gmm.mean.numpy()[k] + rng.standard_normal((n, gmm.mean.shape[1])) * gmm.variance.sqrt().numpy()[k])


# ----------------------------------------------------------------------------- Eqs. (4), (5): densities


def paper_log_density(f, gmm):
    """Eqs. (4) and (5) for one feature; relative to the largest term, so that nothing underflows."""
    terms = []
    for pi, mu, sigma in zip(*(part.double().tolist() for part in gmm)):
        exponent = math.fsum((a - m) * (a - m) / s for a, m, s in zip(f, mu, sigma))
        log_norm = 0.5 * len(f) * math.log(2 * math.pi) + 0.5 * math.fsum(map(math.log, sigma))
        terms.append(math.log(pi) - 0.5 * exponent - log_norm if pi else -math.inf)
    return max(terms) + math.log(sum(math.exp(t - max(terms)) for t in terms))


def test_log_density_against_the_paper_in_loops_and_scipy():
    gmm, feat = mixture(), random(7, 4, seed=5, scale=3.0)
    got = bismap.log_density(feat, gmm)
    for f, value in zip(feat.tolist(), got.tolist()):
        assert math.isclose(value, paper_log_density(f, gmm), abs_tol=1e-9)
    reference = np.log(sum(pi * scipy.stats.multivariate_normal(mu, np.diag(sigma)).pdf(feat.numpy())
                           for pi, mu, sigma in zip(*(part.numpy() for part in gmm))))
    np.testing.assert_allclose(got.numpy(), reference, atol=1e-9)


def test_log_density_far_in_the_tails_does_not_underflow():
    gmm = Gmm(torch.tensor([0.5, 0.5]).double(), torch.zeros(2, 256).double(), torch.full((2, 256), 1e-2, dtype=torch.float64))
    far = torch.full((1, 256), 10.0).double()                    # 100 standard deviations away in each dimension
    expected = -0.5 * 256 * (1e4 + math.log(2 * math.pi * 1e-2))
    assert math.isclose(bismap.log_density(far, gmm).item(), expected, rel_tol=1e-12)
    single = bismap.log_density(far.float(), Gmm(*(part.float() for part in gmm)))
    assert math.isclose(single.item(), expected, rel_tol=1e-5)


def test_all_categories_and_one_without_components():
    one, two, none = mixture(seed=0), mixture(seed=9), bismap.fit_gmm(torch.zeros(0, 4).double(), 3)
    feat = random(2, 4, 3, 5, seed=3)
    scores = bismap.class_scores(feat, Gmm(*(torch.stack(parts) for parts in zip(one, two, none))))
    assert scores.shape == (2, 3, 3, 5) and scores.isfinite().all() and (scores[:, 2] < -1e29).all()
    for n, y, x in [(0, 0, 0), (1, 2, 4), (0, 1, 3)]:
        for c, gmm in enumerate([one, two]):
            assert math.isclose(scores[n, c, y, x].item(), paper_log_density(feat[n, :, y, x].tolist(), gmm), rel_tol=1e-6)
    assert (bismap.log_density(random(5, 4), none) == -torch.inf).all()


def test_densities_are_exact_where_each_component_has_other_constant_channels():
    """After a ReLU, many channels are constant in one cluster (their variance is the floor) and vary in others."""
    cluster, channel = torch.arange(600) % 3, torch.arange(48)
    feat = (2 + 5 * cluster[:, None] + random(600, 48)).relu().float()
    for k in range(3):
        feat[(cluster == k)[:, None] & (channel % 3 == k)] = 0.7 * k
    gmm = bismap.fit_gmm(feat, 3, seed=3)
    assert [(v == 1e-6).sum().item() for v in gmm.variance] == [16, 16, 16]
    got = bismap.log_density(feat[:60], gmm)
    exact = [paper_log_density(f, gmm) for f in feat[:60].double().tolist()]
    np.testing.assert_allclose(got.numpy(), exact, rtol=0, atol=1e-6)
    scores = bismap.class_scores(feat[:60].T[None, :, None], Gmm(*(part[None] for part in gmm)))
    np.testing.assert_allclose(scores[0, 0, 0].numpy(), exact, rtol=1e-6)


def test_small_variances_beside_large_means_are_fitted_in_float32():
    cluster = torch.tensor([0.0, 5.0])[torch.arange(4000) % 2][:, None]
    feat = torch.cat([cluster + 3e-3 * random(4000, 1).float(), random(4000, 1, seed=1).float() * 1e-3], dim=1)
    start = Gmm(torch.tensor([0.5, 0.5]), torch.tensor([[0.0, 0.0], [5.0, 0.0]]), torch.full((2, 2), 1e-2))
    fitted = bismap.fit_gmm(feat, 2, init=start, variance_floor=1e-9)
    exact = torch.stack([feat[i::2].double().var(dim=0, correction=0) for i in range(2)])
    torch.testing.assert_close(fitted.variance, exact, rtol=1e-6, atol=0)


# ---------------------------------------------------------------------- Sec. 3.3: expectation maximisation


def mean_log_likelihood(feat, gmm):
    return bismap.log_density(feat, gmm).mean().item()


def test_em_agrees_with_scikit_learn_from_the_same_start():
    feat, start = draw(mixture(G=4, D=6), 2000), mixture(G=4, D=6, seed=20)
    theirs = GaussianMixture(4, covariance_type="diag", max_iter=25, tol=0, reg_covar=0, weights_init=start.weight.numpy(),
                             means_init=start.mean.numpy(), precisions_init=1 / start.variance.numpy())
    with pytest.warns(Warning, match="converge"):
        theirs.fit(feat.numpy())
    ours = bismap.fit_gmm(feat, 4, iterations=25, tol=-math.inf, init=start, variance_floor=1e-12)
    for a, b in zip(ours, (theirs.weights_, theirs.means_, theirs.covariances_)):
        np.testing.assert_allclose(a.numpy(), b, atol=1e-8)
    assert math.isclose(mean_log_likelihood(feat, ours), theirs.score(feat.numpy()), abs_tol=1e-8)


def test_a_known_mixture_is_recovered():
    truth = Gmm(torch.tensor([0.2, 0.5, 0.3]).double(), torch.tensor([[-6.0, 0.0], [0.0, 5.0], [6.0, -3.0]]).double(),
                torch.tensor([[0.5, 2.0], [1.0, 0.3], [2.0, 1.0]]).double())
    fitted = bismap.fit_gmm(draw(truth, 20_000, seed=3), 3, tol=1e-9)
    order = fitted.mean[:, 0].argsort()
    for a, b in zip(fitted, truth):
        torch.testing.assert_close(a[order], b, atol=0.06, rtol=0.05)


def test_the_likelihood_never_decreases():
    feat, gmm = draw(mixture(G=5, D=3), 400), mixture(G=5, D=3, seed=30)
    before = mean_log_likelihood(feat, gmm)
    for _ in range(30):                                         # also where the floor limits variances
        gmm = bismap.fit_gmm(feat, 5, iterations=1, tol=-math.inf, init=gmm, variance_floor=0.3)
        after = mean_log_likelihood(feat, gmm)
        assert after >= before - 1e-12 and gmm.variance.min() >= 0.3
        before = after


def test_em_stops_when_the_likelihood_rises_by_less_than_tol(monkeypatch):
    feat, start = draw(mixture(), 300), mixture(seed=40)
    counts = {}
    for tol in (1e-1, 1e-3, 1e-6):
        calls = []
        monkeypatch.setattr(bismap, "component_log_prob", lambda *x, calls=calls: calls.append(1) or original(*x))
        bismap.fit_gmm(feat, 3, iterations=200, tol=tol, init=start)
        counts[tol] = len(calls)
        monkeypatch.undo()
    likelihoods, gmm = [], start
    for _ in range(counts[1e-3]):                               # one E step each; only the last rise is below tol
        likelihoods.append(mean_log_likelihood(feat, gmm))
        gmm = bismap.fit_gmm(feat, 3, iterations=1, tol=-math.inf, init=gmm)
    rises = np.diff(likelihoods)
    assert (rises[:-1] >= 1e-3).all() and rises[-1] < 1e-3
    assert 2 <= counts[1e-1] < counts[1e-3] < counts[1e-6] < 200


original = bismap.component_log_prob


def test_a_component_that_loses_its_samples_has_weight_0():
    feat = draw(mixture(G=1, D=2), 200)
    start = Gmm(torch.tensor([0.5, 0.5]).double(), torch.tensor([[0.0, 0.0], [-1e4, 0.0]]).double(),
                torch.tensor([[9.0, 9.0], [1e-3, 1e-3]]).double())
    fitted = bismap.fit_gmm(feat, 2, iterations=20, tol=-math.inf, init=start)
    assert fitted.weight.tolist() == [1.0, 0.0] and all(part.isfinite().all() for part in fitted)
    torch.testing.assert_close(fitted.mean[0], feat.mean(dim=0))
    torch.testing.assert_close(fitted.variance[0], feat.var(dim=0, correction=0))
    alone = Gmm(*(part[:1] for part in fitted))
    torch.testing.assert_close(bismap.log_density(feat, fitted), bismap.log_density(feat, alone))


@pytest.mark.parametrize("n", [0, 1, 3])
def test_fewer_samples_than_components(n):
    feat = random(n, 4, seed=n)
    gmm = bismap.fit_gmm(feat, 8, variance_floor=1e-2)
    assert [part.shape for part in gmm] == [(8,), (8, 4), (8, 4)]
    assert (gmm.weight > 0).sum() <= n and math.isclose(gmm.weight.sum().item(), float(n > 0))
    assert all(part.isfinite().all() for part in gmm)
    if n:
        assert bismap.log_density(feat, gmm).isfinite().all()


def test_equal_samples():
    gmm = bismap.fit_gmm(torch.full((20, 3), 2.0), 4, variance_floor=1e-4)
    assert all(part.isfinite().all() for part in gmm) and gmm.variance.min() == pytest.approx(1e-4)
    assert bismap.log_density(torch.full((1, 3), 2.0), gmm).isfinite()


def test_the_start_is_k_means():
    feat = draw(mixture(), 200)
    centers = bismap.kmeans(feat, 3, seed=4)
    nearest = (feat[:, None] - centers).square().sum(dim=2).argmin(dim=1)
    start = bismap.fit_gmm(feat, 3, iterations=0, seed=4)
    for k in range(3):
        cluster = feat[nearest == k]
        torch.testing.assert_close(start.weight[k].item(), len(cluster) / 200)
        torch.testing.assert_close(start.mean[k], cluster.mean(dim=0))
        torch.testing.assert_close(start.variance[k], cluster.var(dim=0, unbiased=False))


# --------------------------------------------------------------------------------- Eq. (3): the sample


def test_correct_label_map():
    logits, label = random(2, 4, 3, 5), labels(2, 3, 5, K=4)
    for z, y, got in zip(pixels(logits), label.flatten().tolist(), bismap.correct_label_map(logits, label).flatten().tolist()):
        assert got == (y if z.index(max(z)) == y else IGNORE)


def filled(order, n=10, size=20):
    sample = bismap.FeatureSample(3, size, seed=0)
    for i in order:
        feat = torch.stack([torch.full((n,), float(i)), torch.arange(n, dtype=torch.float32)], dim=1)
        sample.add(f"image{i}", feat, labels(n, K=3, seed=i))
    return sample


def test_the_sample_does_not_depend_on_the_order_of_images():
    expected = [filled(range(30)).features(c).tolist() for c in range(3)]
    for order in (range(29, -1, -1), torch.randperm(30).tolist()):
        sample = filled(order)
        assert all(sum(len(keys) for keys, _ in parts) <= 25 for parts in sample.parts)
        assert [sample.features(c).tolist() for c in range(3)] == expected
    for c, features in enumerate(expected):
        assert len(features) == len(set(map(tuple, features))) == 20
        assert all(labels(10, K=3, seed=int(i))[int(j)] == c for i, j in features)
    few = filled(range(1))
    assert len(few.features(0)) == labels(10, K=3, seed=0).eq(0).sum()
    assert bismap.FeatureSample(2, 5, seed=0).features(1) is None


def test_the_sample_is_uniform():
    """Chi-square over 400 seeds: each of 40 pixels (5 images of 8) is drawn equally often, 8 per seed."""
    drawn = np.zeros(40)
    for seed in range(400):
        sample = bismap.FeatureSample(1, 8, seed)
        for i in range(5):
            sample.add(f"{i}", torch.arange(8 * i, 8 * i + 8, dtype=torch.float32)[:, None], torch.zeros(8, dtype=torch.int64))
        drawn[sample.features(0)[:, 0].long().numpy()] += 1
    assert drawn.sum() == 400 * 8
    # Without replacement, the variance of the counts is 1 - 8/40 of a multinomial's.
    statistic = ((drawn - 80) ** 2 / 80).sum() / (1 - 8 / 40)
    assert 1e-3 < scipy.stats.chi2.sf(statistic, 39) < 1 - 1e-3


# ---------------------------------------------------------------------- Eq. (6) and the others of Table 3


def test_map_pseudo_labels():
    log_prob = random(2, 4, 3, 5, scale=50.0)
    delta = 30.0
    log_prob[0, 2, 0, 0], log_prob[0, :2, 0, 0], log_prob[0, 3, 0, 0] = 30.0, -5.0, -5.0      # exactly delta: labelled
    log_prob[0, :, 0, 1] = 29.999
    got = bismap.map_pseudo_labels(log_prob, delta).flatten().tolist()
    for p, label in zip(pixels(log_prob), got):
        assert label == (p.index(max(p)) if max(p) >= delta else IGNORE)
    assert got[0] == 2 and got[1] == IGNORE
    assert (bismap.map_pseudo_labels(torch.full((1, 2, 1, 1), -torch.inf), -torch.inf) == IGNORE).all()


def test_anchor_pseudo_labels():
    feat, anchors = random(2, 5, 3, 4), random(4, 5, seed=1)
    anchors[2] = torch.nan
    got = bismap.anchor_pseudo_labels(feat, anchors, margin=0.4).flatten().tolist()
    kinds = set()
    for f, label in zip(pixels(feat), got):
        d = sorted((math.dist(f, a), c) for c, a in enumerate(anchors.tolist()) if c != 2)
        assert label == (d[0][1] if d[1][0] - d[0][0] > 0.4 else IGNORE)
        kinds.add(label == IGNORE)
    assert kinds == {True, False}


def test_ias_thresholds():
    theta, confidence, label = torch.tensor([0.9, 0.5, 0.7]).double(), random(6, 7).sigmoid(), labels(6, 7, K=2, ignored=0.0)
    got = bismap.ias_thresholds(theta, confidence, label)
    for c in (0, 1):
        ranked = sorted((p for p, y in zip(confidence.flatten().tolist(), label.flatten().tolist()) if y == c), reverse=True)
        psi = ranked[int(len(ranked) * 0.2 * theta[c].item() ** 8)]
        assert math.isclose(got[c].item(), 0.9 * theta[c].item() + 0.1 * psi)
    assert got[2] == theta[2]


# ----------------------------------------------------------------------------- Eqs. (7) to (9): transferability


def test_kmeans_is_a_fixed_point_and_depends_on_its_seed_only():
    feat = draw(mixture(G=4, D=3), 500)
    centers = bismap.kmeans(feat, 4, iterations=100, seed=2)
    nearest = (feat[:, None] - centers).square().sum(dim=2).argmin(dim=1)
    for j in range(4):
        torch.testing.assert_close(centers[j], feat[nearest == j].mean(dim=0))
    assert torch.equal(bismap.kmeans(feat, 4, iterations=100, seed=2), centers)
    truth = torch.tensor([[0.0, 0.0], [50.0, 0.0], [0.0, 50.0], [50.0, 50.0], [99.0, 99.0]]).double()
    blobs = truth.repeat_interleave(40, dim=0) + random(200, 2)
    for seed in range(5):                                        # k-means++ finds well separated blobs
        estimated = bismap.kmeans(blobs, 5, seed=seed)
        assert (estimated[:, None] - truth).norm(dim=2).min(dim=0).values.max() < 1.0


@pytest.mark.parametrize("n", [1, 3, 50])
def test_kmeans_with_few_or_equal_features(n):
    assert bismap.kmeans(random(n, 3), 6).isfinite().all()
    equal = bismap.kmeans(torch.full((n, 3), 4.0), 6)
    assert equal.shape == (6, 3) and (equal == 4.0).all()


def test_target_distance():
    feat, prototypes = random(9, 4), random(5, 4, seed=1)
    expected = [min(math.dist(f, a) for a in prototypes.tolist()) for f in feat.tolist()]
    torch.testing.assert_close(bismap.target_distance(feat, prototypes), torch.tensor(expected).double())
    assert bismap.target_distance(prototypes[:1], prototypes).item() == pytest.approx(0.0, abs=1e-6)


def test_normalised_entropy():
    got = bismap.normalised_entropy(torch.tensor([0.5, math.nan, 2.0, 1.0]).double())
    torch.testing.assert_close(got, torch.tensor([0.0, 0.0, 1.0, 1 / 3]).double())
    assert (bismap.normalised_entropy(torch.tensor([0.7, 0.7, math.nan])) == 0).all()
    assert (bismap.normalised_entropy(torch.full((3,), math.nan)) == 0).all()


def test_transferability_map():
    distance, label, e = random(2, 3, 4).abs() * 3, labels(2, 3, 4, K=3), torch.tensor([0.0, 0.3, 1.0]).double()
    got = bismap.transferability_map(distance, 1.5, e, label)
    for D, y, w in zip(distance.flatten().tolist(), label.flatten().tolist(), got.flatten().tolist()):
        expected = 0.0 if y == IGNORE else min(math.exp(-D * D / (1.5 * 1.5) * math.log(2)) + e[y].item(), 1.0)
        assert math.isclose(w, expected, abs_tol=1e-12)
    zero = torch.zeros(1, 1, 2, dtype=torch.int64)
    at_mean = bismap.transferability_map(torch.tensor([[[1.5, 0.0]]]), 1.5, torch.zeros(1), zero)
    torch.testing.assert_close(at_mean, torch.tensor([[[0.5, 1.0]]]))


# ------------------------------------------------------------------------------------ Eqs. (10) to (12): losses


def test_reweighted_cross_entropy():
    logits, label, weight = random(2, 3, 4, 5, scale=2.0), labels(2, 4, 5, K=3), random(2, 4, 5, seed=7).sigmoid()
    total = sum(-w * math.log(softmax(z)[y]) for z, y, w in zip(
        pixels(logits), label.flatten().tolist(), weight.flatten().tolist()) if y != IGNORE)
    expected = total / (label != IGNORE).sum().item()
    assert math.isclose(bismap.reweighted_cross_entropy(logits, label, weight).item(), expected, rel_tol=1e-12)
    torch.testing.assert_close(bismap.reweighted_cross_entropy(logits, label, torch.ones(2, 4, 5)),
                               bismap.reweighted_cross_entropy(logits, label))


def test_symmetric_cross_entropy():
    logits, label = random(2, 3, 4, 5, scale=4.0), labels(2, 4, 5, K=3)
    logits[0, :, 0, 0] = torch.tensor([40.0, 0.0, 0.0])          # p of the label far below any clamp
    label[0, 0, 0] = 1
    total = 0.0
    for z, y in zip(pixels(logits), label.flatten().tolist()):
        if y != IGNORE:
            p = softmax(z)
            total += -0.1 * math.log(p[y]) - 1.0 * sum(p[c] * math.log(1.0 if c == y else 1e-4) for c in range(3))
    expected = total / (label != IGNORE).sum().item()
    assert math.isclose(bismap.symmetric_cross_entropy(logits, label).item(), expected, rel_tol=1e-9)
    double = bismap.symmetric_cross_entropy(logits, label, alpha=0.3, beta=0.0) / 3 + bismap.symmetric_cross_entropy(
        logits, label, alpha=0.0, beta=1.0)
    torch.testing.assert_close(double, bismap.symmetric_cross_entropy(logits, label))


@pytest.mark.parametrize("margin", [17.0, 30.0, 200.0])
def test_a_confidently_contradicted_pixel_keeps_its_gradient(margin):
    logits = torch.tensor([margin, 0.0, 0.0]).view(1, 3, 1, 1).requires_grad_()
    bismap.symmetric_cross_entropy(logits, torch.full((1, 1, 1), 1)).backward()
    torch.testing.assert_close(logits.grad.flatten(), torch.tensor([0.1, -0.1, 0.0]), atol=1e-5, rtol=0)


def test_consistency_loss():
    student, teacher = random(2, 3, 4, 5, scale=2.0), random(2, 3, 4, 5, seed=1, scale=2.0)
    mask = labels(2, 4, 5, K=2, ignored=0) > 0
    each = [q * math.log(q) - q * math.log(p) for a, b in zip(pixels(student), pixels(teacher))
            for p, q in zip(softmax(a), softmax(b))]             # per pixel and category
    assert math.isclose(bismap.consistency_loss(student, teacher).item(), sum(each) / len(each), rel_tol=1e-12)
    selected = [value for value, m in zip(each, mask.flatten().repeat_interleave(3).tolist()) if m]
    assert math.isclose(bismap.consistency_loss(student, teacher, mask).item(), sum(selected) / len(selected), rel_tol=1e-12)
    assert abs(bismap.consistency_loss(student, student).item()) < 1e-15
    student.requires_grad_(), teacher.requires_grad_()
    bismap.consistency_loss(student, teacher).backward()
    assert teacher.grad is None
    improved = (student - 0.5 * student.grad).detach()           # towards the teacher
    assert bismap.consistency_loss(improved, teacher) < bismap.consistency_loss(student, teacher)


def test_lambda_rises_over_4000_iterations_or_a_share_of_a_short_stage():
    assert math.isclose(bismap.ramp(0, 90_000), math.exp(-5)) and math.isclose(bismap.ramp(2000, 90_000), math.exp(-1.25))
    assert bismap.ramp(3999, 90_000) < 1.0 == bismap.ramp(4000, 90_000) == bismap.ramp(89_999, 90_000)
    assert math.isclose(bismap.ramp(60, 480), math.exp(-1.25)) and bismap.ramp(119, 480) < 1.0 == bismap.ramp(120, 480)
    assert math.isclose(bismap.ramp(2, 100, length=4, share=0.5), math.exp(-1.25))
    assert bismap.ramp(0, 100, length=0) == bismap.ramp(0, 100, share=0.0) == 1.0


def test_golden_numbers():
    """Values of loops over the paper's sums: a changed reading of an equation shows here."""
    Z = torch.tensor([[2.0, 0.5, -1.0], [-1.0, 0.0, 3.0]]).double().T.view(1, 3, 1, 2)
    T = torch.tensor([[0.0, 1.0, 2.0], [1.0, 1.0, -1.0]]).double().T.view(1, 3, 1, 2)
    Y, W = torch.tensor([[[1, 2]]]), torch.tensor([[[0.25, 1.0]]]).double()
    gmm = Gmm(torch.tensor([0.3, 0.7]).double(), torch.tensor([[0.0, 1.0], [2.0, -1.0]]).double(),
              torch.tensor([[0.5, 2.0], [1.0, 0.25]]).double())
    feat = torch.tensor([[0.0, 1.0], [1.0, 0.5], [2.0, -1.0], [2.5, -1.5]]).double()
    step = bismap.fit_gmm(feat, 2, iterations=1, init=gmm)
    prototypes = bismap.kmeans(torch.tensor([[0.0], [1.0], [10.0], [12.0]]).double(), 2)
    got = {
        "Eq. (2)": bismap.reweighted_cross_entropy(Z, Y),
        "Eq. (3)": bismap.correct_label_map(Z, torch.tensor([[[1, 2]]])).flatten(),
        "Eqs. (4), (5)": bismap.log_density(torch.tensor([[1.0, 0.0], [-3.0, 4.0]]), gmm),
        "Sec. 3.3, weight": step.weight, "Sec. 3.3, mean": step.mean.flatten(), "Sec. 3.3, variance": step.variance.flatten(),
        "Eq. (6)": bismap.map_pseudo_labels(10 * Z, 25.0).flatten(),
        "Sec. 3.4": prototypes.sort(dim=0).values.flatten(),
        "Eq. (7)": bismap.target_distance(torch.tensor([[3.0, 4.0], [6.0, 0.0]]), torch.tensor([[0.0, 0.0], [6.0, 1.0]])),
        "Eq. (8)": bismap.normalised_entropy(torch.tensor([0.2, 0.5, math.nan, 1.1])),
        "Eq. (9)": bismap.transferability_map(torch.tensor([[[3.0, 1.0, 0.5, 9.0]]]), 2.0, torch.tensor([0.1, 0.0, 0.4]),
                                              torch.tensor([[[0, 1, 2, IGNORE]]])).flatten(),
        "Eq. (10)": bismap.reweighted_cross_entropy(Z, Y, W),
        "Eq. (11)": bismap.symmetric_cross_entropy(Z, Y),
        "Eq. (12)": bismap.consistency_loss(Z, T),
        "ramp": torch.tensor([bismap.ramp(1000, 90_000), bismap.ramp(100, 2000)]),
        "CAs": bismap.anchor_pseudo_labels(torch.tensor([[[[0.0, 1.9]]]]), torch.tensor([[0.0], [3.0]]), 1.0).flatten(),
        "IAS": bismap.ias_thresholds(torch.tensor([0.5, 0.9]), torch.tensor([[0.6, 0.8]]), torch.tensor([[0, 0]])),
    }
    golden = {
        "Eq. (2)": 0.9035976002072931,
        "Eq. (3)": [255, 2],
        "Eqs. (4), (5)": [-3.4429722365562485, -14.291849870735282],
        "Sec. 3.3, weight": [0.47949859124074024, 0.5205014087592598],
        "Sec. 3.3, mean": [0.47961084791631736, 0.7593373133239333, 2.199854322795776, -1.1798261477893257],
        "Sec. 3.3, variance": [0.2514043665974676, 0.06509016141795802, 0.12057863177292817, 0.17825337620046502],
        "Eq. (6)": [255, 2],
        "Sec. 3.4": [0.5, 11.0],
        "Eq. (7)": [4.242640687119285, 1.0],
        "Eq. (8)": [0.0, 0.3333333333333333, 0.0, 1.0],
        "Eq. (9)": [0.3102241038134287, 0.8408964152537145, 1.0, 0.0],
        "Eq. (10)": 0.2506058639608592,
        "Eq. (11)": 4.181915572978919,
        "Eq. (12)": 0.7050678926616815,
        "ramp": [0.060054667895307945, 0.04076220397836619],
        "CAs": [0, 255],
        "IAS": [0.53, 0.9],
    }
    assert got.keys() == golden.keys()
    for name, value in golden.items():
        np.testing.assert_allclose(got[name].numpy(), value, rtol=1e-6, atol=1e-9, err_msg=name)


def test_nothing_labelled_gives_zero_and_a_finite_gradient():
    logits, nothing = random(1, 3, 2, 2).requires_grad_(), torch.full((1, 2, 2), IGNORE)
    losses = [bismap.reweighted_cross_entropy(logits, nothing), bismap.symmetric_cross_entropy(logits, nothing),
              bismap.reweighted_cross_entropy(logits, nothing, torch.ones(1, 2, 2)),
              bismap.consistency_loss(logits, logits + 1, torch.zeros(1, 2, 2, dtype=torch.bool))]
    assert [loss.item() for loss in losses] == [0.0] * 4
    sum(losses).backward()
    assert (logits.grad == 0).all()


# ------------------------------------------------------------------------------------------- teacher and phi


def test_the_teacher_follows_weights_and_buffers():
    torch.manual_seed(0)
    model, teacher = (nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)) for _ in range(2))
    model(torch.randn(4, 3, 5, 5))
    expected = {k: 0.9 * teacher.state_dict()[k] + 0.1 * v if v.is_floating_point() else v.clone()
                for k, v in model.state_dict().items()}
    assert not torch.equal(model[1].running_mean, teacher[1].running_mean) and model[1].num_batches_tracked == 1
    bismap.update_teacher(teacher, model, 0.9)
    for key, value in teacher.state_dict().items():
        torch.testing.assert_close(value, expected[key])


def test_phi():
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    images = (torch.rand(3, 3, 20, 30, generator=torch.Generator().manual_seed(0)) - mean) / std
    x, visible = bismap.phi(images, [1, 2, 1], cutout=0.5)
    assert x.shape == images.shape and visible.dtype == torch.bool and x.isfinite().all()
    again, visible_again = bismap.phi(images[1:2], [2], cutout=0.5)
    assert torch.equal(again[0], x[1]) and torch.equal(visible_again[0], visible[1])  # by seed, not position
    assert torch.equal(visible[0], visible[2]) and not torch.equal(visible[0], visible[1])
    assert (x.movedim(1, -1)[~visible] == 0).all()
    removed = (~visible).flatten(1).sum(dim=1)
    assert (removed <= 100).all() and (removed > 0).all()                            # a square of 10, cut at the border
    same, all_visible = bismap.phi(images, [1, 2, 3], operations=0, cutout=0.0)
    assert all_visible.all() and (same - images).abs().max() < 0.01                  # 8 bits per channel
    values = (x * std + mean).movedim(1, -1)[visible]
    assert values.min() > -1e-5 and values.max() < 1 + 1e-5


# ----------------------------------------------------------------------------------------------- preparation

TINY = ("--backbone resnet18 --init none --source-size 64x32 --target-size 64x32 --crop 64x32 --workers 0 "
        "--warmup-iterations 2 --selftrain-iterations 2 --no-distill --warmup-batch-size 1 --batch-size 1 --lr 1e-4 "
        "--stm-backbone warmup --stm-size 128x64 --samples 200 --stm-samples 200 --components 2 --J 3 --pl-ratio 0.5").split()


class Killed(BaseException):
    """No code catches it, as no code catches a kill."""


def test_prototypes_survive_a_kill_but_not_other_settings(city, tmp_path, monkeypatch, capsys):
    argv = ["--data", str(city), "--runs", str(tmp_path), *TINY]

    def killed(*args):
        raise Killed
    monkeypatch.setattr(bismap, "choose_delta", killed)
    with pytest.raises(Killed):
        bismap.main(argv)
    monkeypatch.undo()
    prototypes = (tmp_path / "bismap-gta5/selftrain-prototypes.pt").read_bytes()
    warmup = str(tmp_path / "bismap-gta5/warmup.pt")
    with pytest.raises(SystemExit):
        bismap.main([*argv, "--components", "3"])
    assert "--components (2 -> 3)" in capsys.readouterr().err
    monkeypatch.setattr(bismap, "fit_prototypes", killed)            # must not be called again
    monkeypatch.setattr(bismap, "write_transferability", killed)
    with pytest.raises(Killed):
        bismap.main(argv)
    assert (tmp_path / "bismap-gta5/selftrain-target.pt").exists()
    monkeypatch.undo()
    for part in ("fit_prototypes", "label_target", "cluster_target"):
        monkeypatch.setattr(bismap, part, killed)
    bismap.main(argv)
    for part in ("write_transferability", "independent_encoder"):
        monkeypatch.setattr(bismap, part, killed)
    (tmp_path / "bismap-gta5/selftrain.pt").unlink(), (tmp_path / "bismap-gta5/results.json").unlink()
    bismap.main(argv)                                                # trains again from the saved parts, without E^
    assert (tmp_path / "bismap-gta5/selftrain-prototypes.pt").read_bytes() == prototypes
    monkeypatch.undo()
    monkeypatch.setattr(bismap, "choose_delta", killed)              # the same with another run's warm-up
    again = ["--from", warmup, "--tag", "from"]
    with pytest.raises(Killed):
        bismap.main([*argv, *again])
    monkeypatch.undo()
    with pytest.raises(SystemExit):
        bismap.main([*argv, *again, "--components", "3"])
    assert "--components (2 -> 3)" in capsys.readouterr().err


def entropy_of(logits):
    """Entropy and argmax of every pixel of (1, C, h, w) logits, in float64."""
    p = np.stack([softmax(z) for z in pixels(logits.double())])
    return -(p * np.log(p)).sum(axis=1), p.argmax(axis=1)


def cells(model, x):
    """E^ is the warm-up's encoder: layer4 (stride 16) of the image at 128x64, averaged over 4 x 4 cells of 1 x 2: (16, D)."""
    x = nn.functional.interpolate(x, (64, 128), mode="bilinear", antialias=True)
    feat = bismap.resnet_features(model.encoder, x)[1][0].double().numpy()           # (D, 4, 8)
    return np.stack([(feat[:, i, 2 * j] + feat[:, i, 2 * j + 1]) / 2 for i in range(4) for j in range(4)])


@torch.inference_mode()
def test_prototypes_labels_and_maps_follow_the_equations(city, tmp_path, monkeypatch):
    """On the files and the warm-up model of a run whose alignment inverts the source images."""
    monkeypatch.setattr(bismap, "photometric_fit", lambda image, reference, size: lambda crop: 1 - crop)
    with torch.inference_mode(False):
        bismap.main(["--data", str(city), "--runs", str(tmp_path), *TINY, "--source-size", "96x40", "--samples", "100000",
                     "--lr", "2e-3", "--warmup-iterations", "8"])
    folder, classes = tmp_path / "bismap-gta5", class_list("gta5")
    model = build_model("v3+", "resnet18", 19, "none", "none").eval()
    model.load_state_dict(torch.load(folder / "warmup.pt", weights_only=True)["state"]["model"])
    source, target = find_pairs(city, "gta5", "train"), find_pairs(city, "cityscapes", "train", labels=False)
    aligned = SegmentationDataset(source, "gta5", classes, Size(96, 40), transform=lambda image, *_: (255 - image, None))
    plain = SegmentationDataset(target, "cityscapes", classes, Size(64, 32))
    source, target = [aligned[k, 0] for k in range(8)], [plain[k] for k in range(8)]

    correct = {c: [] for c in range(19)}                                             # Eq. (3)
    for image, label, _ in source:
        feat, logits = model(image[None])                                            # stride 4: 10 x 24
        for f, z, y in zip(pixels(feat), pixels(logits), label[2::4, 2::4].flatten().tolist()):
            if z.index(max(z)) == y:
                correct[y].append(f)
    fitted = torch.load(folder / "selftrain-prototypes.pt", weights_only=True)
    assert fitted["count"].tolist() == [len(correct[c]) for c in range(19)] and sum(map(bool, correct.values())) >= 2
    for c in range(19):
        if correct[c]:
            np.testing.assert_allclose(fitted["anchor"][c], np.mean(correct[c], axis=0), rtol=1e-4, atol=1e-5)
            mean = (fitted["weight"][c][:, None] * fitted["mean"][c]).sum(dim=0)     # a mixture's mean is its samples' mean
            np.testing.assert_allclose(mean, np.mean(correct[c], axis=0), rtol=1e-4, atol=1e-5)

    gmms = Gmm(fitted["weight"], fitted["mean"], fitted["variance"])
    note = next(line for line in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if "delta" in line)
    delta, labelled, entropies, cell_features = note["delta"], torch.zeros(19), [], []  # Eq. (6), and e_c
    for image, _, name in target:
        feat, logits = model(image[None])
        expected = bismap.map_pseudo_labels(bismap.upsample(bismap.class_scores(feat, gmms), (32, 64)), delta)[0]
        written = torch.from_numpy(np.array(Image.open(folder / f"pseudo_labels/{name}.png"))).long()
        assert (written != expected).float().mean() < 0.01                           # rounding at borders
        labelled += written[written != IGNORE].bincount(minlength=19)
        entropies.append(entropy_of(logits))
        cell_features.append(cells(model, image[None]))
    assert 0 <= labelled.sum() / (8 * 64 * 32) - 0.5 < 1e-3                          # --pl-ratio 0.5
    shares = [*labelled.tolist(), labelled.sum().item()]
    assert list(note["pl_ratio"].values()) == pytest.approx([100 * share / (8 * 64 * 32) for share in shares])
    assert note["samples"] == dict(zip(classes.names, fitted["count"].tolist()))
    entropy, predicted = (np.concatenate(part) for part in zip(*entropies))
    e = torch.load(folder / "selftrain-labels.pt", weights_only=True)["entropy"]
    for c in range(19):
        np.testing.assert_allclose(e[c], entropy[predicted == c].mean() if (predicted == c).any() else np.nan, rtol=1e-4)

    clusters, cell_features = torch.load(folder / "selftrain-target.pt", weights_only=True), np.concatenate(cell_features)
    A = clusters["prototypes"].double().numpy()
    nearest = np.linalg.norm(cell_features[:, None] - A, axis=2).argmin(axis=1)
    for j in range(3):                                                               # centres of the target's features
        np.testing.assert_allclose(A[j], cell_features[nearest == j].mean(axis=0), rtol=1e-3, atol=1e-3)
    D = [np.linalg.norm(cells(model, image[None])[:, None] - A, axis=2).min(axis=1) for image, _, _ in source]   # Eq. (7)
    d_mean = np.mean(D)
    assert math.isclose(clusters["d_mean"].item(), d_mean, rel_tol=1e-4)
    seen = {c: v for c, v in enumerate(e.tolist()) if not math.isnan(v)}
    low, high = min(seen.values()), max(seen.values())
    for (_, label, name), distance in list(zip(source, D))[:2]:
        w = np.array(Image.open(folder / f"transferability/{name}.png"))
        assert w.shape == (40, 96)
        for y, x in [(0, 0), (9, 23), (10, 24), (20, 50), (39, 95), (25, 71), (15, 60), (30, 5)]:
            c, d = label[y, x].item(), distance[4 * (y // 10) + x // 24]             # cells of 10 x 24 pixels
            share = (seen[c] - low) / (high - low) if c in seen else 0.0
            expected = 0.0 if c == IGNORE else min(math.exp(-d * d / d_mean**2 * math.log(2)) + share, 1.0)      # Eq. (9)
            assert abs(w[y, x] - 255 * expected) <= 1

    results = json.loads((folder / "results.json").read_text())                      # evaluated on all pixels of val
    val = [read_label(pair.label, "cityscapes", classes) for pair in find_pairs(city, "cityscapes", "val")]
    for stage in ("warmup", "selftrain"):
        matrix = torch.tensor(results[stage]["single-scale"]["matrix"])
        assert matrix.sum(dim=1).tolist() == sum(y[y != IGNORE].bincount(minlength=19) for y in val).tolist()


def test_the_independent_encoder_sees_small_images_and_gives_a_coarse_grid(tmp_path):
    torch.manual_seed(0)
    net, x = models.resnet18(), torch.randn(1, 3, 300, 640)
    torch.save(net.state_dict(), tmp_path / "net.pth")
    cfg = bismap.Config(stm_backbone="resnet18", stm_weights=str(tmp_path / "net.pth"))
    run = SimpleNamespace(place=lambda module: module, device="cpu", autocast=contextlib.nullcontext)
    with torch.no_grad():
        got = bismap.independent_encoder(run, cfg, None)(x)                          # (16, D)
        small = nn.functional.interpolate(x, (128, 256), mode="bilinear", antialias=True)
        layer4 = nn.Sequential(*list(net.eval().children())[:-2])(small)             # (1, D, 4, 8)
    torch.testing.assert_close(got, layer4.view(512, 16, 2).mean(dim=2).T)
    other = bismap.Config(stm_backbone="resnet18", stm_weights=str(tmp_path / "net.pth"), stm_layer="fc")
    with pytest.raises(bismap.UserError, match="--stm-layer fc"):
        bismap.independent_encoder(run, other, None)


# ------------------------------------------------------------------------------------------------- the stages


class Tiny(nn.Module):
    """Stride 4, six features with batch norm, four classes."""

    def __init__(self):
        super().__init__()
        self.encoder, self.norm, self.head = nn.Conv2d(3, 6, 3, stride=4, padding=1), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1)

    def forward(self, x):
        feat = self.norm(self.encoder(x)).tanh()
        return feat, self.head(feat)

    def parameter_groups(self, lr, encoder_rate):
        rest = [*self.norm.parameters(), *self.head.parameters()]
        return [{"params": rest, "lr": lr}, {"params": self.encoder.parameters(), "lr": encoder_rate * lr}]


class FakeRun:
    """The part of a Run that a stage uses."""

    rank = 0
    item_seeds = Run.item_seeds

    def __init__(self, batches):
        self.batches, self.losses, self.options = batches, [], SimpleNamespace(seed=3)

    def autocast(self):
        return contextlib.nullcontext()

    def stage(self, *call, batch_size, note=None):
        (self.name, self.iterations, self.state, *self.data), self.batch_size, self.note = call, batch_size, note
        yield from ((it, *batch) for it, batch in enumerate(self.batches))

    def report(self, **losses):
        self.losses.append({name: loss.item() for name, loss in losses.items()})


def tiny(seed=0):
    torch.manual_seed(seed)
    return Tiny().double()


def tiny_batches():
    batches = []
    for it in range(2):
        x_s, x_t = random(2, 3, 16, 32, seed=it), 0.3 + 0.5 * random(2, 3, 16, 32, seed=10 + it)
        y_s, y_t = labels(2, 16, 32, K=4, seed=it), labels(2, 16, 32, K=4, seed=20 + it, ignored=0.5)
        y_s[0, :4], y_t[1, :, :9] = IGNORE, IGNORE                               # images with different numbers of labels
        w = torch.randint(256, y_s.shape, generator=torch.Generator().manual_seed(it))
        batches.append(((x_s, y_s, w), (x_t, torch.full_like(y_t, IGNORE), y_t)))
    return batches


def probabilities(logits, size):
    return nn.functional.interpolate(logits, size, mode="bilinear", align_corners=True).softmax(dim=1)


def eq10(logits, label, w):
    p = probabilities(logits, label.shape[-2:])
    n, i, j = (label != IGNORE).nonzero(as_tuple=True)
    return -(w[n, i, j] / 255 * p[n, label[n, i, j], i, j].log()).sum() / len(n)


def eq11(logits, label, alpha, beta):
    p = probabilities(logits, label.shape[-2:])
    n, i, j = (label != IGNORE).nonzero(as_tuple=True)
    total = 0
    for c in range(4):
        y = (label[n, i, j] == c).double()
        total = total - alpha * y * p[n, c, i, j].log() - beta * p[n, c, i, j] * y.clamp(1e-4, 1).log()
    return total.sum() / len(n)


def eq12(student, teacher, counts):
    p, q = student.softmax(dim=1), teacher.softmax(dim=1)
    return ((q * (q.log() - p.log())).sum(dim=1) * counts).sum() / (4 * counts.sum())


def train_by_hand(model, cfg, lr, batches, losses):
    """SGD written out. losses(it, *batch) -> reported losses, minimised loss; called before each step."""
    weights = [(p, lr if name.startswith("encoder") else cfg.head_rate * lr, torch.zeros_like(p))
               for name, p in model.named_parameters()]
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


def check_stage(run, model, by_hand, expected):
    assert len(run.losses) == len(expected) == 2
    for reported, by_equation in zip(run.losses, expected):
        assert reported.keys() == by_equation.keys() and reported == pytest.approx(by_equation, rel=1e-6)
    for key, value in by_hand.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-6, atol=1e-9)


CFG = dict(lr=0.15, adapt_lr=0.025, head_rate=2.0, momentum=0.9, weight_decay=0.03, batch_size=2, warmup_batch_size=5,
           alpha=0.2, beta=0.7, lambda_kl=0.6, ema=0.8, ramp_iterations=4, warmup_iterations=70, selftrain_iterations=77,
           distill_iterations=78)


def test_warm_up_minimises_eq_2():
    cfg, model, by_hand = bismap.Config(**CFG), tiny(), tiny()
    batches = [((x, y),) for (x, y, _), _ in tiny_batches()]

    def losses(it, source):
        seg = eq10(by_hand(source[0])[1], source[1], torch.full_like(source[1], 255))
        return {"seg": seg}, seg
    run = FakeRun(batches)
    bismap.warm_up(run, cfg, model, None, 33)
    assert (run.name, run.iterations, run.batch_size) == ("warmup", 33, 5)
    check_stage(run, model, by_hand, train_by_hand(by_hand, cfg, 0.15, batches, losses))


@pytest.mark.parametrize(("augment", "weighted", "lambda_consist"), [("teacher", True, 90.0), ("student", False, 90.0),
                                                                     ("teacher", True, 0.0)])
def test_self_training_minimises_eq_13(augment, weighted, lambda_consist, monkeypatch):
    cfg = bismap.Config(**CFG, augment=augment, lambda_consist=lambda_consist, cutout=0.5)
    model, by_hand, teacher, batches, augmented = tiny(), tiny(), tiny().eval(), tiny_batches(), []
    if not weighted:
        batches = [(source[:2], target) for source, target in batches]

    def spy(images, seeds, *how, _phi=bismap.phi):
        augmented.append((images, seeds, how, *_phi(images, seeds, *how)))
        return augmented[-1][3:]
    monkeypatch.setattr(bismap, "phi", spy)

    def losses(it, source, target):
        x_s, y_s, *w = source
        x_t, _, y_t = target
        if it:                                                                   # theta' after the previous step
            for old, new in zip(teacher.state_dict().values(), by_hand.state_dict().values()):
                old.copy_(0.8 * old + 0.2 * new if old.is_floating_point() else new)
        logits_s, logits_t = by_hand(x_s)[1], by_hand(x_t)[1]
        ce = eq10(logits_s, y_s, w[0] if w else torch.full_like(y_s, 255))
        sce, consist = eq11(logits_t, y_t, 0.2, 0.7), torch.zeros(())
        if lambda_consist:
            _, seeds, how, x_phi, visible = augmented[it]
            assert seeds == [bismap.derive_seed(3, "phi", it, n) for n in range(2)] and how == (2, 0.5, 0.5)
            counts = visible[:, 2::4, 2::4]                                      # nearest: the third of 4 pixels
            assert 0 < counts.sum() < counts.numel()
            if augment == "student":
                consist = eq12(by_hand(x_phi)[1], teacher(x_t)[1], counts)
            else:
                consist = eq12(logits_t, teacher(x_phi)[1], counts)
        rise = math.exp(-5 * (1 - it / 4) ** 2)                                  # lambda's, over 4 iterations
        return {"ce": ce, "sce": sce, "consist": consist}, ce + sce + lambda_consist * rise * consist
    run = FakeRun(batches)
    bismap.self_train(run, cfg, model, None, None, {"delta": 3.0})
    assert (run.name, run.iterations, run.batch_size, run.note) == ("selftrain", 77, 2, {"delta": 3.0})
    assert run.state.keys() == {"model", "teacher", "optimizer"} and not run.state["teacher"].training
    with torch.no_grad():
        state = {"model": model.state_dict(), "teacher": run.state["teacher"].state_dict()}
    check_stage(run, model, by_hand, train_by_hand(by_hand, cfg, 0.025, batches, losses))
    for key, value in teacher.state_dict().items():                              # after the last step too
        old, new = value, by_hand.state_dict()[key]
        expected = 0.8 * old + 0.2 * new if old.is_floating_point() else new
        torch.testing.assert_close(state["teacher"][key], expected, rtol=1e-6, atol=1e-9)


def test_distillation_learns_labels_and_the_previous_model():
    cfg, student, by_hand, previous, batches = bismap.Config(**CFG), tiny(1), tiny(1), tiny(2), tiny_batches()

    def losses(it, source, target):
        (x_s, y_s, w), (x_t, _, y_t) = source, target
        logits_s, logits_t = by_hand(x_s)[1], by_hand(x_t)[1]
        with torch.no_grad():
            logits_previous = previous(x_t)[1]
        ce, sce = eq10(logits_s, y_s, w), eq11(logits_t, y_t, 0.2, 0.7)
        kl = eq12(logits_t, logits_previous, torch.ones(2, *logits_t.shape[-2:]))
        return {"ce": ce, "sce": sce, "kl": kl}, ce + sce + 0.6 * kl
    before = {key: value.clone() for key, value in previous.state_dict().items()}
    run = FakeRun(batches)
    bismap.distill(run, cfg, "distill2", student, previous, None, None)
    assert (run.name, run.iterations, run.batch_size) == ("distill2", 78, 2) and not previous.training
    check_stage(run, student, by_hand, train_by_hand(by_hand, cfg, 0.025, batches, losses))
    assert all(torch.equal(before[key], value) for key, value in previous.state_dict().items())


class Sweep(FakeRun):
    def sweep(self, what, dataset, shared=True):
        yield from dataset


def test_hard_labels_are_multi_scale_and_flipped(tmp_path):
    images = [(random(1, 3, 32, 48, seed=k), None, (f"{k}",)) for k in range(3)]
    model, run = tiny(4), Sweep([])
    bismap.write_hard_labels(run, bismap.Config(test_scales=(0.5, 1.5)), "distill2", model, images, tmp_path)
    assert not model.training
    written = torch.stack([torch.from_numpy(np.array(Image.open(tmp_path / f"{k}.png"))) for k in range(3)]).long()

    def predicted(**how):
        return torch.cat([metrics.predict(model, x, (32, 48), **how) for x, _, _ in images])
    assert torch.equal(written, predicted(scales=(0.5, 1.5), flip=True))
    assert not torch.equal(written, predicted(flip=True)) and not torch.equal(written, predicted(scales=(0.5, 1.5)))


def test_the_warm_up_model_can_be_trained_on_after_the_preparation(tmp_path):
    run, model = Sweep([]), tiny().eval()
    run.folder, run.classes, run.once = tmp_path, class_list("gta5"), lambda stage, what, compute: compute()
    target = object()
    assert bismap.prepare_selftraining(run, bismap.Config(assign="none", stm=False), model, None, [], target) == (target, {})
    assert model.training and all(p.requires_grad for p in model.parameters())


# ------------------------------------------------------------------------------- the arguments of each stage

WIRING = ("--backbone resnet18 --init none --freeze-bn encoder --workers 0 --source-size 72x40 --target-size 64x32 "
          "--crop 48x24 --scale 0.75 1.25 --jitter 0.3 --warmup-iterations 2 --selftrain-iterations 3 --distill-iterations 4 "
          "--stm-backbone warmup").split()


@pytest.fixture
def uneven(city, tmp_path):
    """A city with 5 source, 8 target and 3 test images."""
    shutil.copytree(city, tmp_path / "data")
    for pair in find_pairs(tmp_path / "data", "gta5", "train")[5:]:
        pair.image.unlink(), pair.label.unlink()
    return tmp_path / "data"


def fingerprint(model):
    return sum(value.double().abs().sum().item() for value in model.state_dict().values())


def frozen(model):
    """(part, whether its batch norm is frozen) for the parts of a network."""
    return {(name.split(".")[0], not (m.training or m.weight.requires_grad)) for name, m in model.named_modules()
            if isinstance(m, nn.BatchNorm2d)}


def described(dataset):
    return SimpleNamespace(domain=dataset.dataset, n=len(dataset), size=dataset.size, augment=dataset.augment,
                           labelled=all(pair.label for pair in dataset.pairs), maps=dataset.maps,
                           is_train=all("val" not in pair.image.parts for pair in dataset.pairs))


def spied(monkeypatch, argv):
    """Run main with stub stages; each adds another number to the network. Returns: each stage's arguments, and the target
    images to which its source items are aligned, for three seeds."""
    calls, references = [], []

    def trained(model, amount):
        with torch.no_grad():
            model.head.bias.add_(amount)

    def versions(source):
        used = []
        for seed in (1, 2, 3):
            references.clear()
            for k in range(len(source)):
                source[k, seed] if isinstance(source, SegmentationDataset) else source[k]
            used.append(list(references))
        return used

    def stage(name, amount, model, source, target=None, previous=None, **more):
        calls.append(SimpleNamespace(name=name, model=fingerprint(model), frozen=frozen(model), training=model.training,
                                     source=described(source), versions=versions(source),
                                     target=target and described(target), previous=previous and fingerprint(previous), **more))
        trained(model, amount)

    def prepare(run, cfg, model, encoder, source, target):
        items = [source[k] for k in range(len(source))]
        calls.append(SimpleNamespace(name="prepare", model=fingerprint(model), items=items, versions=versions(source),
                                     target=described(target)))
        for pair in target.pairs:
            save_label(run.folder / "pseudo_labels" / f"{pair.name}.png", torch.zeros(32, 64))
        for _, _, name in items:
            save_label(run.folder / "transferability" / f"{name}.png", torch.zeros(40, 72))
        model.eval().train()
        return target.with_maps(run.folder / "pseudo_labels"), {"delta": 3.0}

    def hard_labels(run, cfg, stage, model, target, folder):
        calls.append(SimpleNamespace(name=f"labels of {stage}", model=fingerprint(model), target=described(target)))
        for pair in target.pairs:
            save_label(folder / f"{pair.name}.png", torch.zeros(32, 64))
        return {}

    def fit(image, reference, size):
        references.append((reference, size))
        return lambda crop: 1 - crop
    monkeypatch.setattr(bismap, "photometric_fit", fit)
    monkeypatch.setattr(bismap, "warm_up", lambda run, cfg, model, source, iterations: stage(
        "warmup", 0.5, model, source, iterations=iterations))
    monkeypatch.setattr(bismap, "prepare_selftraining", prepare)
    monkeypatch.setattr(bismap, "self_train", lambda run, cfg, model, source, target, note: stage(
        "selftrain", 1.0, model, source, target, note=note))
    monkeypatch.setattr(bismap, "write_hard_labels", hard_labels)
    monkeypatch.setattr(bismap, "distill", lambda run, cfg, name, student, previous, source, target: stage(
        name, 2.0 if name == "distill1" else 4.0, student, source, target, previous))
    bismap.main(argv)
    return calls


@pytest.mark.parametrize("continues", [False, True])
def test_each_stage_receives_the_right_arguments(continues, uneven, tmp_path, monkeypatch):
    argv = ["--data", str(uneven), "--runs", str(tmp_path), *WIRING, *["--continue-warmup"] * continues]
    calls = spied(monkeypatch, argv)
    assert [call.name for call in calls] == ["warmup", "prepare", "selftrain", "labels of distill1", "distill1",
                                             "labels of distill2", "distill2"]
    warmup, prepare, selftrain, labels1, distill1, labels2, distill2 = calls
    start, folder = warmup.model, tmp_path / "bismap-gta5"

    def after(bias, base=start):
        return pytest.approx(base + 19 * bias, rel=1e-9)                         # biases start at 0
    assert warmup.iterations == 2 and prepare.model == after(0.5) and selftrain.note == {"delta": 3.0}
    assert selftrain.model == (after(0.5) if continues else start)
    own = after(1.5 if continues else 1.0)
    assert labels1.model == distill1.previous == own and distill1.model == start
    assert labels2.model == distill2.previous == after(2.0) and distill2.model == start

    for call in (warmup, selftrain, distill1, distill2):
        others = continues and call is selftrain
        assert call.frozen == {("encoder", True), ("aspp", others), ("low", others), ("decoder", others)} and call.training
        assert (call.source.domain, call.source.n, call.source.size) == ("gta5", 5, Size(72, 40))
        assert call.source.augment == Augment(flip=False, jitter=0.3, scale=(0.75, 1.25), crop=Size(48, 24))
        assert call.source.labelled and call.source.maps == ([] if call is warmup else [folder / "transferability"])
    for call, maps in ((prepare, []), (selftrain, ["pseudo_labels"]), (labels1, []), (distill1, ["distill1"]), (labels2, []),
                       (distill2, ["distill2"])):
        assert (call.target.domain, call.target.n, call.target.size) == ("cityscapes", 8, Size(64, 32))
        assert not call.target.labelled and call.target.is_train and call.target.maps == [folder / name for name in maps]
        assert call.target.augment == warmup.source.augment

    # Each source image is aligned to the same target training image in all stages and epochs.
    images = [(pair.image, Size(64, 32)) for pair in find_pairs(uneven, "cityscapes", "train", labels=False)]
    chosen = [[[k for k, image in enumerate(images) if image == used] for used in version]
              for call in (warmup, prepare, selftrain, distill1, distill2) for version in call.versions]
    assert len(chosen) == 15 and all(version == chosen[0] for version in chosen)
    assert all(len(own) == 1 for own in chosen[0]) and len({k for k, in chosen[0]}) >= 2
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    pairs = find_pairs(uneven, "gta5", "train")
    for pair, (image, label, name) in zip(pairs, prepare.items, strict=True):    # aligned, whole, with its label
        assert name == pair.name and label.shape == (40, 72)
        torch.testing.assert_close(image, (1 - read_resized(pair.image, Size(72, 40)) - mean) / std, atol=1e-4, rtol=0)


def test_an_upper_bound_trains_on_the_target_for_as_long_as_the_adapted_model(uneven, tmp_path, monkeypatch):
    argv = ["--data", str(uneven), "--runs", str(tmp_path), *WIRING, "--target-labels", "--stage", "warmup"]
    (call,) = spied(monkeypatch, argv)
    assert (call.name, call.iterations) == ("warmup", 2 + 3)
    assert (call.source.domain, call.source.n, call.source.size) == ("cityscapes", 8, Size(64, 32))
    assert call.source.labelled and call.source.is_train and call.versions == [[], [], []]


def test_frozen_batch_norm_without_training_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        bismap.main(["--runs", str(tmp_path), "--adapt-freeze-bn", "all"])
    assert "add --continue-warmup" in capsys.readouterr().err


def test_distillation_alone_uses_the_maps_beside_its_checkpoint(city, tmp_path, monkeypatch, capsys):
    argv, folder = ["--data", str(city), "--runs", str(tmp_path), *TINY], tmp_path / "bismap-gta5"
    bismap.main([*argv, "--assign", "none"])
    argv.append("--distill")
    more = ["--from", str(folder / "selftrain.pt"), "--tag", "more"]
    calls = spied(monkeypatch, [*argv, *more])
    assert [call.name for call in calls] == ["labels of distill1", "distill1", "labels of distill2", "distill2"]
    assert calls[1].source.maps == calls[3].source.maps == [folder / "transferability"]
    assert calls[1].target.maps == [tmp_path / "bismap-gta5-more/distill1"]
    shutil.rmtree(folder / "transferability")
    with pytest.raises(SystemExit):
        spied(monkeypatch, [*argv, *more[:3], "again"])
    assert "--from has no transferability maps beside it; add --no-stm" in capsys.readouterr().err
    calls = spied(monkeypatch, [*argv, *more[:3], "without", "--no-stm"])
    assert [call.name for call in calls][1::2] == ["distill1", "distill2"] and calls[1].source.maps == []


def test_an_encoder_that_is_unavailable_is_refused_before_the_warm_up(uneven, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bismap, "warm_up", None)                                 # must not be called
    with pytest.raises(SystemExit):
        bismap.main(["--data", str(uneven), "--runs", str(tmp_path), *WIRING, "--stm-backbone", "resnet1"])
    assert "--stm-backbone resnet1: torchvision does not know it" in capsys.readouterr().err
