"""BiSMAP's equations against naive float64 loops written from the paper, its mixtures against scikit-learn, its sample."""

from __future__ import annotations

import contextlib
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
from PIL import Image
from sklearn.mixture import GaussianMixture
from torch import nn

import bismap
from bismap import Gmm
from common.data import IMAGENET_MEAN, IMAGENET_STD, find_pairs
from common.deeplab import build_model
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
    """(N, C, h, w) as a list of rows, pixel by pixel."""
    return x.movedim(1, -1).flatten(0, 2).tolist()


def mixture(G=3, D=4, seed=0):
    weight = random(G, seed=seed).softmax(dim=0)
    return Gmm(weight, random(G, D, seed=seed + 1, scale=3.0), 0.2 + random(G, D, seed=seed + 2).square())


def draw(gmm, n, seed=0):
    rng = np.random.default_rng(seed)
    k = rng.choice(len(gmm.weight), n, p=gmm.weight.numpy())
    return torch.from_numpy(gmm.mean.numpy()[k] + rng.standard_normal((n, gmm.mean.shape[1])) * gmm.variance.sqrt().numpy()[k])


# ----------------------------------------------------------------------------- Eqs. (4), (5): densities


def test_log_density_against_the_paper_in_loops_and_scipy():
    gmm, feat = mixture(), random(7, 4, seed=5, scale=3.0)
    got = bismap.log_density(feat, gmm)
    for f, value in zip(feat.tolist(), got.tolist()):
        total = 0.0
        for pi, mu, sigma in zip(*(part.tolist() for part in gmm)):
            exponent = sum((a - m) * (a - m) / s for a, m, s in zip(f, mu, sigma))
            total += pi * math.exp(-0.5 * exponent) / ((2 * math.pi) ** (len(f) / 2) * math.sqrt(math.prod(sigma)))
        assert math.isclose(value, math.log(total), abs_tol=1e-9)
    reference = np.log(sum(pi * scipy.stats.multivariate_normal(mu, np.diag(sigma)).pdf(feat.numpy())
                           for pi, mu, sigma in zip(*(part.numpy() for part in gmm))))
    np.testing.assert_allclose(got.numpy(), reference, atol=1e-9)


def test_log_density_far_in_the_tails_does_not_underflow():
    gmm = Gmm(torch.tensor([0.5, 0.5]).double(), torch.zeros(2, 256).double(), torch.full((2, 256), 1e-2, dtype=torch.float64))
    far = torch.full((1, 256), 10.0).double()                    # each dimension 100 standard deviations away
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
            torch.testing.assert_close(scores[n, c, y, x], bismap.log_density(feat[n, :, y, x][None], gmm)[0])
    assert (bismap.log_density(random(5, 4), none) == -torch.inf).all()


def test_channels_that_a_category_never_activates_keep_their_precision():
    """After a ReLU half of the channels are 0 for a category, so that their variance is the floor: there cancellation hurts."""
    gmms = [Gmm(*(part.float() for part in mixture(G=8, D=64, seed=seed))) for seed in range(19)]
    for c, gmm in enumerate(gmms):
        gmm.mean[:, c % 2::2], gmm.variance[:, c % 2::2] = 0.0, 1e-6
    all_of_them = Gmm(*(torch.stack(parts) for parts in zip(*gmms)))
    for c, gmm in enumerate(gmms):
        feat = gmm.mean + gmm.variance.sqrt() * random(8, 64, seed=c).float()
        exact = bismap.log_density(feat.double(), Gmm(*(part.double() for part in gmm)))
        got = bismap.class_scores(feat.T[None, :, None], all_of_them)[0, c, 0]
        assert (got - exact).abs().max() < 0.05


def test_small_variances_beside_large_means_are_fitted_in_float32():
    cluster = torch.tensor([0.0, 5.0])[torch.arange(4000) % 2][:, None]
    feat = torch.cat([cluster + 3e-3 * random(4000, 1).float(), random(4000, 1, seed=1).float() * 1e-3], dim=1)
    start = Gmm(torch.tensor([0.5, 0.5]), torch.tensor([[0.0, 0.0], [5.0, 0.0]]), torch.full((2, 2), 1e-2))
    fitted = bismap.fit_gmm(feat, 2, init=start, variance_floor=1e-9)
    exact = torch.stack([feat[i::2].double().var(dim=0, correction=0) for i in range(2)])
    torch.testing.assert_close(fitted.variance.double(), exact, rtol=0.01, atol=0)


def test_blocks_do_not_change_the_result(monkeypatch):
    gmm, feat = mixture(), random(50, 4)
    whole, fitted = bismap.log_density(feat, gmm), bismap.fit_gmm(feat, 3, iterations=5)
    monkeypatch.setattr(bismap, "BLOCK", 7)
    torch.testing.assert_close(bismap.log_density(feat, gmm), whole)
    for a, b in zip(bismap.fit_gmm(feat, 3, iterations=5), fitted):
        torch.testing.assert_close(a, b)


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
        np.testing.assert_allclose(a.numpy(), b, atol=1e-4)
    assert math.isclose(mean_log_likelihood(feat, ours), theirs.score(feat.numpy()), abs_tol=1e-4)


def test_em_in_float32_is_close_to_float64():
    feat = draw(mixture(G=4, D=6), 3000) + 20.0                 # an offset costs float32 its digits
    double = bismap.fit_gmm(feat, 4, iterations=20, tol=-math.inf, seed=1)
    single = bismap.fit_gmm(feat.float(), 4, iterations=20, tol=-math.inf, init=Gmm(*(x.float() for x in bismap.fit_gmm(
        feat, 4, iterations=0, seed=1))))
    assert single.mean.dtype == torch.float32
    for a, b in zip(single, double):
        torch.testing.assert_close(a.double(), b, atol=2e-3, rtol=2e-3)


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
    for _ in range(30):                                         # also where the floor holds variances up
        gmm = bismap.fit_gmm(feat, 5, iterations=1, tol=-math.inf, init=gmm, variance_floor=0.3)
        after = mean_log_likelihood(feat, gmm)
        assert after >= before - 1e-12 and gmm.variance.min() >= 0.3
        before = after


def test_em_stops_when_the_likelihood_rises_by_less_than_tol(monkeypatch):
    feat, start = draw(mixture(), 300), mixture(seed=40)
    counts = {}
    for tol in (1e-1, 1e-3, 1e-6):
        calls = []
        monkeypatch.setattr(bismap, "component_log_prob", lambda x, gmm, calls=calls: calls.append(1) or original(x, gmm))
        bismap.fit_gmm(feat, 3, iterations=200, tol=tol, init=start)
        counts[tol] = len(calls)
        monkeypatch.undo()
    likelihoods, gmm = [], start
    for _ in range(counts[1e-3]):                               # one E-step each; the last rise is the first below tol
        likelihoods.append(mean_log_likelihood(feat, gmm))
        gmm = bismap.fit_gmm(feat, 3, iterations=1, tol=-math.inf, init=gmm)
    rises = np.diff(likelihoods)
    assert (rises[:-1] >= 1e-3).all() and rises[-1] < 1e-3
    assert 2 <= counts[1e-1] < counts[1e-3] < counts[1e-6] < 200


original = bismap.component_log_prob


def test_an_empty_component_starts_again_at_the_sample_of_lowest_density():
    feat = torch.cat([draw(mixture(G=1, D=2), 200), torch.tensor([[40.0, 40.0]]).double()])
    start = Gmm(torch.tensor([1 - 1e-9, 1e-9]).double(), torch.tensor([[0.0, 0.0], [-1e4, 0.0]]).double(),
                torch.tensor([[9.0, 9.0], [1e-3, 1e-3]]).double())
    fitted = bismap.fit_gmm(feat, 2, iterations=1, init=start)
    torch.testing.assert_close(fitted.mean[1], feat[-1])
    assert math.isclose(fitted.weight.sum().item(), 1.0)
    fitted = bismap.fit_gmm(feat, 2, iterations=50, init=start)
    assert all(part.isfinite().all() for part in fitted) and fitted.weight.min() > 1e-4


@pytest.mark.parametrize("n", [0, 1, 3])
def test_fewer_samples_than_components(n):
    feat = random(n, 4, seed=n)
    gmm = bismap.fit_gmm(feat, 8, variance_floor=1e-2)
    assert [part.shape for part in gmm] == [(8,), (8, 4), (8, 4)]
    assert (gmm.weight > 0).sum() <= n and math.isclose(gmm.weight.sum().item(), float(n > 0))
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
        own = feat[nearest == k]
        torch.testing.assert_close(start.weight[k].item(), len(own) / 200)
        torch.testing.assert_close(start.mean[k], own.mean(dim=0))
        torch.testing.assert_close(start.variance[k], own.var(dim=0, unbiased=False))


# --------------------------------------------------------------------------------- Eq. (3): the sample


def test_correct_label_map():
    logits, label = random(2, 4, 3, 5), labels(2, 3, 5, K=4)
    for z, y, got in zip(pixels(logits), label.flatten().tolist(), bismap.correct_label_map(logits, label).flatten().tolist()):
        assert got == (y if z.index(max(z)) == y else IGNORE)


def filled(order, n=10, size=20):
    sample = bismap.FeatureSample(3, size)
    for i in order:
        label = labels(n, K=3, seed=i)
        feat = torch.stack([torch.full((n,), float(i)), torch.arange(n, dtype=torch.float32)], dim=1)
        sample.add(feat, label, bismap.pixel_keys(0, f"image{i}", n))
    return sample


def test_the_sample_is_the_smallest_keys_in_any_order():
    expected = {}
    for i in range(30):
        keys, label = bismap.pixel_keys(0, f"image{i}", 10).tolist(), labels(10, K=3, seed=i).tolist()
        for j, (key, c) in enumerate(zip(keys, label)):
            expected.setdefault(c, []).append((key, [float(i), float(j)]))
    for order in (range(30), range(29, -1, -1), torch.randperm(30).tolist()):
        sample = filled(order)
        for c in range(3):
            assert sample.features(c).tolist() == [f for _, f in sorted(expected[c])[:20]]
        assert all(sum(len(keys) for keys, _ in parts) <= 25 for parts in sample.parts)
    few = filled(range(1))
    assert len(few.features(0)) == labels(10, K=3, seed=0).eq(0).sum()
    assert bismap.FeatureSample(2, 5).features(1) is None


def test_the_sample_is_uniform():
    """Chi-square over 400 seeds: 8 of 40 pixels, of five images of 8, are drawn equally often."""
    drawn = np.zeros(40)
    for seed in range(400):
        sample = bismap.FeatureSample(1, 8)
        for i in range(5):
            feat = torch.arange(8 * i, 8 * i + 8, dtype=torch.float32)[:, None]
            sample.add(feat, torch.zeros(8, dtype=torch.int64), bismap.pixel_keys(seed, f"{i}", 8))
        drawn[sample.features(0)[:, 0].long().numpy()] += 1
    assert drawn.sum() == 400 * 8
    # Drawn without replacement the counts vary less than multinomial ones: 1 - 8/40 of it.
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


def test_delta_for_a_ratio():
    values = random(5000, scale=200.0)
    histogram = (torch.bucketize(values, bismap.SCORES, right=True) - 1).bincount(minlength=len(bismap.SCORES))
    for ratio in (0.1, 0.6, 1.0):
        delta = bismap.delta_for_ratio(histogram, ratio)
        ranked = values.sort(descending=True).values
        wanted = ranked[math.ceil(ratio * 5000) - 1].item()      # the value at this rank lies in delta's bin
        assert delta <= wanted < delta + 2e-3 * (1 + abs(delta))
        assert (values >= delta).sum() >= ratio * 5000


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
        own = sorted((p for p, y in zip(confidence.flatten().tolist(), label.flatten().tolist()) if y == c), reverse=True)
        psi = own[int(len(own) * 0.2 * theta[c].item() ** 8)]
        assert math.isclose(got[c].item(), 0.9 * theta[c].item() + 0.1 * psi)
    assert got[2] == theta[2]


# ----------------------------------------------------------------------------- Eqs. (7) to (9): transferability


def test_kmeans_is_a_fixed_point_and_depends_on_its_seed_only():
    feat = draw(mixture(G=4, D=3), 500)
    centers = bismap.kmeans(feat, 4, seed=2)
    nearest = (feat[:, None] - centers).square().sum(dim=2).argmin(dim=1)
    for j in range(4):
        torch.testing.assert_close(centers[j], feat[nearest == j].mean(dim=0))
    assert torch.equal(bismap.kmeans(feat, 4, seed=2), centers)
    truth = torch.tensor([[0.0, 0.0], [50.0, 0.0], [0.0, 50.0], [50.0, 50.0], [99.0, 99.0]]).double()
    blobs = truth.repeat_interleave(40, dim=0) + random(200, 2)
    for seed in range(5):                                        # k-means++ hits well separated blobs
        found = bismap.kmeans(blobs, 5, seed=seed)
        assert (found[:, None] - truth).norm(dim=2).min(dim=0).values.max() < 1.0


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
                               bismap.segmentation_loss(logits, label))


def test_symmetric_cross_entropy():
    logits, label = random(2, 3, 4, 5, scale=4.0), labels(2, 4, 5, K=3)
    logits[0, :, 0, 0] = torch.tensor([40.0, 0.0, 0.0])          # p below 1e-7: clamped
    label[0, 0, 0] = 1
    total = 0.0
    for z, y in zip(pixels(logits), label.flatten().tolist()):
        if y != IGNORE:
            p = [min(max(v, 1e-7), 1.0) for v in softmax(z)]
            one_hot = [1.0 if c == y else 1e-4 for c in range(3)]
            total += sum(-0.1 * a * math.log(b) - 1.0 * b * math.log(a) for a, b in zip(one_hot, p))
    expected = total / (label != IGNORE).sum().item()
    assert math.isclose(bismap.symmetric_cross_entropy(logits, label).item(), expected, rel_tol=1e-9)
    double = bismap.symmetric_cross_entropy(logits, label, alpha=0.3, beta=0.0) / 3 + bismap.symmetric_cross_entropy(
        logits, label, alpha=0.0, beta=1.0)
    torch.testing.assert_close(double, bismap.symmetric_cross_entropy(logits, label))


def test_consistency_loss():
    student, teacher = random(2, 3, 4, 5, scale=2.0), random(2, 3, 4, 5, seed=1, scale=2.0)
    mask = labels(2, 4, 5, K=2, ignored=0) > 0
    each = [sum(q * math.log(q) - q * math.log(p) for q, p in zip(softmax(b), softmax(a)))
            for a, b in zip(pixels(student), pixels(teacher))]
    assert math.isclose(bismap.consistency_loss(student, teacher).item(), sum(each) / len(each), rel_tol=1e-12)
    kept = [value for value, m in zip(each, mask.flatten().tolist()) if m]
    assert math.isclose(bismap.consistency_loss(student, teacher, mask).item(), sum(kept) / len(kept), rel_tol=1e-12)
    assert min(each) >= 0 and abs(bismap.consistency_loss(student, student).item()) < 1e-15
    student.requires_grad_(), teacher.requires_grad_()
    bismap.consistency_loss(student, teacher).backward()
    assert teacher.grad is None
    moved = (student - 0.5 * student.grad).detach()              # towards the teacher
    assert bismap.consistency_loss(moved, teacher) < bismap.consistency_loss(student, teacher)


def test_nothing_labelled_gives_zero_and_a_finite_gradient():
    logits, nothing = random(1, 3, 2, 2).requires_grad_(), torch.full((1, 2, 2), IGNORE)
    losses = [bismap.segmentation_loss(logits, nothing), bismap.symmetric_cross_entropy(logits, nothing),
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
    x, kept = bismap.phi(images, [1, 2, 1], cutout=0.5)
    assert x.shape == images.shape and kept.dtype == torch.bool and x.isfinite().all()
    again, kept_again = bismap.phi(images[1:2], [2], cutout=0.5)
    assert torch.equal(again[0], x[1]) and torch.equal(kept_again[0], kept[1])       # by its seed, not its position
    assert torch.equal(kept[0], kept[2]) and not torch.equal(kept[0], kept[1])
    assert (x.movedim(1, -1)[~kept] == 0).all()
    removed = (~kept).flatten(1).sum(dim=1)
    assert (removed <= 100).all() and (removed > 0).all()                            # a square of 10, cut by the border
    same, all_kept = bismap.phi(images, [1, 2, 3], operations=0, cutout=0.0)
    assert all_kept.all() and (same - images).abs().max() < 0.01                     # 8 bits a channel
    values = (x * std + mean).movedim(1, -1)[kept]
    assert values.min() > -1e-5 and values.max() < 1 + 1e-5


# ----------------------------------------------------------------------------------------------- preparation

TINY = ("--backbone resnet18 --init none --source-size 64x32 --target-size 64x32 --crop 64x32 --workers 0 "
        "--warmup-iterations 2 --selftrain-iterations 2 --no-distill --warmup-batch-size 1 --batch-size 1 --lr 1e-4 "
        "--stm-backbone warmup --samples 200 --stm-samples 200 --components 2 --J 3 --pl-ratio 0.5").split()


def test_prototypes_outlive_a_kill_but_not_other_settings(city, tmp_path, monkeypatch, capsys):
    argv = ["--data", str(city), "--runs", str(tmp_path), *TINY]

    def killed(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(bismap, "choose_delta", killed)
    with pytest.raises(KeyboardInterrupt):
        bismap.main(argv)
    monkeypatch.undo()
    kept = (tmp_path / "bismap-gta5/prototypes.pt").read_bytes()
    warmup = str(tmp_path / "bismap-gta5/warmup.pt")
    with pytest.raises(SystemExit):
        bismap.main([*argv, "--components", "3"])
    assert "--components (2 -> 3)" in capsys.readouterr().err
    monkeypatch.setattr(bismap, "fit_prototypes", killed)            # must not be called again
    bismap.main(argv)
    assert (tmp_path / "bismap-gta5/prototypes.pt").read_bytes() == kept
    monkeypatch.undo()
    monkeypatch.setattr(bismap, "choose_delta", killed)              # the same where the warm-up is another run's
    again = ["--from", warmup, "--tag", "from"]
    with pytest.raises(KeyboardInterrupt):
        bismap.main([*argv, *again])
    monkeypatch.undo()
    with pytest.raises(SystemExit):
        bismap.main([*argv, *again, "--components", "3"])
    assert "--components (2 -> 3)" in capsys.readouterr().err


def test_labels_and_maps_are_what_the_equations_say(city, tmp_path):
    """From the files of a run: Eq. (6) on the warm-up model's features with the saved mixtures, and w's range and labels."""
    bismap.main(["--data", str(city), "--runs", str(tmp_path), *TINY])
    folder, classes = tmp_path / "bismap-gta5", bismap.class_list("gta5")
    model = build_model("v3+", "resnet18", 19, "none", "none")
    model.load_state_dict(torch.load(folder / "warmup.pt", weights_only=True)["state"]["model"])
    kept = torch.load(folder / "prototypes.pt", weights_only=True)
    gmms = Gmm(kept["weight"], kept["mean"], kept["variance"])
    delta = next(line["delta"] for line in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if "delta" in line)
    pairs, labelled, pixels = find_pairs(city, "cityscapes", "train", labels=False), 0, 0
    target = bismap.SegmentationDataset(pairs, "cityscapes", classes, bismap.Size(64, 32))
    for k, pair in enumerate(pairs):
        with torch.inference_mode():
            feat, _ = model.eval()(target[k][0][None])
            expected = bismap.map_pseudo_labels(bismap.upsample(bismap.class_scores(feat, gmms), (32, 64)), delta)[0]
        written = torch.from_numpy(np.array(Image.open(folder / f"pseudo_labels/{pair.name}.png"))).long()
        assert (written != expected).float().mean() < 0.01               # but for rounding at borders
        labelled, pixels = labelled + int((written != IGNORE).sum()), pixels + written.numel()
    assert 0.5 <= labelled / pixels < 0.6                                # --pl-ratio 0.5, in steps of 0.25
    pair = find_pairs(city, "gta5", "train")[0]
    w = np.array(Image.open(folder / f"transferability/{pair.name}.png"))
    label = bismap.SegmentationDataset([pair], "gta5", classes, bismap.Size(64, 32))[0, 0][1].numpy()
    assert w.shape == label.shape and (w[label == IGNORE] == 0).all() and (w[label != IGNORE] > 0).any()


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
    """What a stage uses of a run."""

    world, rank = 1, 0
    parallel, share, item_seeds = Run.parallel, Run.share, Run.item_seeds

    def __init__(self, batches):
        self.batches, self.losses, self.options = batches, [], SimpleNamespace(seed=3)

    def autocast(self):
        return contextlib.nullcontext()

    def stage(self, *call, batch_size):
        (self.name, self.iterations, self.state, *self.data), self.batch_size = call, batch_size
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
        y_s[0, :4], y_t[1, :, :9] = IGNORE, IGNORE                               # images with unequal shares
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
        y = torch.where(label[n, i, j] == c, 1.0, 1e-4).double()
        total = total - alpha * y * p[n, c, i, j].log() - beta * p[n, c, i, j] * y.log()
    return total.sum() / len(n)


def eq12(student, teacher, counts):
    p, q = student.softmax(dim=1), teacher.softmax(dim=1)
    return ((q * (q.log() - p.log())).sum(dim=1) * counts).sum() / counts.sum()


def train_by_hand(model, cfg, lr, batches, losses):
    """SGD written out. losses(it, *batch) -> what is reported, what is minimised; called before each step."""
    weights = [(p, cfg.encoder_rate * lr if name.startswith("encoder") else lr, torch.zeros_like(p))
               for name, p in model.named_parameters()]
    reported = []
    for it, batch in enumerate(batches):
        found, total = losses(it, *batch)
        reported.append({name: loss.item() for name, loss in found.items()})
        grads = torch.autograd.grad(total, [p for p, _, _ in weights])
        with torch.no_grad():
            for (p, rate, v), grad in zip(weights, grads):
                v.copy_(cfg.momentum * v + grad + cfg.weight_decay * p)
                p -= rate * v
    return reported


def check_stage(run, model, by_hand, expected):
    assert len(run.losses) == len(expected) == 2
    for got, wanted in zip(run.losses, expected):
        assert got.keys() == wanted.keys() and got == pytest.approx(wanted, rel=1e-6)
    for key, value in by_hand.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-6, atol=1e-9)


CFG = dict(lr=0.3, adapt_lr=0.05, encoder_rate=0.5, momentum=0.9, weight_decay=0.03, batch_size=2, warmup_batch_size=5,
           alpha=0.2, beta=0.7, lambda_kl=0.6, ema=0.8, warmup_iterations=70, selftrain_iterations=77, distill_iterations=78)


def test_warm_up_minimises_eq_2():
    cfg, model, by_hand = bismap.Config(**CFG), tiny(), tiny()
    batches = [((x, y),) for (x, y, _), _ in tiny_batches()]

    def losses(it, source):
        seg = eq10(by_hand(source[0])[1], source[1], torch.full_like(source[1], 255))
        return {"seg": seg}, seg
    run = FakeRun(batches)
    bismap.warm_up(run, cfg, model, None, 33)
    assert (run.name, run.iterations, run.batch_size) == ("warmup", 33, 5)
    check_stage(run, model, by_hand, train_by_hand(by_hand, cfg, 0.3, batches, losses))


@pytest.mark.parametrize(("augment", "weighted", "lambda_consist"), [("teacher", True, 1.5), ("student", False, 1.5),
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
        if it:                                                                   # theta' after the step before
            for old, new in zip(teacher.state_dict().values(), by_hand.state_dict().values()):
                old.copy_(0.8 * old + 0.2 * new if old.is_floating_point() else new)
        logits_s, logits_t = by_hand(x_s)[1], by_hand(x_t)[1]
        ce = eq10(logits_s, y_s, w[0] if w else torch.full_like(y_s, 255))
        sce, consist = eq11(logits_t, y_t, 0.2, 0.7), torch.zeros(())
        if lambda_consist:
            _, seeds, how, x_phi, kept = augmented[it]
            assert seeds == [bismap.derive_seed(3, "phi", it, n) for n in range(2)] and how == (2, 0.5, 0.5)
            counts = kept[:, 2::4, 2::4]                                         # of 4 pixels the third: 1.5 to 2.5
            assert 0 < counts.sum() < counts.numel()
            if augment == "student":
                consist = eq12(by_hand(x_phi)[1], teacher(x_t)[1], counts)
            else:
                consist = eq12(logits_t, teacher(x_phi)[1], counts)
        return {"ce": ce, "sce": sce, "consist": consist}, ce + sce + lambda_consist * consist
    run = FakeRun(batches)
    bismap.self_train(run, cfg, model, None, None)
    assert (run.name, run.iterations, run.batch_size) == ("selftrain", 77, 2)
    assert run.state.keys() == {"model", "teacher", "optimizer"} and not run.state["teacher"].training
    with torch.no_grad():
        state = {"model": model.state_dict(), "teacher": run.state["teacher"].state_dict()}
    check_stage(run, model, by_hand, train_by_hand(by_hand, cfg, 0.05, batches, losses))
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
    check_stage(run, student, by_hand, train_by_hand(by_hand, cfg, 0.05, batches, losses))
    assert all(torch.equal(before[key], value) for key, value in previous.state_dict().items())
