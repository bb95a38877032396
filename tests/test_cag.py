"""CAG's equations against naive float64 loops written from the paper; its stages on the tiny city; two processes."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import datetime
import inspect
import itertools
import json
import math
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import cag
from common.cli import Size
from common.data import Augment, SegmentationDataset, class_list
from common.deeplab import build_model
from common.files import UserError
from common.layouts import find_pairs
from common.run import Options, Run

IGNORE = 255


def random(*shape, seed=0, scale=2.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(*shape, C, seed=0, ignored=0.3):
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(C, shape, generator=generator)
    return label.masked_fill(torch.rand(shape, generator=generator) < ignored, IGNORE)


def anchors_of(C, D, *missing, seed=9):
    anchors = random(C, D, seed=seed)
    anchors[list(missing)] = math.nan
    return anchors


# -------------------------------------------------------------------------------- the paper in loops


def rows(x):
    """The vector of every pixel of an (N, C, h, w) tensor."""
    return np.moveaxis(x.detach().double().numpy(), 1, -1).reshape(-1, x.shape[1]).tolist()


def mean(values):
    return sum(values) / len(values) if values else 0.0


def softmax(z):
    e = [math.exp(v - max(z)) for v in z]
    return [v / sum(e) for v in e]


def eq2(logits, label):
    return mean([-math.log(softmax(z)[y]) for z, y in zip(rows(logits), label.flatten().tolist()) if y != IGNORE])


def eq4(feat, label, C):
    pixels = list(zip(rows(feat), label.flatten().tolist()))
    return [[mean([f[k] for f, y in pixels if y == c]) if any(y == c for _, y in pixels) else math.nan
             for k in range(feat.shape[1])] for c in range(C)]


def eq5(f, anchors):
    return [math.inf if math.isnan(a[0]) else math.sqrt(sum((p - q) ** 2 for p, q in zip(a, f))) for a in anchors.tolist()]


def eq6(d, margin):
    shortest, second = sorted(d)[:2]
    return 1 if second - shortest > margin else 0


def eq7(d, margin):
    """All categories that are the pseudo label."""
    return [c for c in range(len(d)) if all(d[c] < d[k] - margin for k in range(len(d)) if k != c)]


def eq8(feat, label, anchors):
    return mean([(p - q) ** 2 for f, y in zip(rows(feat), label.flatten().tolist())
                 if y != IGNORE and not anchors[y].isnan().any() for p, q in zip(anchors[y].tolist(), f)])


def nearest(label, h, w):
    """The label at the centre of each cell of an h x w grid."""
    H, W = label.shape[-2:]
    return label[:, [int((i + 0.5) * H / h) for i in range(h)]][:, :, [int((j + 0.5) * W / w) for j in range(w)]]


def bilinear(x, H, W):
    """The corners of the two grids coincide."""
    def hat(n, N):
        return torch.tensor([[max(0, 1 - abs(i * (n - 1) / (N - 1) - k)) for k in range(n)] for i in range(N)], dtype=x.dtype)
    return hat(x.shape[2], H) @ x @ hat(x.shape[3], W).T


# ------------------------------------------------------------------------------------- Eqs. (4), (5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_class_sums_of_uneven_batches_give_eq_4(dtype):
    feat, label = (random(5, 6, 3, 4) + 300).to(dtype), labels(5, 3, 4, C=4)
    label[label == 2] = 3                                                       # 2 and 4 never occur
    label[1] = IGNORE
    parts = [cag.class_sums(f, y, 5) for f, y in zip(feat.split([1, 1, 3]), label.split([1, 1, 3]))]
    assert not parts[1][0].any() and not parts[1][1].any()
    for total, count in (map(sum, zip(*parts)), cag.class_sums(feat, label, 5)):
        assert total.dtype == torch.float64 and count.dtype == torch.int64
        assert count.tolist() == [int((label == c).sum()) for c in range(5)]
        np.testing.assert_allclose((total / count[:, None]).numpy(), eq4(feat, label, 5), rtol=1e-12)    # NaN where the loop is
    total, count = cag.class_sums(feat[:1, :, :1, :1], torch.full((1, 1, 1), 1), 3)
    assert total[1].tolist() == feat[0, :, 0, 0].tolist() and not total[[0, 2]].any() and count.tolist() == [0, 1, 0]


def test_anchor_distances_are_eq_5():
    feat, anchors = random(2, 6, 3, 4), anchors_of(5, 6, 3)
    d = cag.anchor_distances(feat, anchors)
    assert d.shape == (2, 5, 3, 4) and d[:, 3].isposinf().all()
    np.testing.assert_allclose(rows(d), [eq5(f, anchors) for f in rows(feat)], rtol=1e-9)
    exactly = cag.anchor_distances(torch.tensor([[3.0], [4.0]])[None, :, None], torch.tensor([[3.0, 4.0], [0, 0]]))
    assert exactly.flatten().tolist() == [0, 5]


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor that is created."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        self.numel = max(self.numel, out.numel() if isinstance(out, torch.Tensor) else 0)
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_anchor_distances_in_low_precision_and_little_memory(dtype):
    feat, anchors = (random(1, 64, 16, 16) + 5).to(dtype), random(19, 64, seed=1).float() + 5
    anchors[:10] = feat[0, :, :10, 0].T                                         # ten distances are 0
    with Largest() as largest:
        d = cag.anchor_distances(feat, anchors)
    assert 19 * 16 * 16 <= largest.numel <= 64 * 16 * 16                        # the size of feat, not 19 times that
    f, a = torch.tensor(rows(feat), dtype=torch.float64), anchors.double()
    exact = torch.cdist(f, a, compute_mode="donot_use_mm_for_euclid_dist")
    error = (d.double()[0].flatten(1).T.square() - exact.square()).abs() / (f.square().sum(1)[:, None] + a.square().sum(1))
    assert d.dtype == torch.float32 and (d >= 0).all() and error.max() < 1e-6   # a NaN fails too


# ---------------------------------------------------------- Eqs. (6), (7) and the labels of Eq. (11)


@pytest.mark.parametrize("margin", [0.0, 0.75, 2.5])
def test_anchor_pseudo_labels_are_eqs_6_and_7(margin):
    d = (4 * random(4, 5, 16, 16).abs()).round() / 4                            # quarters give many ties and exact margins
    d[torch.rand(4, 5, 16, 16, generator=torch.Generator().manual_seed(0)) < 0.4] = math.inf
    got, differences = cag.anchor_pseudo_labels(d, margin), []
    for v, y in zip(rows(d), got.flatten().tolist()):
        assert len(eq7(v, margin)) == eq6(v, margin)                            # the two equations agree
        assert y == (eq7(v, margin)[0] if eq6(v, margin) else IGNORE)
        differences.append(sorted(v)[1] - sorted(v)[0])
    assert got.shape == (4, 16, 16) and got.dtype == torch.int64 and differences.count(margin) > 3
    assert any(math.isnan(x) for x in differences) and any(x == math.inf for x in differences)


def test_anchor_pseudo_labels_by_hand():
    inf = math.inf
    cases = {(1, 3.5, 9): IGNORE, (3.75, 9, 1): 2, (9, 1, 1): IGNORE, (5, inf, 1): 2, (3.5, inf, 1): IGNORE, (inf, 7, inf): 1,
             (inf, inf, inf): IGNORE}
    assert cag.anchor_pseudo_labels(torch.tensor(list(cases)).T[None, :, :, None]).flatten().tolist() == list(cases.values())


def test_probability_pseudo_labels():
    z = random(2, 4, 5, 6)
    for threshold in (0.0, 0.6, 0.9):
        expected = [p.index(max(p)) if max(p) > threshold else IGNORE for p in map(softmax, rows(z))]
        assert cag.probability_pseudo_labels(z, threshold).flatten().tolist() == expected and len(set(expected)) > 3
    z = torch.zeros(1, 2, 1, 1, dtype=torch.float64)                            # p = 1/2 twice, exactly
    assert cag.probability_pseudo_labels(z, 0.5).item() == IGNORE
    assert cag.probability_pseudo_labels(z, math.nextafter(0.5, 0)).item() in (0, 1)
    z = torch.tensor([[0.051, 0.949], [0.049, 0.951]], dtype=torch.float64).log()[:, :, None, None]
    assert cag.probability_pseudo_labels(z).flatten().tolist() == [IGNORE, 1]   # by default 0.95


# ----------------------------------------------------------------- Eqs. (8), (10) and (2), (9), (11)


def test_distance_loss_is_eq_8():
    feat, label, anchors = random(3, 6, 4, 5).requires_grad_(), labels(3, 4, 5, C=5), anchors_of(5, 6, 1)
    label[0, 1:] = IGNORE                                                       # pixels are averaged, not images
    loss = cag.distance_loss(feat, label, anchors)
    loss.backward()
    assert loss.shape == () and loss.item() == pytest.approx(eq8(feat, label, anchors), rel=1e-12)
    used = [y not in (IGNORE, 1) for y in label.flatten().tolist()]
    by_hand = [[2 * (p - q) / (6 * sum(used)) if use else 0 for p, q in zip(f, anchors[y if use else 0].tolist())]
               for f, y, use in zip(rows(feat), label.flatten().tolist(), used)]
    np.testing.assert_allclose(rows(feat.grad), by_hand, rtol=1e-12)
    corner = feat[1:2, :, :2, :2].detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda f: cag.distance_loss(f, label[1:2, :2, :2], anchors), corner)
    assert cag.distance_loss(torch.tensor([3.0, 4]).reshape(1, 2, 1, 1), torch.tensor([[[0]]]), torch.zeros(1, 2)) == 12.5
    rounded = feat.detach().bfloat16()
    low = cag.distance_loss(rounded, label, anchors.float())
    assert low.dtype == torch.float32 and low.item() == pytest.approx(eq8(rounded, label, anchors.float()), rel=1e-5)


def test_cross_entropy_loss_is_eq_2():
    logits, label = random(3, 6, 4, 5), labels(3, 4, 5, C=5)                    # class 5 never occurs
    label[0, 1:] = IGNORE
    loss = cag.cross_entropy_loss(logits, label)
    assert loss.shape == () and loss.item() == pytest.approx(eq2(logits, label), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("label", [IGNORE, 1])                                  # class 1 has no anchor
def test_nothing_labelled_is_exactly_zero(label, dtype):
    feat, label = random(2, 3, 2, 2).to(dtype).requires_grad_(), torch.full((2, 2, 2), label)
    losses = [cag.distance_loss(feat, label, anchors_of(3, 3, 1).float())]
    losses += [cag.cross_entropy_loss(feat, label)] * (label == IGNORE).all()
    sum(losses).backward()
    assert all(loss.shape == () and loss.item() == 0 for loss in losses) and (feat.grad == 0).all()


def test_losses_of_the_warm_up():
    d_s, d_t = random(2, 1, 3, 2, seed=1), random(3, 1, 2, 5, seed=2)
    P_s, P_t = ([1 / (1 + math.exp(-v)) for (v,) in rows(d)] for d in (d_s, d_t))           # probability of "source"
    assert cag.adversarial_loss(d_t).item() == pytest.approx(mean([-math.log(p) for p in P_t]), rel=1e-12)
    expected = 0.5 * mean([-math.log(p) for p in P_s]) + 0.5 * mean([-math.log(1 - p) for p in P_t])
    assert cag.discriminator_loss(d_s, d_t).item() == pytest.approx(expected, rel=1e-12)
    huge = torch.full((1, 1, 2, 2), 1e4, requires_grad=True)
    assert cag.discriminator_loss(huge, -huge) == 0 and cag.adversarial_loss(-huge) == 1e4  # D is right
    assert cag.discriminator_loss(-huge, huge) == 1e4 and cag.adversarial_loss(huge) == 0   # D is wrong
    (cag.discriminator_loss(-huge, huge) + cag.adversarial_loss(-huge)).backward()
    assert huge.grad.isfinite().all()


def test_discriminator_is_that_of_sec_4_1():
    D, x = cag.Discriminator(256), random(1, 256, 160, 320).float()
    convs = [m for m in D.modules() if isinstance(m, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels) for c in convs] == [(256, 64), (64, 128), (128, 256), (256, 512), (512, 1)]
    assert all((c.kernel_size, c.stride, c.padding, c.dilation) == ((3, 3), (2, 2), (1, 1), (1, 1)) for c in convs)
    expected = x[:, :, :31, :33]
    for k, conv in enumerate(convs):                                            # ReLU after three, Leaky-ReLU after the fourth
        expected = conv(expected)
        expected = (expected.clamp(min=0), torch.where(expected > 0, expected, 0.2 * expected), expected)[max(0, k - 2)]
    torch.testing.assert_close(D(x[:, :, :31, :33]), expected)
    assert D(x).shape == (1, 1, 5, 10) and D(x[:, :, :8, :16]).shape == (1, 1, 1, 1)


def pixels(vectors):
    """(1, D, 1, M) of M vectors."""
    return torch.tensor(vectors, dtype=torch.float64).T[None, :, None]


def test_golden_numbers():
    """Values from the loops of the paper, with the means of the departures. Class 2 has no anchor."""
    feat, inf = pixels([[1.25, -0.5], [0.25, 2.0], [-1.0, 0.75], [3.0, -2.0]]), math.inf
    logits = pixels([[2.0, 0.5, -1.0, 0.0], [0.0, 0.25, 1.0, 3.0], [0.5, 0.75, 0.0, -0.5], [-2.0, 1.0, 4.0, 1.5]])
    anchors = torch.tensor([[1.0, 0.5], [-0.75, 1.25], [math.nan] * 2, [2.0, -1.5]], dtype=torch.float64)
    label, d = torch.tensor([[[0, 3, IGNORE, 2]]]), cag.anchor_distances(feat, anchors)
    total, count = cag.class_sums(feat, torch.tensor([[[0, 3, 0, IGNORE]]]), 4)
    assert total.tolist() == [[0.25, 0.25], [0, 0], [0, 0], [0.25, 2.0]] and count.tolist() == [2, 0, 0, 1]
    np.testing.assert_allclose(rows(d), [[1.0307764064044151, 2.6575364531836625, inf, 1.25],
                                         [1.6770509831248424, 1.25, inf, 3.913118960624632],
                                         [2.0155644370746373, 0.5590169943749475, inf, 3.75],
                                         [3.2015621187164243, 4.962358310319802, inf, 1.118033988749895]], rtol=1e-12)
    closest, gap = cag.nearest_anchor(d)
    assert closest.flatten().tolist() == [0, 1, 1, 3]
    assert gap.flatten().tolist() == pytest.approx([0.21922359359558485, 0.42705098312484235, 1.4565474426996898,
                                                    2.0835281299665294], rel=1e-12)
    assert cag.anchor_pseudo_labels(d, 0.43).flatten().tolist() == [IGNORE, IGNORE, 1, 3]
    assert cag.probability_pseudo_labels(logits, 0.75).flatten().tolist() == [IGNORE, 3, IGNORE, 2]
    d_s, d_t = pixels([[0.5], [-1.5]]), pixels([[0.25], [2.0], [-0.75]])
    values = (cag.cross_entropy_loss(logits, label), cag.distance_loss(feat, label, anchors), cag.adversarial_loss(d_t),
              cag.discriminator_loss(d_s, d_t))
    assert torch.stack(values).tolist() == pytest.approx([0.23026451231479297, 4.09375, 0.6132461456789055,
                                                          1.1004956383801672], rel=1e-12)


def test_nearest_anchor_is_the_first_two_of_a_sort():
    """Also with ties, with classes without anchor, and with only one anchor or none."""
    d = torch.randint(0, 6, (2, 5, 7, 9), generator=torch.Generator().manual_seed(0)).double()
    d[:, 3], d[0, 1:, 0], d[0, :, 1] = torch.inf, torch.inf, torch.inf
    nearest, gap = cag.nearest_anchor(d)
    first, second = d.sort(dim=1).values[:, :2].unbind(dim=1)
    assert torch.equal(d.gather(1, nearest[:, None])[:, 0], first) and (second == first).any()
    assert torch.equal(gap.nan_to_num(-1), (second - first).nan_to_num(-1))
    assert gap[0, 0].isinf().all() and gap[0, 1].isnan().all() and gap[1].isfinite().all()


def test_lambda1_of_76_8_is_the_printed_sum_over_256_channels():
    feat, label, anchors = random(1, 256, 2, 2), torch.tensor([[[0, 1], [1, IGNORE]]]), anchors_of(2, 256)
    printed = sum((anchors[y] - torch.tensor(f)).square().sum().item() for f, y in zip(rows(feat), (0, 1, 1)))     # Eq. (8)
    assert 76.8 * cag.distance_loss(feat, label, anchors).item() == pytest.approx(0.3 * printed / 3, rel=1e-6)


# --------------------------------------------------------------------- the training stages, Eq. (12)


class TinyNet(nn.Module):
    feat_channels = 4

    def __init__(self, num_classes=3):
        super().__init__()
        self.features, self.head = nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Conv2d(4, num_classes, 1)

    def forward(self, x):
        feat = self.features(x).tanh()
        return feat, 3 * self.head(feat)

    def parameter_groups(self, lr, encoder_rate=1.0):
        return [{"params": self.features.parameters(), "lr": encoder_rate * lr}, {"params": self.head.parameters(), "lr": lr}]


class TinyD(nn.Sequential):
    """In place of the discriminator, whose outputs are float32: here everything is float64."""

    def __init__(self, in_channels):
        super().__init__(nn.Conv2d(in_channels, 6, 3, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(6, 1, 1))


class StubRun:
    """What a stage uses of a run. Stores the losses and gradients of each iteration, and the first weights of D."""

    def __init__(self, model, batches):
        self.model, self.batches, self.losses, self.gradients, self.D = model, batches, [], [], nn.Identity()

    def seed(self, *names):
        torch.manual_seed(7)

    def place(self, module):
        self.D = module.double()
        self.first_D = copy.deepcopy(self.D)
        return self.D

    def stage(self, name, iterations, state, *datasets, batch_size, note=None):
        self.name, self.state = name, state
        assert batch_size == 1
        for it, batch in enumerate(self.batches):
            yield it, *batch

    def autocast(self):
        return contextlib.nullcontext()

    def report(self, **losses):
        self.losses.append({name: loss.item() for name, loss in losses.items()})
        self.gradients.append([p.grad.clone() for p in (*self.model.parameters(), *self.D.parameters())])


def eq12_terms(model, anchors, source, target):
    """All terms of Eq. (12) and Table 4: the target's on the grid, the source's cross entropy at image size."""
    (x_s, y_s), (x_t, _, y_t, y_tP) = source, target
    with torch.no_grad():
        (feat_s, z_s), (feat_t, z_t) = model(x_s), model(x_t)
    y_t, y_tP, on_grid = (nearest(y, *feat.shape[-2:]) for y, feat in ((y_t, feat_t), (y_tP, feat_t), (y_s, feat_s)))
    return {"ce_s": eq2(bilinear(z_s, *y_s.shape[-2:]), y_s), "dis_s": eq8(feat_s, on_grid, anchors),
            "dis_t": eq8(feat_t, y_t, anchors), "dis_tP": eq8(feat_t, y_tP, anchors),
            "ce_t": eq2(z_t, y_t), "ce_tP": eq2(z_t, y_tP)}


WEIGHTS = {"ce_s": 1, "dis_s": 0.3, "dis_t": 0.3, "dis_tP": 0.3, "ce_t": 0.7, "ce_tP": 0.7}     # Sec. 4.1


@pytest.mark.parametrize("terms", [("ce_tP",), ("ce_t",), ("dis_tP",), ("dis_s", "dis_t"), ("dis_s", "dis_t", "ce_t"),
                                   ("ce_t", "ce_tP"), None])                    # Table 4
def test_training_stage_is_eq_12(terms):
    torch.manual_seed(0)
    model, anchors = TinyNet().double(), anchors_of(3, 4, 1)
    start = copy.deepcopy(model)
    target = (random(2, 3, 7, 10, seed=2), None, *(labels(2, 7, 10, C=3, seed=s, ignored=0.5) for s in (3, 4)))
    target[2][1] = IGNORE                                                       # one of the two crops has no active pixel
    batch = ((random(1, 3, 8, 6, seed=1), labels(1, 8, 6, C=3)), target)
    run = StubRun(model, [batch])
    for p in model.parameters():
        p.grad = torch.ones_like(p)                                             # left over from an earlier stage
    cag.train_stage(run, cag.Config(terms=terms) if terms else cag.Config(), 2, model, anchors, None, None, 1)
    used = ("ce_s", *(terms or ("dis_s", "dis_t", "ce_t", "ce_tP")))
    expected = {name: value for name, value in eq12_terms(start, anchors, *batch).items() if name in used}
    assert run.losses == [pytest.approx({**expected, "unlabelled_crops": 0.5}, rel=1e-12)]
    assert run.name == "stage2" and run.state["model"] is model

    for seed in range(2):                                                       # the gradient along two directions
        values, steps = [], [random(*p.shape, seed=seed, scale=1e-5) for p in start.parameters()]
        for sign in (1, -1):
            shifted = copy.deepcopy(start)
            with torch.no_grad():
                for p, step in zip(shifted.parameters(), steps):
                    p += sign * step
            terms_there = eq12_terms(shifted, anchors, *batch)
            values.append(sum(WEIGHTS[name] * terms_there[name] for name in used))
        slope = sum((g * step).sum().item() for g, step in zip(run.gradients[0], steps))
        assert (values[0] - values[1]) / 2 == pytest.approx(slope, rel=1e-6)
    for p, old, g in zip(model.parameters(), start.parameters(), run.gradients[0]):
        torch.testing.assert_close(p, old - 2.5e-4 * (g + 1e-4 * old), rtol=1e-12, atol=1e-15)   # Sec. 4.1
    assert run.state["optimizer"].defaults["momentum"] == 0.9


@pytest.mark.parametrize("terms", [("ce_t",), ("dis_t", "ce_tP"), ("dis_s", "dis_t", "dis_tP", "ce_t", "ce_tP")])
def test_a_stage_computes_only_its_terms(terms, monkeypatch):
    computed = []
    for name, loss in (("cross_entropy_loss", cag.cross_entropy_loss), ("distance_loss", cag.distance_loss)):
        monkeypatch.setattr(cag, name, lambda *x, name=name, loss=loss: [computed.append(name), loss(*x)][1])
    target = (random(1, 3, 8, 6), None, labels(1, 8, 6, C=3), labels(1, 8, 6, C=3))
    run = StubRun(TinyNet().double(), [((random(1, 3, 8, 6), labels(1, 8, 6, C=3)), target)])
    cag.train_stage(run, cag.Config(terms=terms), 1, run.model, anchors_of(3, 4), None, None, 1)
    assert sorted(computed) == sorted(["cross_entropy_loss", *({"ce": "cross_entropy_loss", "dis": "distance_loss"}[
        term.split("_")[0]] for term in terms)])


def test_source_stage_is_eq_2_at_image_size():
    model, x, y = TinyNet().double(), random(2, 3, 8, 6), labels(2, 8, 6, C=3)
    start, run = copy.deepcopy(model), StubRun(model, [((x, y),)])
    cag.train_source(run, cag.Config(), model, None, 1)
    assert run.losses == [{"ce_s": pytest.approx(eq2(bilinear(start(x)[1], 8, 6), y), rel=1e-12)}] and run.name == "source"


def test_warm_up_equals_separate_passes(monkeypatch):
    """The reference trains the model on CE and L_adv without D's gradients; then D in separate passes on detached features."""
    monkeypatch.setattr(cag, "Discriminator", TinyD)
    torch.manual_seed(0)
    model = TinyNet().double()
    reference = copy.deepcopy(model)
    batches = [((random(1, 3, 8, 6, seed=s), labels(1, 8, 6, C=3, seed=s)), (random(1, 3, 6, 9, seed=s + 50), None))
               for s in range(3)]
    run = StubRun(model, batches)
    cag.warm_up(run, cag.Config(lambda_adv=0.5), model, None, None, 3)
    assert run.name == "warmup" and run.state["D"] is run.D and len(run.state) == 4

    D = run.first_D
    sgd = torch.optim.SGD(reference.parameters(), lr=2.5e-4, momentum=0.9, weight_decay=1e-4)
    adam = torch.optim.Adam(D.parameters(), lr=1e-4, betas=(0.9, 0.99))
    bce, one = nn.functional.binary_cross_entropy_with_logits, torch.ones_like
    for got, ((x_s, y_s), (x_t, _)) in zip(run.gradients, batches, strict=True):
        (feat_s, z_s), (feat_t, _) = reference(x_s), reference(x_t)
        d = D(feat_t)
        sgd.zero_grad()
        (cag.cross_entropy_loss(bilinear(z_s, 8, 6), y_s) + 0.5 * bce(d, one(d))).backward()
        adam.zero_grad()
        d_s, d_t = D(feat_s.detach()), D(feat_t.detach())
        (0.5 * bce(d_s, one(d_s)) + 0.5 * bce(d_t, 0 * d_t.detach())).backward()
        for a, p in zip(got, (*reference.parameters(), *D.parameters()), strict=True):
            assert p.grad.any()
            torch.testing.assert_close(a, p.grad, rtol=1e-10, atol=1e-12)
        sgd.step()
        adam.step()
    for a, b in zip((*model.parameters(), *run.D.parameters()), (*reference.parameters(), *D.parameters()), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_gap_quantiles():
    shares = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
    gaps = np.random.default_rng(0).lognormal(0, 2, 200_000)
    parts = [cag.log_histogram(torch.from_numpy(part)) for part in np.split(gaps, [1, 70_000])]
    assert torch.equal(sum(parts), cag.log_histogram(torch.from_numpy(gaps))) and sum(parts).sum() == 200_000
    assert cag.log_quantiles(sum(parts), shares) == pytest.approx(np.quantile(gaps, shares).tolist(), rel=0.0115)
    special = cag.log_histogram(torch.tensor([[0.0, math.inf, math.nan], [1e-30, 1e30, 2.0]]))
    assert special.sum() == 4 and special[0] == 2 and special[-1] == 1 and special.dtype == torch.int64
    assert cag.log_histogram(torch.full((3,), math.inf)).sum() == 0
    assert cag.log_quantiles(torch.zeros_like(special), shares) == []


# ------------------------------------------------------------------------------------------ on files


def start(data, runs, *more):
    small = ("--backbone resnet18 --init none --source-size 64x32 --target-size 64x32 --crop 64x32 --workers 0 --no-warmup "
             "--source-iterations 2 --stage-epochs 0.25 --log-every 1 --device cpu")
    cag.main(["--data", str(data), "--runs", str(runs), *small.split(), *map(str, more)])


def log_of(folder, stage, key):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["stage"] == stage and key in line]


def saved(folder, k, what):
    return torch.load(folder / f"stage{k}-{what}.pt", weights_only=True)


def images(city, domain):
    return SegmentationDataset(find_pairs(city, domain, labels=domain == "gta5"), domain, class_list("gta5"), Size(64, 32))


def domain_of(pair):
    """Domain and split of an image."""
    return next(part for part in pair.image.parts if part in ("gta5", "cityscapes")) + "/val" * ("val" in pair.image.parts)


class Stages:
    """Records what main gives to each stage function, and which images are read between them."""

    def __init__(self, monkeypatch):
        self.timeline, self.given = [], []
        for name in ("train_source", "warm_up", "prepare_stage", "train_stage"):
            monkeypatch.setattr(cag, name, self.recorded(getattr(cag, name)))
        for name in ("SGD", "Adam"):
            monkeypatch.setattr(torch.optim, name, self.optimizer(name, getattr(torch.optim, name)))
        monkeypatch.setattr(SegmentationDataset, "__getitem__", self.item(SegmentationDataset.__getitem__))

    def recorded(self, function):
        def called(*args, **kwargs):
            arguments = inspect.signature(function).bind(*args, **kwargs).arguments
            model = arguments["model"]
            self.note(f"{function.__name__} {arguments.get('k', '')}".strip())
            self.given.append(record := {
                "iterations": arguments.get("iterations"), "anchors": arguments.get("anchors"), "before": self.weights(model),
                "training": model.training,
                "learning": {name.startswith("encoder") for name, m in model.named_modules()
                             if isinstance(m, nn.BatchNorm2d) and (m.training or m.weight.requires_grad)},
                **{domain: self.images(arguments[domain]) for domain in ("source", "target") if domain in arguments}})
            returned = function(*args, **kwargs)
            record["after"] = self.weights(model)
            return returned
        return called

    def optimizer(self, name, kind):
        def create(groups, **rates):
            created = kind(groups, **rates)
            self.given[-1][name] = sorted(group["lr"] for group in created.param_groups)
            return created
        return create

    def item(self, read):
        def item(dataset, key):
            example = read(dataset, key)
            if not isinstance(key, tuple):                                      # an evaluation item
                self.note(f"{domain_of(dataset.pairs[key])} {example[0].shape[2]}x{example[0].shape[1]}")
            return example
        return item

    def note(self, event):
        self.timeline += [event] * (self.timeline[-1:] != [event])

    @staticmethod
    def images(dataset):
        """(domain, number of images, size, augmentation, whether labelled), folders of maps."""
        domain, = {domain_of(pair) for pair in dataset.pairs}
        labelled, = {pair.label is not None for pair in dataset.pairs}
        return (domain, len(dataset), str(dataset.size), dataset.augment, labelled), [str(Path(x)) for x in dataset.maps]

    @staticmethod
    def weights(model):
        return torch.cat([p.detach().double().flatten() for p in model.parameters()]).norm().item()


def test_what_each_stage_receives(city, tmp_path, monkeypatch):
    """Five source images, eight of the target, three of the test; all sizes and lengths differ."""
    shutil.copytree(city, tmp_path / "data")
    for path in [path for folder in ("images", "labels") for path in sorted((tmp_path / "data/gta5" / folder).iterdir())[5:]]:
        path.unlink()
    torch.manual_seed(3)
    initial = build_model("v3+", "resnet18", 19, "none")
    torch.save(initial.state_dict(), tmp_path / "initial.pth")
    flags = ("--init", tmp_path / "initial.pth", *(
        "--source-size 80x48 --target-size 72x40 --crop 56x24 --scale 1 1.25 --batch-size 2 --source-iterations 3 --warmup "
        "--warmup-epochs 1.25 --stage-epochs 0.5 --K 2 --lr 1e-3 --encoder-rate 0.5 --lr-discriminator 3e-4").split())
    stages = Stages(monkeypatch)
    start(tmp_path / "data", tmp_path, *flags)
    test, labelling = "cityscapes/val 72x40", ["gta5 80x48", "cityscapes 72x40"]           # Algorithm 1, lines 4 to 6
    assert stages.timeline == ["train_source", test, "warm_up", test, "prepare_stage 1", *labelling, "train_stage 1", test,
                               "prepare_stage 2", *labelling, "train_stage 2", test]

    train_source, warm_up, prepare1, stage1, prepare2, stage2 = calls = stages.given
    augment, folder = Augment(scale=(1.0, 1.25), crop=Size(56, 24)), tmp_path / "cag-gta5"
    source, target = ("gta5", 5, "80x48", augment, True), ("cityscapes", 8, "72x40", augment, False)
    assert all(call["source"] == (source, []) for call in calls)
    assert all(call["target"] == (target, []) for call in (warm_up, prepare1, prepare2))
    for k, call in ((1, stage1), (2, stage2)):
        assert call["target"] == (target, [f"{folder}/stage{k}/{kind}_labels" for kind in ("anchor", "probability")])
        written = saved(folder, k, "anchors")["anchors"]
        assert torch.equal(call["anchors"].nan_to_num(), written.nan_to_num()) and written.any()
    assert not torch.equal(stage1["anchors"].nan_to_num(), stage2["anchors"].nan_to_num())

    assert [call["iterations"] for call in calls] == [3, 5, None, 2, None, 2]          # 8 images: 4 iterations per epoch
    assert train_source["learning"] == {False} and not any(call["learning"] for call in calls[1:])     # Sec. 4.1
    assert all(call["SGD"] == [5e-4, 1e-3] for call in (train_source, warm_up, stage1, stage2))
    assert [call.get("Adam") for call in calls] == [None, [3e-4], None, None, None, None]
    assert train_source["before"] == stages.weights(initial) and all(call["training"] for call in calls)
    assert all(call["before"] == previous["after"] for previous, call in itertools.pairwise(calls))
    assert [call["before"] != call["after"] for call in calls] == [True, True, False, True, False, True]

    stages.given.clear()
    start(tmp_path / "data", tmp_path, *flags, "--tag", "up", "--stage", "source", "--target-labels")
    upper = stages.given[0]
    assert upper["source"] == (("cityscapes", 8, "72x40", augment, True), []) and upper["iterations"] == 3 + 5 + 2 * 2
    assert upper["before"] == stages.weights(initial) and upper["learning"] == {False}


@pytest.fixture(scope="module")
def adapted(city, tmp_path_factory):
    """A run without warm-up. Stage 1 has anchors from a file; stage 2 stops in its first iteration and resumes without it.

    Returns: its folder, the file's anchors, and path -> (time of writing, content) of stage 2's files when it stopped.
    """
    runs = tmp_path_factory.mktemp("runs")
    offline = random(19, 256, scale=0.2).float()
    torch.save(offline, runs / "anchors.pt")
    argv = (city, runs, "--K", 2, "--margin", 0.05, "--threshold", 0.08, "--offline-anchors", runs / "anchors.pt",
            "--adapt-freeze-bn", "none")                                        # train and eval modes then differ

    def report(self, _report=Run.report, **losses):
        _report(self, **losses)
        report.count += 1
        if report.count == 5:
            os.kill(os.getpid(), signal.SIGTERM)
    report.count = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "report", report)
        with pytest.raises(SystemExit):
            start(*argv)
    folder = runs / "cag-gta5"
    assert torch.load(folder / "last.pt", weights_only=True)["stage"] == "stage2"
    (runs / "anchors.pt").unlink()
    before = prepared(folder)
    start(*argv)
    return folder, offline, before


def prepared(folder):
    """path -> (time of writing, content) of the files that stage 2 prepares."""
    files = (*folder.glob("stage2-*.pt"), *folder.glob("stage2/*/*/*.png"))
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


@pytest.mark.parametrize("k", [1, 2])
def test_a_stage_starts_with_anchors_and_labels_of_the_model_before_it(k, city, adapted):
    folder, offline, _ = adapted
    model = build_model("v3+", "resnet18", 19, "none").eval()
    model.load_state_dict(torch.load(folder / f"{('source', 'stage1')[k - 1]}.pt", weights_only=True)["state"]["model"])
    anchors = saved(folder, k, "anchors")["anchors"]
    if k == 1:
        assert torch.equal(anchors, offline)
    else:
        total, count = np.zeros((19, 256)), np.zeros((19, 1))
        for image, label, _ in (images(city, "gta5")[i] for i in range(8)):
            with torch.no_grad():
                feat, y = np.array(rows(model(image[None])[0])), nearest(label[None], 8, 16).flatten().numpy()
            for c in range(19):
                total[c] += feat[y == c].sum(axis=0)
                count[c] += (y == c).sum()
        assert count.all() and anchors.dtype == torch.float32
        np.testing.assert_allclose(anchors.numpy(), total / count, rtol=1e-4, atol=1e-6)

    gaps, shares = [], {kind: [] for kind in ("anchor_labels", "probability_labels")}
    for image, _, name in (images(city, "cityscapes")[i] for i in range(8)):
        with torch.no_grad():
            feat, logits = model(image[None])
        d = np.array([np.sqrt(((np.array(f) - anchors.double().numpy()) ** 2).sum(axis=1)) for f in rows(feat)])
        gap, p = np.diff(np.sort(d)[:, :2])[:, 0], np.array([softmax(z) for z in rows(logits)])
        gaps.extend(gap)
        for kind, value, limit, winner in (("anchor_labels", gap, 0.05, d.argmin(axis=1)),
                                           ("probability_labels", p.max(axis=1), 0.08, p.argmax(axis=1))):
            expected, sure = (x.reshape(8, 16).repeat(4, axis=0).repeat(4, axis=1)
                              for x in (np.where(value > limit, winner, IGNORE), abs(value - limit) > 1e-4))
            written = np.array(Image.open(folder / f"stage{k}/{kind}/{name}.png"))
            assert written.shape == (32, 64) and (written == expected)[sure].all() and sure.mean() > 0.9
            shares[kind].append(written != IGNORE)
    line, = log_of(folder, f"stage{k}", "active_percent")                       # only one, even after a resume
    for kind, active in shares.items():
        assert 0 < np.mean(active) < 1 and line["active_percent"][kind]["all"] == pytest.approx(100 * np.mean(active), abs=6e-3)
    assert list(line["gap_quantiles"].values()) == pytest.approx(np.quantile(gaps, (0.05, 0.25, 0.5, 0.75, 0.95)), rel=0.03)


def test_stages_without_warm_up_and_fixed_labels(adapted):
    folder, _, before = adapted
    assert list(json.loads((folder / "results.json").read_text())) == ["source", "stage1", "stage2"]
    assert sorted(path.stem for path in folder.glob("*.pt")) == ["source", "stage1", "stage1-anchors", "stage1-labels",
                                                                 "stage2", "stage2-anchors", "stage2-labels"]
    assert len(before) == 2 * 8 + 2 and before == prepared(folder) and (folder / "stage2/labels.png").exists()


def test_a_class_without_source_pixels(city, tmp_path, adapted):
    shutil.copytree(city, tmp_path / "data")
    for path in (tmp_path / "data/gta5/labels").iterdir():
        with Image.open(path) as file:
            ids, palette = np.array(file), file.getpalette()
        label = Image.fromarray(np.where(ids == 26, 0, ids).astype(np.uint8))   # 26: car; 0: no class
        label.putpalette(palette)
        label.save(path)
    start(tmp_path / "data", tmp_path, "--from", adapted[0] / "source.pt", "--K", 1, "--margin", 0.01, "--threshold", 1.0,
          "--terms", "dis_s", "dis_t", "dis_tP", "ce_t", "ce_tP")
    folder = tmp_path / "cag-gta5"
    anchors = saved(folder, 1, "anchors")["anchors"]
    assert anchors.isnan().all(dim=1).nonzero().flatten().tolist() == [13] and anchors.isnan().sum() == 256
    (line,) = log_of(folder, "stage1", "notes")
    notes = line["notes"]
    assert notes[0].endswith(": car") and re.search(r"^no active pixel.*: (?!.*car).*rider", notes[1])
    assert len(notes) == 3 and re.search(r"^8 .*images.*probability_labels", notes[2])
    lines = log_of(folder, "stage1", "rate")
    assert len(lines) == 2 and all(math.isfinite(value) for line in lines for value in line.values() if value != "stage1")
    for line in lines:                                                          # some labels by anchor, none by probability
        assert line["ce_t"] > 0 and line["dis_t"] > 0 and line["dis_s"] > 0 and line["ce_tP"] == line["dis_tP"] == 0
    before, after = (torch.load(path, weights_only=True)["state"]["model"] for path in (adapted[0] / "source.pt",
                                                                                       folder / "stage1.pt"))
    frozen = tuple(key.removesuffix("running_mean") for key in before if key.endswith("running_mean"))     # Sec. 4.1
    assert all(torch.equal(before[key], after[key]) == key.startswith(frozen) for key in before)


def test_nothing_active_and_sixteen_classes(city, tmp_path):
    start(city, tmp_path, "--source", "synthia", "--K", 1, "--margin", 1e6, "--threshold", 1.0)
    folder = tmp_path / "cag-synthia"
    lines = log_of(folder, "stage1", "rate")
    assert all(line["ce_t"] == line["ce_tP"] == line["dis_t"] == 0 and line["unlabelled_crops"] == 1 for line in lines)
    assert len(lines) == 2 and all(line["ce_s"] > 0 and line["dis_s"] > 0 for line in lines)
    (line,) = log_of(folder, "stage1", "notes")
    notes = line["notes"]
    assert "no active pixel" in notes[-3] and re.search(r"^8 .*images.*anchor_labels", notes[-2])
    assert re.search(r"^8 .*images.*probability_labels", notes[-1])
    assert saved(folder, 1, "anchors")["anchors"].shape == (16, 256) and saved(folder, 1, "labels")["active"].sum() == 0
    result = json.loads((folder / "results.json").read_text())["stage1"]["single-scale"]
    assert len(result["iou"]) == 16 and {"mIoU", "mIoU*"} <= result.keys()


@pytest.mark.parametrize(("content", "words"), [
    (torch.zeros(16, 256), "holds a tensor of shape (16, 256)"), ({"vectors": torch.zeros(19, 256)}, "holds <class 'dict'>"),
    (torch.full((19, 256), math.nan), "not finite"), ("text", "is damaged or not a --offline-anchors file"),
    (None, "there is no --offline-anchors file"),
])
def test_offline_anchors_that_do_not_fit(content, words, city, tmp_path, capsys):
    path = tmp_path / "file.pt"
    if content == "text":
        path.write_text(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(SystemExit) as stop:
        start(city, tmp_path / "runs", "--offline-anchors", path)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and str(path) in error and words in error and error.count("\n") == 1
    assert not list((tmp_path / "runs").rglob("*.pt"))


def test_offline_anchors_of_a_run(adapted):
    given = cag.read_anchors(adapted[0] / "stage2-anchors.pt", 19, 256)
    assert torch.equal(given, saved(adapted[0], 2, "anchors")["anchors"]) and given.any()


def test_offline_anchors_that_are_never_used(city, tmp_path, capsys):
    with pytest.raises(SystemExit):
        start(city, tmp_path / "runs", "--stage", "source", "--offline-anchors", tmp_path / "file.pt")
    assert "this start does not reach stage 1" in capsys.readouterr().err and not list((tmp_path / "runs").rglob("*.pt"))


def test_evaluation_needs_no_training_images(city, tmp_path, adapted, capsys):
    for part in ("leftImg8bit/val", "gtFine/val"):
        shutil.copytree(city / "cityscapes" / part, tmp_path / "cityscapes" / part)
    start(tmp_path, tmp_path / "runs", "--from", adapted[0] / "stage2.pt", "--eval")
    assert "mIoU" in capsys.readouterr().out and not (tmp_path / "runs").exists()


# ------------------------------------------------------------------------------------- two processes


def anchors_labels_and_scores(city, folder, anchors, tag):
    """The results of a stage's sweeps over seven images per domain: anchors, counts, and the matrix in results.json."""
    cfg = cag.Config(margin=0.05, threshold=0.1)
    run = Run("cag", cfg, Options(runs=str(folder), tag=tag, workers=0, device="cpu"), dict.fromkeys(cag.stage_names(cfg), 1))
    torch.manual_seed(0)
    model = TinyNet(19)
    source, target = images(city, "gta5"), images(city, "cityscapes")
    source.pairs, target.pairs = source.pairs[:7], target.pairs[:7]
    source_means = cag.source_anchors(run, model, source)
    counts = cag.label_target(run, cfg, model, anchors, target, folder / "labels")
    torch.save({}, run.folder / f"{('source', 'other')[run.rank]}.pt")
    run.evaluate("source", model, source, {"single-scale": {}})
    return source_means, counts, run.results()["source"]["single-scale"]["matrix"]


def test_a_label_that_cannot_be_written_ends_the_run(city, tmp_path):
    last = images(city, "cityscapes").pairs[6].name
    (tmp_path / f"labels/probability_labels/{last}.png").mkdir(parents=True)    # a folder in the place of the file
    with pytest.raises(UserError, match=f"probability_labels/{last}.png"):
        anchors_labels_and_scores(city, tmp_path, anchors_of(19, 4).float(), "one")


def one_of_two(rank, city, folder, anchors):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", timeout=datetime.timedelta(seconds=60),
                                         rank=rank, world_size=2)
    torch.save(anchors_labels_and_scores(city, folder, anchors, "two"), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_give_what_one_gives(city, tmp_path):
    anchors = 0.3 * anchors_of(19, 4, 5).float()
    expected, counts, matrix = anchors_labels_and_scores(city, tmp_path / "one", anchors, "one")
    (tmp_path / "two").mkdir()
    torch.multiprocessing.spawn(one_of_two, (city, tmp_path / "two", anchors), nprocs=2)
    assert expected.isfinite().any() and counts["active"].sum() > 0 and counts["pixels"].sum() == 2 * 7 * 16 * 32
    for rank in range(2):
        anchors_, counts_, matrix_ = torch.load(tmp_path / f"two/{rank}.pt")
        torch.testing.assert_close(anchors_, expected, rtol=1e-6, atol=0, equal_nan=True)
        assert matrix_ == matrix and counts_.keys() == counts.keys()
        assert all(torch.equal(counts_[key], counts[key]) for key in counts)
    one, two = ({path.relative_to(tmp_path / n): path.read_bytes() for path in (tmp_path / n).rglob("labels/*/*/*.png")}
                for n in ("one", "two"))
    assert len(one) == 14 and one == two


# ------------------------------------------------------------------------------------------ settings


PAPER = dict(backbone="resnet101", adapt_freeze_bn="all", warmup=True, K=3, margin=2.5, threshold=0.95, lambda1=0.3,
             lambda2=0.7, lambda_adv=0.01, terms=("ce_t", "ce_tP", "dis_s", "dis_t"), lr=2.5e-4, momentum=0.9,
             weight_decay=1e-4, warmup_epochs=20.0, stage_epochs=20.0, batch_size=1, scale=(1.0, 1.5), crop=Size(1280, 640))


def test_defaults_are_the_papers():
    fields = {f.name: f for f in dataclasses.fields(cag.Config) if f.metadata["paper"] is not None}
    assert {name: f.metadata["paper"] for name, f in fields.items()} == PAPER
    assert {name: f.default for name, f in fields.items()} == PAPER
    assert cag.Config().source_iterations == 20 * 2975                          # 20 epochs of Cityscapes, as the other stages
    assert all(re.fullmatch(r"Sec\. [34]\.\d|Eq\. \(12\)|Table 4", f.metadata["section"]) for f in fields.values())
    assert cag.stage_names(cag.Config()) == ("source", "warmup", "stage1", "stage2", "stage3")
    assert cag.stage_names(cag.Config(warmup=False, K=1)) == ("source", "stage1")
