"""FADA's equations against naive float64 loops written from the paper."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import math
import re
import shutil

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

import fada
from common.data import Augment, ClassList, SegmentationDataset, class_list
from common.deeplab import DeepLab, build_model
from common.layouts import find_pairs

IGNORE = 255


def random(*shape, seed=0, scale=2.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --------------------------------------------------------------------------------- the paper in loops


def softmax(z):
    e = [math.exp(v - max(z)) for v in z]
    return [v / sum(e) for v in e]


def samples(x):
    """Every feature sample's vector of an (N, C, h, w) tensor."""
    x = x.detach().double().numpy()
    for n in range(x.shape[0]):
        for i in range(x.shape[2]):
            for j in range(x.shape[3]):
                yield [x[n, c, i, j] for c in range(x.shape[1])]


def upsample_loop(logits, H, W):
    """Bilinear; the corners of the two grids coincide."""
    x = logits.detach().numpy()
    N, K, h, w = x.shape
    out = np.zeros((N, K, H, W))
    for n in range(N):
        for k in range(K):
            for i in range(H):
                for j in range(W):
                    y, u = (i * (h - 1) / (H - 1) if H > 1 else 0), (j * (w - 1) / (W - 1) if W > 1 else 0)
                    y0, u0 = int(y), int(u)
                    y1, u1 = min(y0 + 1, h - 1), min(u0 + 1, w - 1)
                    top = (1 - (u - u0)) * x[n, k, y0, u0] + (u - u0) * x[n, k, y0, u1]
                    bottom = (1 - (u - u0)) * x[n, k, y1, u0] + (u - u0) * x[n, k, y1, u1]
                    out[n, k, i, j] = (1 - (y - y0)) * top + (y - y0) * bottom
    return torch.from_numpy(out)


def eq3(logits, label):
    total, labelled = 0.0, 0
    for z, y in zip(samples(upsample_loop(logits, *label.shape[-2:])), label.flatten().tolist()):
        if y != IGNORE:
            total, labelled = total - math.log(softmax(z)[y]), labelled + 1
    return total / labelled


def eq7(z, threshold):
    p = softmax(z)
    return [float(k == p.index(max(p)) and p[k] >= threshold) for k in range(len(p))]


def eq8(z, T, clip):
    return [min(a, clip) for a in softmax([v / T for v in z])]


def domain_loss(d, a, domain):
    """Mean over the samples of - sum_k a_k log P(domain, c = k | f), as in Eqs. (5) and (6)."""
    total, count = 0.0, 0
    for outputs, knowledge in zip(samples(d), samples(a)):
        P = softmax(outputs)
        for k in range(len(knowledge)):
            total -= knowledge[k] * math.log(P[domain * len(knowledge) + k])
        count += 1
    return total / count


def binary_loss(d, domain):
    """Mean over the samples of - log P(domain | f), as in Eqs. (1) and (4); P(d = 1 | f) is a sigmoid."""
    total, count = 0.0, 0
    for source, target in samples(d):
        P_target = 1 / (1 + math.exp(source - target))
        total, count = total - math.log(P_target if domain == 1 else 1 - P_target), count + 1
    return total / count


def eq9(feat, label):
    feat, label = feat.double().numpy(), label.tolist()
    classes = sorted(set(label) - {IGNORE})
    center = {}
    for c in classes:
        members = [x for x, y in zip(feat, label) if y == c]
        center[c] = sum(members) / len(members)
    values = []
    for i in classes:
        intra = [sum((v - m) ** 2 for v, m in zip(x, center[i])) for x, y in zip(feat, label) if y == i]
        ratios = [sum(intra) / len(intra) / sum((p - q) ** 2 for p, q in zip(center[i], center[j]))
                  for j in classes if j != i]
        values.append(sum(ratios) / (len(classes) - 1))
    return values


# ----------------------------------------------------------------------------------------- Eq. (3)


def labels(*shape, K, seed=0, ignored=0.3):
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(K, shape, generator=generator)
    return label.masked_fill(torch.rand(shape, generator=generator) < ignored, IGNORE)


@pytest.mark.parametrize("grid, size", [((3, 4), (7, 10)), ((2, 3), (2, 3)), ((1, 1), (4, 5)), ((3, 3), (5, 1))])
def test_segmentation_loss_is_eq_3(grid, size):
    logits, label = random(2, 5, *grid), labels(2, *size, K=4)                  # class 4 never occurs
    label[0, 1:] = IGNORE                                                       # pixels are averaged, not images
    assert fada.segmentation_loss(logits, label).item() == pytest.approx(eq3(logits, label), rel=1e-12)


def test_segmentation_loss_of_one_labelled_pixel():
    logits, label = random(2, 3, 2, 2), torch.full((2, 5, 5), IGNORE)
    label[1, 4, 0] = 2                                                          # a corner: no interpolation
    expected = -math.log(softmax(logits[1, :, 1, 0].tolist())[2])
    assert fada.segmentation_loss(logits, label).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_segmentation_loss_without_labels_is_zero(dtype):
    logits = random(2, 3, 2, 2).to(dtype).requires_grad_()
    loss = fada.segmentation_loss(logits, torch.full((2, 5, 5), IGNORE))
    loss.backward()
    assert loss.shape == () and loss.item() == 0 and (logits.grad == 0).all()


def test_segmentation_loss_gradient():
    label = labels(1, 4, 5, K=3)
    assert torch.autograd.gradcheck(lambda z: fada.segmentation_loss(z, label), random(1, 3, 2, 3).requires_grad_())


# ----------------------------------------------------------------------------------- Eqs. (7), (8), Sec. 3.2


@pytest.mark.parametrize("threshold", [0.0, 0.6, 0.9])
def test_hard_labels_is_eq_7(threshold):
    z = random(2, 4, 5, 6)
    a = fada.hard_labels(z, threshold)
    assert a.shape == z.shape and list(samples(a)) == [eq7(v, threshold) for v in samples(z)]


def test_hard_labels_at_the_threshold_and_in_ties():
    z = torch.zeros(1, 2, 1, 1, dtype=torch.float64)                            # p = 1/2 twice, exactly
    assert sorted(fada.hard_labels(z, 0.5).flatten().tolist()) == [0, 1]
    assert not fada.hard_labels(z, math.nextafter(0.5, 1)).any()


def test_hard_labels_default_threshold():
    z = torch.tensor([[0.899, 0.101], [0.901, 0.099]], dtype=torch.float64).log()[:, :, None, None]
    assert fada.hard_labels(z).flatten(1).tolist() == [[0, 0], [1, 0]]


@pytest.mark.parametrize("T, clip", [(1.8, 0.9), (1.0, 0.7), (4.0, 1.0)])
def test_soft_labels_is_eq_8_clipped(T, clip):
    z = random(2, 4, 3, 5, scale=4)
    expected = np.array([eq8(v, T, clip) for v in samples(z)])
    np.testing.assert_allclose(np.array(list(samples(fada.soft_labels(z, T, clip)))), expected, rtol=1e-12)
    if (T, clip) == (1.8, 0.9):
        assert torch.equal(fada.soft_labels(z), fada.soft_labels(z, T, clip))   # defaults: Sec. 4.3, Table 6


def test_soft_labels_clip_without_renormalising():
    z = random(2, 4, 3, 5, scale=4)
    clipped, unclipped = fada.soft_labels(z, 1.8, 0.7), fada.soft_labels(z, 1.8, 1.0)
    over = (unclipped > 0.7).any(dim=1)
    assert over.any() and not over.all()
    assert (clipped.amax(dim=1)[over] == 0.7).all() and (clipped.sum(dim=1)[over] < 1).all()
    torch.testing.assert_close(unclipped.sum(dim=1), torch.ones(2, 3, 5, dtype=torch.float64))


@pytest.mark.parametrize("knowledge", [fada.hard_labels, fada.soft_labels, fada.binary_labels])
def test_class_knowledge_has_no_gradient_and_stays_finite(knowledge):
    z = random(2, 4, 3, 5, scale=1e4).requires_grad_()
    a = knowledge(z)
    assert not a.requires_grad and a.dtype == z.dtype and a.isfinite().all() and a.min() >= 0 and a.max() <= 1


def test_domain_encoding():
    a = random(2, 3, 2, 2)
    zero = torch.zeros_like(a)
    assert torch.equal(fada.domain_encoding(a, "source"), torch.cat([a, zero], dim=1))
    assert torch.equal(fada.domain_encoding(a, "target"), torch.cat([zero, a], dim=1))
    with pytest.raises(ValueError, match="Source"):
        fada.domain_encoding(a, "Source")


# ------------------------------------------------------------------------------------- Eqs. (5), (6), (1), (4)


def discriminator_case(K):
    """Raw outputs and soft class knowledge; the two domains differ in images and in grid."""
    d_s, d_t = random(2, 2 * K, 3, 2, seed=1), random(3, 2 * K, 2, 5, seed=2)
    z_s, z_t = random(2, 4, 3, 2, seed=3), random(3, 4, 2, 5, seed=4)
    knowledge = fada.binary_labels if K == 1 else lambda z: torch.rand_like(z[:, :K])
    torch.manual_seed(0)
    return d_s, d_t, knowledge(z_s), knowledge(z_t)


def test_discriminator_loss_is_eq_5():
    d_s, d_t, a_s, a_t = discriminator_case(K=3)
    expected = 0.5 * domain_loss(d_s, a_s, 0) + 0.5 * domain_loss(d_t, a_t, 1)
    assert fada.discriminator_loss(d_s, d_t, a_s, a_t).item() == pytest.approx(expected, rel=1e-12)


def test_adversarial_loss_is_eq_6():
    _, d_t, _, a_t = discriminator_case(K=3)
    assert fada.adversarial_loss(d_t, a_t).item() == pytest.approx(domain_loss(d_t, a_t, 0), rel=1e-12)


def test_binary_labels_give_eqs_1_and_4():
    d_s, d_t, a_s, a_t = discriminator_case(K=1)
    assert torch.equal(a_t, torch.ones(3, 1, 2, 5, dtype=torch.float64))
    expected = 0.5 * binary_loss(d_s, 0) + 0.5 * binary_loss(d_t, 1)
    assert fada.discriminator_loss(d_s, d_t, a_s, a_t).item() == pytest.approx(expected, rel=1e-12)
    assert fada.adversarial_loss(d_t, a_t).item() == pytest.approx(binary_loss(d_t, 0), rel=1e-12)


def test_signs():
    a = fada.hard_labels(random(1, 3, 4, 4), threshold=0.0)
    as_source, as_target = torch.cat([100 * a, 0 * a], dim=1), torch.cat([0 * a, 100 * a], dim=1)
    assert 0 <= fada.discriminator_loss(as_source, as_target, a, a) < 1e-12     # D is right about everything
    assert fada.discriminator_loss(as_target, as_source, a, a) == pytest.approx(100)
    assert fada.adversarial_loss(as_target, a) == pytest.approx(100)            # D is not fooled
    assert 0 <= fada.adversarial_loss(as_source, a) < 1e-12                     # D is
    wrong_class = torch.cat([100 * a.roll(1, dims=1), 0 * a], dim=1)            # right domain, wrong class
    assert fada.adversarial_loss(wrong_class, a) == pytest.approx(100)


def test_samples_without_class_knowledge_count_but_do_not_teach():
    d = random(1, 6, 2, 2).requires_grad_()
    a = fada.soft_labels(random(1, 3, 2, 2))
    a[..., 0, :] = 0
    loss = fada.adversarial_loss(d, a)
    loss.backward()
    assert loss.item() == pytest.approx(domain_loss(d, a, 0), rel=1e-12)        # the mean is over all samples
    assert (d.grad[..., 0, :] == 0).all() and (d.grad[..., 1, :] != 0).all()


def test_losses_of_d_gradient_and_finiteness():
    d_s, d_t, a_s, a_t = (x[:1, :, :1, :2] for x in discriminator_case(K=3))
    d_s, d_t = d_s.clone().requires_grad_(), d_t.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda s, t: fada.discriminator_loss(s, t, a_s, a_t), (d_s, d_t))
    assert torch.autograd.gradcheck(lambda t: fada.adversarial_loss(t, a_t), d_t)
    huge = (1e5 * d_t).detach().requires_grad_()
    loss = fada.adversarial_loss(huge, a_t) + fada.discriminator_loss(huge, huge, a_t, a_t)
    loss.backward()
    assert loss.isfinite() and huge.grad.isfinite().all()


# ------------------------------------------------------------------------------- Eq. (2): the training stage


class TinyNet(nn.Module):
    feat_channels, num_classes = 4, 3

    def __init__(self):
        super().__init__()
        self.features, self.classifier = nn.Conv2d(3, 4, 3, stride=2), nn.Conv2d(4, 3, 1)
        self.features.bias.requires_grad_(False)                                # as a frozen batch norm

    def forward(self, x):
        feat = self.features(x).tanh()
        return feat, 3 * self.classifier(feat)

    def parameter_groups(self, lr):
        return [{"params": list(self.parameters()), "lr": lr}]


class TinyD(nn.Sequential):
    """In place of the discriminator, whose outputs are float32: here everything is float64."""

    def __init__(self, in_channels, num_classes):
        super().__init__(nn.Conv2d(in_channels, 6, 3, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(6, 2 * num_classes, 1))


class StubRun:
    """What a stage uses of a run. Stores the first weights of D and the gradients of each iteration."""

    def __init__(self, model, batches):
        self.model, self.batches, self.gradients, self.losses = model, batches, [], []

    def seed(self, *names):
        torch.manual_seed(7)

    def place(self, module):
        self.D = module.double()
        self.first_D = copy.deepcopy(self.D)
        return self.D

    def stage(self, name, iterations, state, *datasets, batch_size):
        self.called, self.state = (name, iterations, datasets, batch_size), state
        assert state["model"] is self.model
        for it, batch in enumerate(self.batches):
            yield it, *batch

    def autocast(self):
        return contextlib.nullcontext()

    def report(self, **losses):
        self.losses.append({name: loss.item() for name, loss in losses.items()})
        self.gradients.append(gradients(self.model) + (gradients(self.D) if hasattr(self, "D") else []))


def gradients(module):
    return [None if p.grad is None else p.grad.clone() for p in module.parameters()]


@pytest.mark.parametrize("kind", ["soft", "hard", "binary"])
def test_adversarial_stage_equals_the_published_two_passes(kind, monkeypatch):
    """The reference trains G on L_seg and L_adv and drops D's gradients; then D in separate passes on detached features."""
    monkeypatch.setattr(fada, "FineGrainedDiscriminator", TinyD)
    torch.manual_seed(0)
    model = TinyNet().double()
    reference = copy.deepcopy(model)
    batches = [((random(1, 3, 7, 9, seed=s), labels(1, 7, 9, K=3, seed=s)), (random(1, 3, 9, 7, seed=s + 50), None))
               for s in range(3)]
    run, cfg = StubRun(model, batches), fada.Config(labels=kind, lambda_adv=0.5, hard_threshold=0.6)
    fada.adversarial(run, cfg, model, None, None)
    assert run.called == ("adversarial", 40_000, (None, None), 4)               # Sec. 4.3: 4 + 4 images
    assert run.state.keys() == {"model", "D", "optimizer", "optimizer_D"} and run.state["D"] is run.D

    D = run.first_D
    sgd = torch.optim.SGD(reference.parameters(), lr=2.5e-4, momentum=0.9, weight_decay=1e-4)
    adam = torch.optim.Adam(D.parameters(), lr=1e-4, betas=(0.9, 0.99))
    knowledge = {"soft": fada.soft_labels, "binary": fada.binary_labels,
                 "hard": lambda z: fada.hard_labels(z, 0.6)}[kind]
    for got, ((x_s, y_s), (x_t, _)) in zip(run.gradients, batches):
        feat_s, z_s = reference(x_s)
        feat_t, z_t = reference(x_t)
        sgd.zero_grad()
        fada.segmentation_loss(z_s, y_s).backward()
        (0.5 * fada.adversarial_loss(D(feat_t), knowledge(z_t))).backward()
        adam.zero_grad()
        fada.discriminator_loss(D(feat_s.detach()), D(feat_t.detach()), knowledge(z_s), knowledge(z_t)).backward()
        for a, b in zip(got, gradients(reference) + gradients(D), strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                assert b.any()
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        sgd.step()
        adam.step()
    for a, b in zip([*model.parameters(), *run.D.parameters()], [*reference.parameters(), *D.parameters()]):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["source", "distill"])
def test_the_other_stages_minimise_eq_3(name):
    """SGD written out, on the labels of the source stage or on the pseudo labels of self-distillation."""
    torch.manual_seed(0)
    model = TinyNet().double()
    reference = copy.deepcopy(model)
    images, maps = [random(2, 3, 7, 9, seed=s) for s in range(3)], [labels(2, 7, 9, K=3, seed=s) for s in range(3)]
    cfg, data = fada.Config(lr=0.03, momentum=0.8, weight_decay=0.02, batch_size=6), object()
    batches = [((x, y),) if name == "source" else ((x, torch.full_like(y, IGNORE), y),) for x, y in zip(images, maps)]
    run = StubRun(model, batches)
    fada.train(run, cfg, name, 55, model, data)
    assert run.called == (name, 55, (data,), 6) and run.state.keys() == {"model", "optimizer"}

    weights = [p for p in reference.parameters() if p.requires_grad]
    velocity = [torch.zeros_like(p) for p in weights]
    for (x, y), reported in zip(zip(images, maps), run.losses, strict=True):
        p = nn.functional.interpolate(reference(x)[1], y.shape[1:], mode="bilinear", align_corners=True).softmax(dim=1)
        n, i, j = (y != IGNORE).nonzero(as_tuple=True)
        loss = -p[n, y[n, i, j], i, j].log().mean()
        assert reported == {"seg": pytest.approx(loss.item(), rel=1e-10)}
        with torch.no_grad():
            for w, v, grad in zip(weights, velocity, torch.autograd.grad(loss, weights)):
                v.copy_(0.8 * v + grad + 0.02 * w)
                w -= 0.03 * v
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_only_the_intended_weights_are_reached():
    torch.manual_seed(0)
    model, x = TinyNet().double(), random(1, 3, 7, 7)
    cfg = fada.Config(lambda_adv=1.0)
    nothing = torch.full((1, 7, 7), IGNORE)                                     # L_seg = 0, so only L_adv is left
    run = StubRun(model, [((x, nothing), (x + 1, nothing))])
    fada.adversarial(run, cfg, model, None, None)
    weight, frozen, *classifier = run.gradients[0][:4]
    assert weight.any() and frozen is None                                      # L_adv trains F,
    assert all(g is None or not g.any() for g in classifier)                    # and through a no gradient reaches C


# -------------------------------------------------------------------------------------- golden numbers


def test_golden_numbers():
    """Values computed once by the loops above. They show a change of reading even if loop and code change together."""
    rng = np.random.default_rng(2007)
    z, d_s, d_t = (torch.from_numpy(rng.normal(size=shape).round(3)) for shape in ((1, 3, 2, 2), (1, 6, 2, 2), (1, 6, 1, 2)))
    z, feat = 2 * z, torch.from_numpy(rng.normal(size=(6, 2)).round(3))
    soft, hard = fada.soft_labels(z, 1.8, 0.6), fada.hard_labels(z, 0.6)
    assert np.array(list(samples(hard))).tolist() == [[0, 1, 0], [1, 0, 0], [0, 1, 0], [0, 0, 0]]
    np.testing.assert_allclose(np.array(list(samples(soft))), [
        [0.347855159, 0.530010753, 0.122134087], [0.6, 0.073264461, 0.068235471], [0.054612189, 0.6, 0.313225622],
        [0.370432908, 0.487415425, 0.142151667]], atol=1e-9)
    label = torch.tensor([[[0, 2, IGNORE], [1, 1, 0], [IGNORE, 2, 2]]])
    ones = fada.binary_labels(z)
    got = [fada.segmentation_loss(z, label), fada.discriminator_loss(d_s, d_t, soft, soft[:, :, :1]),
           fada.adversarial_loss(d_t, soft[:, :, :1]), fada.discriminator_loss(d_s[:, :2], d_t[:, :2], ones, ones[:, :, :1]),
           fada.adversarial_loss(d_t[:, :2], ones[:, :, :1]),
           *fada.class_center_distance(feat, torch.tensor([4, 0, 4, IGNORE, 0, 4]))]
    assert [x.item() for x in got] == pytest.approx([                            # Eqs. (3), (5), (6), (1), (4), (9)
        1.4793502804716714, 1.8896730730777742, 1.7788539016671967, 0.40956370006931686, 2.1479869448354036,
        0.38216413875124516, 1.0638098051434373], rel=1e-12)
    assert fada.domain_encoding(torch.tensor([0.2, 0.7])[None, :, None, None], "target").flatten().tolist() == pytest.approx(
        [0, 0, 0.2, 0.7])


# ----------------------------------------------------------------------------------------- Eq. (9)


def ccd_case(offset=0.0):
    """Classes 2, 5, 18 of different sizes and centres, out of order; some features are ignored."""
    torch.manual_seed(0)
    label = torch.tensor([18, 2, 5, IGNORE, 2, 18, 2, 5, 2, IGNORE, 5, 2])
    return random(12, 3) + label[:, None] / 7.0 + offset, label


def test_class_center_distance_is_eq_9():
    feat, label = ccd_case()
    got = fada.class_center_distance(feat, label)
    assert got.dtype == torch.float64
    np.testing.assert_allclose(got.numpy(), eq9(feat, label), rtol=1e-10)
    feat[label == IGNORE] = math.inf                                            # ignored features are not read
    np.testing.assert_allclose(fada.class_center_distance(feat, label).numpy(), got, rtol=1e-12)


@pytest.mark.parametrize("dtype, offset", [(torch.float32, 300.0), (torch.bfloat16, 0.0)])
def test_class_center_distance_accumulates_in_float64(dtype, offset):
    feat, label = ccd_case(offset)
    feat = feat.to(dtype)
    np.testing.assert_allclose(fada.class_center_distance(feat, label).numpy(), eq9(feat, label), rtol=1e-7)


def test_class_center_distance_by_hand():
    feat = torch.tensor([[0.0, 0], [2, 0], [1, 3], [5, 0]])                     # centres (1,0), (1,3), (5,0)
    got = fada.class_center_distance(feat, torch.tensor([9, 9, 1, 4]))
    assert got.tolist() == pytest.approx([0, 0, (1 / 9 + 1 / 16) / 2])          # classes 1, 4, 9


def test_class_center_distance_without_other_classes():
    feat = random(3, 4)
    assert fada.class_center_distance(feat, torch.tensor([6, 6, IGNORE])).isnan().tolist() == [True]
    assert fada.class_center_distance(feat, torch.full((3,), IGNORE)).shape == (0,)


def test_class_moments_of_uneven_chunks_add_up():
    feat, label = ccd_case()
    parts = [fada.class_moments(f, y, 19) for f, y in zip(feat.split([1, 3, 8]), label.split([1, 3, 8]))]
    moments = [sum(part) for part in zip(*parts)]
    count, total, square = moments
    assert count.tolist() == [0, 0, 5, 0, 0, 3] + 12 * [0] + [2]
    assert total.shape == (19, 3) and square.shape == (19,) and all(m.dtype == torch.float64 for m in moments)
    ccd = fada.class_center_distance_from_moments(*moments)
    assert ccd.shape == (19,) and ccd.isfinite().nonzero().flatten().tolist() == [2, 5, 18]
    np.testing.assert_allclose(ccd[[2, 5, 18]].numpy(), eq9(feat, label), rtol=1e-10)


def test_report_pairs_each_feature_with_its_own_label(capsys):
    class Images(list):
        def __init__(self, dataset, pairs):
            super().__init__(pairs)
            self.dataset = dataset

    class Sweep:
        names = ("road", "sky", "car")
        classes = ClassList(names, (), (), {})

        def seed(self, *names):
            torch.manual_seed(0)

        float64_device = torch.device("cpu")

        def sweep(self, what, dataset, shared=True):
            assert shared
            for x, label in dataset:
                yield x, label, ("name",)

        autocast = StubRun.autocast

    class Double(nn.Module):
        feat_channels, num_classes = 4, 3

        def forward(self, x):
            return x[:, :, 1::3, 1::3], None                                    # the middle one of three pixels

    domains = {d: [(random(1, 4, 6, 9, seed=s), labels(1, 6, 9, K=3, seed=s)) for s in seeds]
               for d, seeds in {"source": (1, 2, 3), "target": (4, 5)}.items()}
    analysed = [Images(domain, pairs) for domain, pairs in domains.items()]
    fada.report_class_center_distance(Sweep(), fada.Config(), Double(), analysed)
    domains["both"] = domains["source"] + domains["target"]
    title, header, *lines = capsys.readouterr().out.strip().splitlines()
    assert "Eq. (9)" in title and header.split() == list(domains)
    printed = {line.split()[0]: [float(v) for v in re.findall(r"\d+\.\d+", line)] for line in lines}
    expected = [eq9(torch.tensor([v for x, _ in pairs for v in samples(x[:, :, 1::3, 1::3])]),
                    torch.cat([y[:, 1::3, 1::3].flatten() for _, y in pairs])) for pairs in domains.values()]
    for k, name in enumerate(Sweep.names):
        assert printed[name] == pytest.approx([values[k] for values in expected], abs=6e-4)
    assert printed["mean"] == pytest.approx([sum(values) / 3 for values in expected], abs=6e-4)


# ---------------------------------------------------------------------------------------- Sec. 4.3


@pytest.mark.parametrize("K", [1, 19])
def test_discriminator_is_that_of_sec_4_3(K):
    D = fada.FineGrainedDiscriminator(8, K)
    convs = [m for m in D.modules() if isinstance(m, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels) for c in convs] == [(8, 256), (256, 128), (128, 2 * K)]
    assert all((c.kernel_size, c.stride, c.padding, c.dilation) == ((3, 3), (1, 1), (1, 1), (1, 1)) for c in convs)
    x = expected = random(2, 8, 5, 3).float()
    for conv in convs:
        expected = conv(expected if conv is convs[0] else torch.where(expected > 0, expected, 0.2 * expected))
    torch.testing.assert_close(D(x), expected)                                  # no other layer, none after the last
    assert D(x).shape == (2, 2 * K, 5, 3)


PAPER = dict(backbone="resnet101", labels="soft", T=1.8, clip=0.9, hard_threshold=0.9, lambda_adv=0.001, lr=2.5e-4,
             momentum=0.9, weight_decay=1e-4, lr_discriminator=1e-4, beta1=0.9, beta2=0.99, source_iterations=20_000,
             adversarial_iterations=40_000, distill=True, batch_size=8, ccd_images=2000)       # Sec. 4.3, 4.5, 4.6


def test_defaults_are_the_papers():
    fields = {f.name: f for f in dataclasses.fields(fada.Config) if f.metadata["paper"] is not None}
    assert {name: f.metadata["paper"] for name, f in fields.items()} == PAPER
    assert {name: f.default for name, f in fields.items()} == PAPER
    assert all(re.fullmatch(r"Sec\. [34]\.\d", f.metadata["section"]) for f in fields.values())


def test_help_marks_what_the_paper_does_not_give(capsys):
    with pytest.raises(SystemExit) as stop:
        fada.main(["--help-all"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split("\ndata\n")[1].split())
    departures = fada.__doc__.split("Departures:")[1]
    for field in dataclasses.fields(fada.Config):
        shown = re.search(rf"--{field.name.replace('_', '-')}[ ,].*?\[[^\[\]]*paper: ([^\]]+)\]", text)[1]
        if field.metadata["paper"] is None:
            assert shown == "†" or f"`{field.name}`" in departures
        else:
            assert "(Sec." in shown


# ------------------------------------------------------------------------------------ what a stage receives


STAGES = ("source", "adversarial", "write_pseudo_labels", "distill")
SMALL = ("--backbone resnet18 --workers 0 --source-size 80x40 --target-size 48x24 --crop 40x20 "
         "--jitter 0.3 --lr 0.003 --momentum 0.8 --weight-decay 0.02 --batch-size 2 --source-iterations 2 "
         "--adversarial-iterations 3 --distill-iterations 1 --distill-size 112x56 --distill-crop 56x28 --distill-scale 0.6 1.2 "
         "--test-scales 0.5 1.0")
FROZEN, TRAINED = {(False, False)}, {(True, True)}                              # (in training mode, has a gradient)


@pytest.fixture
def uneven(city, tmp_path):
    """The tiny city with 5 source, 8 target and 3 validation images."""
    root = shutil.copytree(city, tmp_path / "city")
    for domain in ("gta5", "synthia"):
        for pair in find_pairs(root, domain)[5:]:
            pair.image.unlink()
            pair.label.unlink()
    return root


def described(value):
    """The parts of a stage's argument that the tests compare."""
    if isinstance(value, SegmentationDataset):
        split = {split for pair in value.pairs for split in ("train", "val") if split in pair.image.parts}
        return {"domain": value.dataset, "split": split, "images": len(value), "size": value.size, "augment": value.augment,
                "labelled": all(pair.label for pair in value.pairs), "transform": value.transform, "maps": len(value.maps)}
    if isinstance(value, nn.Module):
        norms = {(m.training, m.weight.requires_grad) for m in value.modules() if isinstance(m, nn.BatchNorm2d)}
        return {"weights": {key: x.clone() for key, x in value.state_dict().items()}, "norms": norms}
    return value


class Wiring:
    """Runs fada.main and records in `log` the arguments of its stages, optimizers, data sets and networks."""

    def __init__(self, monkeypatch):
        self.log, self.patch = [], monkeypatch
        for name in ("train", "adversarial", "write_pseudo_labels"):
            self.watch(fada, name, lambda given: {k: described(v) for k, v in given.items()})
        self.watch(fada, "sgd", lambda given: None)
        self.watch(SegmentationDataset, "__getitem__", lambda given: (described(given["self"]), given["key"]))
        self.watch(DeepLab, "forward", lambda given: None if given["self"].training else given["x"])

    def watch(self, owner, name, record):
        function = getattr(owner, name)

        def watched(*args, **kwargs):
            given = inspect.signature(function).bind(*args, **kwargs).arguments
            stage = given["stage"] if name == "train" else name
            self.log.append((stage, record(given)))
            result = function(*args, **kwargs)
            if stage in STAGES:
                self.log.append((f"end of {stage}", {k: described(v) for k, v in given.items()}))
            elif name == "sgd":
                self.log[-1] = name, [dict(group) for group in result.param_groups]
            return result
        self.patch.setattr(owner, name, watched)

    def run(self, *argv):
        """Returns: stage -> (arguments, the same at its end, views of the evaluation after it); None: before any stage."""
        self.log.clear()
        fada.main([*SMALL.split(), *argv])
        stages, current = {None: [None, None, []]}, None
        for name, what in self.log:
            if name in STAGES:
                stages[current := name] = [what, None, []]
            elif name.startswith("end of"):
                stages[current][1] = what
            elif name == "sgd":
                rates = sorted({group["lr"] for group in what})
                assert rates == pytest.approx([0.003, 0.03]) and {g["momentum"] for g in what} == {0.8}, what
                assert {g["weight_decay"] for g in what} == {0.02}
            elif stages[current][1] is not None or current is None:             # after a stage: its evaluation
                stages[current][2].append(what)
        return stages


def same(a, b):
    return all(torch.equal(a["weights"][key], b["weights"][key]) for key in a["weights"])


def check_evaluation(recorded, size, scales=(1.0,)):
    """The evaluation read the validation images at this size; with several scales, also at those and flipped."""
    items = [x for x in recorded if isinstance(x, tuple)]
    views = [x for x in recorded if isinstance(x, torch.Tensor)]
    data = {"domain": "cityscapes", "split": {"val"}, "images": 3, "size": size, "augment": Augment(), "labelled": True,
            "transform": None, "maps": 0}
    assert items and all(item == data and isinstance(key, int) for item, key in items)
    shapes = {(round(scale * size.height), round(scale * size.width)) for scale in (1.0, *scales)}
    assert {tuple(x.shape[-2:]) for x in views} == shapes
    flipped = {tuple(x.shape[-2:]) for x in views for y in views if x.shape == y.shape and torch.equal(x, y.flip(-1))}
    assert flipped == (shapes if len(scales) > 1 else set())


@pytest.mark.parametrize("source, norms", [("gta5", TRAINED), ("synthia", FROZEN)])
def test_what_each_stage_receives(source, norms, uneven, tmp_path, monkeypatch):
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "pretrained.pth")
    paths = ["--data", uneven, "--runs", tmp_path, "--init", tmp_path / "pretrained.pth", "--source", source]
    wiring, paths = Wiring(monkeypatch), [*map(str, paths)]
    small, middle, large = fada.Size(80, 40), fada.Size(48, 24), fada.Size(112, 56)
    augment = Augment(flip=True, jitter=0.3, crop=fada.Size(40, 20))
    of_source = {"domain": source, "split": set(), "images": 5, "size": small,
                 "augment": augment, "labelled": True, "transform": None, "maps": 0}
    of_target = {"domain": "cityscapes", "split": {"train"}, "images": 8, "size": middle, "augment": augment, "labelled": False,
                 "transform": None, "maps": 0}
    distilled = {**of_target, "size": large, "maps": 1,
                 "augment": Augment(flip=True, jitter=0.3, scale=(0.6, 1.2), crop=fada.Size(56, 28))}

    stages = wiring.run(*paths)
    assert tuple(stages) == (None, *STAGES)
    first, second, labelling, third = (stages[name][0] for name in STAGES)
    adapted = stages["adversarial"][1]["model"]
    assert first["images"] == second["source"] == of_source and first["iterations"] == 2
    assert second["target"] == labelling["target"] == of_target and labelling["size"] == large
    assert third["images"] == distilled and third["iterations"] == 1
    assert first["model"]["norms"] == second["model"]["norms"] == FROZEN and third["model"]["norms"] == norms
    assert same(second["model"], stages["source"][1]["model"]) and not same(second["model"], first["model"])
    assert same(labelling["model"], adapted) and not same(adapted, second["model"])
    assert same(third["model"], first["model"])                               # the student is fresh
    check_evaluation(stages["source"][2], middle)
    check_evaluation(stages["adversarial"][2], middle)
    check_evaluation(stages["distill"][2], large, (0.5, 1.0))
    if source == "synthia":
        return

    checkpoint = str(tmp_path / "fada-gta5/source.pt")
    stages = wiring.run(*paths, "--from", checkpoint, "--no-distill", "--tag", "from")           # Tables 5 and 6
    assert tuple(stages) == (None, "adversarial") and same(stages["adversarial"][0]["model"], second["model"])
    check_evaluation(stages["adversarial"][2], middle, (0.5, 1.0))

    checkpoint = str(tmp_path / "fada-gta5/adversarial.pt")
    for flags, norms in (("--freeze-bn all", FROZEN), ("--freeze-bn all --distill-freeze-bn none", TRAINED)):
        stages = wiring.run(*paths, "--from", checkpoint, *flags.split(), "--tag", flags.split()[-1])
        assert tuple(stages) == (None, *STAGES[2:])
        assert same(stages["write_pseudo_labels"][0]["model"], adapted) and stages["distill"][0]["images"] == distilled
        student = stages["distill"][0]["model"]
        assert student["norms"] == norms and same(student, first["model"])

    check_evaluation(wiring.run(*paths, "--eval")[None][2], large, (0.5, 1.0))
    check_evaluation(wiring.run(*paths, "--eval", "--from", checkpoint)[None][2], middle, (0.5, 1.0))

    bound = wiring.run(*paths, "--target-labels", "--stage", "source", "--tag", "bound")["source"]
    assert bound[0]["images"] == {**of_target, "labelled": True} and bound[0]["iterations"] == 2 + 3
    check_evaluation(bound[2], middle)


@pytest.mark.parametrize(("flags", "target", "large", "crop"), [
    ("", (1024, 512), (2048, 1024), (1024, 512)),
    ("--target-size 96x64", (96, 64), (192, 128), (96, 64)),
    ("--target-size 96x64 --distill-size 100x70", (96, 64), (100, 70), (96, 64)),
    ("--distill-crop 640x320", (1024, 512), (2048, 1024), (640, 320)),
])
def test_sizes_of_self_distillation(flags, target, large, crop, city, tmp_path, monkeypatch):
    """Sizes that the flags leave open. They are checked before anything is loaded."""
    class Stop(Exception):
        pass

    def network(run, kind):
        raise Stop

    checked, sizes, augments = [], {}, []
    monkeypatch.setattr(fada, "check", lambda cfg, options, *given: checked.append(given))
    monkeypatch.setattr(fada, "Augment", lambda **given: augments.append(Augment(**given)) or augments[-1])
    monkeypatch.setattr(fada.Run, "images", lambda run, domain, split, size=None, **_: sizes.setdefault(
        (domain, split), []).append(size or run.sizes[domain]))
    monkeypatch.setattr(fada.Run, "network", network)
    with pytest.raises(Stop):
        fada.main(["--runs", str(tmp_path), *flags.split()])
    assert checked == [(large, crop)] and augments == [Augment(flip=True, jitter=0.5), Augment(
        flip=True, jitter=0.5, scale=(0.5, 1.5), crop=fada.Size(*crop))]
    assert sizes == {("target", "val"): [target, large]}


@pytest.mark.parametrize(("flags", "words"), [
    ("--distill-scale 1.5 0.5", "is no range"), ("--distill-scale 1", "--distill-scale"),
    ("--distill-crop 1000x600 --distill-size 800x300", "larger than the images"), ("--batch-size 3", "is odd"),
    ("--source cityscapes --target crosscity --ccd", "have no labels"),
])
def test_settings_are_checked_before_anything_is_loaded(flags, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        fada.main(["--runs", str(tmp_path / "runs"), *flags.split()])
    assert stop.value.code == 2 and words in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_evaluation_needs_no_training_images(uneven, tmp_path):
    argv = [*SMALL.split(), "--data", str(uneven), "--runs", str(tmp_path), "--init", "none"]
    fada.main([*argv, "--stage", "source"])
    shutil.rmtree(uneven / "gta5")
    shutil.rmtree(uneven / "cityscapes/leftImg8bit/train")
    fada.main([*argv, "--eval"])


# ---------------------------------------------------------------------------------------- on files


def test_ablations_share_a_source_model_and_the_student_learns_the_argmax(city, tmp_path, capsys):
    common = ["--data", str(city), "--runs", str(tmp_path), "--backbone", "resnet18", "--init", "none", "--batch-size", "2",
              "--source-size", "64x32", "--target-size", "64x32", "--workers", "0", "--source-iterations", "2",
              "--adversarial-iterations", "2", "--distill-iterations", "1", "--distill-size", "120x70"]
    fada.main([*common, "--stage", "source"])
    source = str(tmp_path / "fada-gta5/source.pt")
    states = {}
    for labels in ("soft", "hard", "binary"):                    # Table 5
        fada.main([*common, "--from", source, "--labels", labels, "--no-distill", "--tag", labels])
        states[labels] = torch.load(tmp_path / f"fada-gta5-{labels}/adversarial.pt", weights_only=True)["state"]
        assert not (tmp_path / f"fada-gta5-{labels}/source.pt").exists()
    assert states["binary"]["D"]["layers.4.weight"].shape[0] == 2 and states["soft"]["D"]["layers.4.weight"].shape[0] == 38

    fada.main([*common, "--from", source, "--tag", "distilled"])
    model = build_model("v2", "resnet18", 19, "none")
    model.load_state_dict(torch.load(tmp_path / "fada-gta5-distilled/adversarial.pt", weights_only=True)["state"]["model"])
    classes = class_list("gta5")
    pairs = find_pairs(city, "cityscapes", "train", labels=False)
    target, large = (fada.SegmentationDataset(pairs, "cityscapes", classes, size)
                     for size in (fada.Size(64, 32), fada.Size(120, 70)))
    for k, pair in enumerate(pairs):
        with torch.no_grad():
            _, logits = model.eval()(target[k][0][None])
        label = nn.functional.interpolate(logits, (70, 120), mode="bilinear", align_corners=True).argmax(dim=1)[0]
        written = large.with_maps(tmp_path / "fada-gta5-distilled/pseudo_labels")[k][3]
        assert torch.equal(written, label), pair.name

    capsys.readouterr()
    fada.main([*common, "--eval", "--ccd", "--ccd-images", "3", "--tag", "distilled"])
    printed = capsys.readouterr().out
    assert "distill" in printed and printed.count("class center distance") == 1 and "both" in printed
