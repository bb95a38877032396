"""SIM's equations against naive float64 loops written from the paper; its banks and regions by hand; its two steps."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import sim
from common import metrics
from common.cli import Size
from common.data import Augment, class_list
from common.deeplab import build_model
from common.files import UserError
from common.layouts import find_pairs
from common.run import Options

IGNORE = 255
STUFF = {"road", "sidewalk", "building", "wall", "fence", "vegetation", "terrain", "sky"}            # Sec. 6.2


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(*shape, K, seed=0, ignored=0.2):
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(K, shape, generator=generator)
    return label.masked_fill(torch.rand(shape, generator=generator) < ignored, IGNORE)


# --------------------------------------------------------------------------------- the paper in loops


def softmax(z):
    e = [math.exp(v - max(z)) for v in z]
    return [v / sum(e) for v in e]


def cells_of(L, k):
    return [(i, j) for i in range(len(L)) for j in range(len(L[0])) if L[i][j] == k]


def mean_feature(f, cells):
    """A of Eq. (5), I of Eq. (7)."""
    return [sum(f[d][i][j] for i, j in cells) / max(1e-6, len(cells)) for d in range(len(f))]


def regions_of(L, k):
    """T of Eq. (7), 8-connected, in reading order, then sorted by area."""
    regions, seen = [], set()
    for start in cells_of(L, k):
        region, stack = [], [start]
        while stack:
            i, j = stack.pop()
            if 0 <= i < len(L) and 0 <= j < len(L[0]) and L[i][j] == k and (i, j) not in seen:
                seen.add((i, j))
                region.append((i, j))
                stack += [(i + a, j + b) for a in (-1, 0, 1) for b in (-1, 0, 1)]
        regions += [region] if region else []
    return sorted(regions, key=len, reverse=True)                                  # a stable sort


def distance(a, b):
    return sum(abs(x - y) for x, y in zip(a, b)) / len(a)


def eq5(feat, label_maps, classes, w):
    """Returns: class -> ring, class -> number of writes."""
    S, c = {b: [None] * w for b in classes}, {b: 0 for b in classes}
    for f, L in zip(feat.tolist(), label_maps.tolist()):
        for b in classes:
            if cells_of(L, b):
                S[b][c[b] % w] = mean_feature(f, cells_of(L, b))
                c[b] += 1
    return S, c


def algorithm1(feat, label_maps, classes, slots, z):
    S, c = {k: [None] * slots for k in classes}, {k: 0 for k in classes}
    for f, L in zip(feat.tolist(), label_maps.tolist()):
        for k in classes:
            R = regions_of(L, k)
            for l in range(min(z, len(R))):
                S[k][c[k] % slots] = mean_feature(f, R[l])
                c[k] += 1
    return S, c


def nearest(query, S):
    return min(distance(query, s) for s in S if s is not None)


def eq6(feat, label_maps, S):
    total = 0.0
    for f, L in zip(feat.tolist(), label_maps.tolist()):
        for b in S:
            if cells_of(L, b) and any(S[b]):
                total += nearest(mean_feature(f, cells_of(L, b)), S[b])
    return total / len(feat)


def eq8(feat, label_maps, S, z):
    total = 0.0
    for f, L in zip(feat.tolist(), label_maps.tolist()):
        for k in S:
            R = regions_of(L, k)[:z]
            if R and any(S[k]):
                total += sum(nearest(mean_feature(f, r), S[k]) for r in R) / len(R)
    return total / len(feat)


def filled(classes, slots, entries, seed=0, dim=5):
    """A float64 bank with `entries` random features per class, and the same features as lists."""
    bank = sim.FeatureBank(classes, slots, dim).double()
    S = {}
    for k, n in zip(classes, entries):
        S[k] = random(n, dim, seed=seed + k).tolist()
        for s in S[k]:
            bank.write(k, torch.tensor(s, dtype=torch.float64))
    return bank, S


# ------------------------------------------------------------------------ segmentation, adversarial adaptation


@pytest.mark.parametrize("size", [(3, 4), (5, 9)])
def test_segmentation_loss_is_eq_1_over_labelled_pixels(size):
    logits, label = random(2, 5, 3, 4), labels(2, *size, K=5)
    label[0, :2] = IGNORE                                                        # images with unequal shares
    total, (N, K, h, w), (H, W) = [], logits.shape, size
    for n, i, j in np.ndindex(N, H, W):
        if label[n, i, j] != IGNORE:
            y, u = i * (h - 1) / (H - 1), j * (w - 1) / (W - 1)                  # corners coincide
            z = [sum(max(0, 1 - abs(y - a)) * max(0, 1 - abs(u - b)) * float(logits[n, k, a, b])
                     for a in range(h) for b in range(w)) for k in range(K)]
            total.append(-math.log(softmax(z)[label[n, i, j]]))
    assert sim.segmentation_loss(logits, label).item() == pytest.approx(sum(total) / len(total), rel=1e-9)


def test_segmentation_loss_without_labels_is_zero():
    logits = random(2, 5, 3, 4).requires_grad_()
    loss = sim.segmentation_loss(logits, torch.full((2, 6, 8), IGNORE))
    loss.backward()
    assert loss.item() == 0 and loss.shape == () and (logits.grad == 0).all()


def test_eqs_2_and_3():
    d_s, d_t = random(2, 1, 2, 3), 2 * random(3, 1, 1, 2, seed=1)
    D_s, D_t = ([1 / (1 + math.exp(-v)) for v in d.flatten().tolist()] for d in (d_s, d_t))          # P(target)
    adv = -np.mean([math.log(1 - p) for p in D_t])
    dis = -np.mean([math.log(p) for p in D_t]) - np.mean([math.log(1 - p) for p in D_s])
    assert sim.adversarial_loss(d_t).item() == pytest.approx(adv, rel=1e-12)
    assert sim.discriminator_loss(d_s, d_t).item() == pytest.approx(dis, rel=1e-12)


def test_signs_of_eqs_2_and_3():
    zero, sure = torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 200.0)
    # A perfect discriminator says "target" (+) for target outputs and "source" (-) for source outputs.
    assert sim.discriminator_loss(-sure, sure) == 0 and sim.adversarial_loss(sure) == 200
    assert sim.discriminator_loss(sure, -sure) == 400 and sim.adversarial_loss(-sure) == 0           # always wrong
    assert sim.adversarial_loss(zero).item() == pytest.approx(math.log(2))
    assert sim.discriminator_loss(zero, zero).item() == pytest.approx(2 * math.log(2))
    d_s, d_t = zero.clone().requires_grad_(), zero.clone().requires_grad_()
    (descend_adv,) = torch.autograd.grad(-sim.adversarial_loss(d_t), d_t)
    descend_s, descend_t = torch.autograd.grad(-sim.discriminator_loss(d_s, d_t), (d_s, d_t))
    assert (descend_adv < 0).all() and (descend_t > 0).all() and (descend_s < 0).all()               # D = P(target)


def test_the_game_through_a_discriminator():
    torch.manual_seed(0)
    D = sim.Discriminator(3).double()
    source, target = (random(1, 3, 32, 32, seed=s).softmax(dim=1) for s in (0, 1))
    before = D(target).mean(), D(source).mean()
    optimizer = torch.optim.SGD(D.parameters(), lr=0.1)
    sim.discriminator_loss(D(source), D(target)).backward()
    optimizer.step()
    after = D(target).mean(), D(source).mean()
    assert after[0] - after[1] > before[0] - before[1]                           # D separates them better
    target.requires_grad_()
    sim.adversarial_loss(D(target)).backward()
    assert D(target - target.grad).mean() < D(target).mean()                     # and G makes D say "source" for the target


def test_discriminator_is_that_of_sec_5_1():
    D = sim.Discriminator(19)
    convs, between = D.layers[0::2], D.layers[1::2]
    assert len(D.layers) == 9 and len(list(D.modules())) == 1 + 1 + 9
    assert [(c.in_channels, c.out_channels) for c in convs] == [(19, 64), (64, 128), (128, 256), (256, 512), (512, 1)]
    for conv in convs:
        assert isinstance(conv, nn.Conv2d) and (conv.kernel_size, conv.stride, conv.padding) == ((4, 4), (2, 2), (1, 1))
        assert conv.dilation == (1, 1) and conv.groups == 1 and conv.bias is not None
    assert all(isinstance(a, nn.LeakyReLU) and a.negative_slope == 0.2 for a in between)
    prob = torch.rand(2, 19, 32, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert D(prob).shape == (2, 1, 1, 2) and D(prob).dtype == torch.float32
    with torch.no_grad():
        x = prob
        for conv in convs:
            x = nn.functional.conv2d(x, conv.weight, conv.bias, stride=2, padding=1)
            last, x = x, torch.where(x > 0, x, 0.2 * x)
        torch.testing.assert_close(D(prob), last)                                # no layer after the last
        assert D(torch.rand(1, 19, 95, 64)).shape == (1, 1, 2, 2) and D(torch.rand(1, 19, 96, 64)).shape == (1, 1, 3, 2)


# ------------------------------------------------------------------------------------- label maps and regions


def test_correct_label_map_is_eq_4():
    logits, label = random(2, 4, 5, 6), labels(2, 5, 6, K=4)
    got = sim.correct_label_map(logits, label)
    assert got.dtype == torch.int64
    for n, i, j in np.ndindex(2, 5, 6):
        z = logits[n, :, i, j].tolist()
        assert got[n, i, j] == (label[n, i, j] if z.index(max(z)) == label[n, i, j] else IGNORE)
    assert 0 < (got != IGNORE).sum() < (label != IGNORE).sum()


def test_masked_mean_is_eq_7():
    feat, masks = random(5, 4, 6), labels(3, 4, 6, K=2, ignored=0)
    masks[1] = 0
    got = sim.masked_mean(feat, masks)
    expected = [mean_feature(feat.tolist(), cells_of(mask, 1)) for mask in masks.tolist()]
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    assert (got[1] == 0).all() and got.dtype == torch.float64                    # the empty region
    assert torch.equal(sim.masked_mean(feat, masks.bool()), got)
    torch.testing.assert_close(sim.masked_mean(feat, masks[0]), got[0], rtol=1e-12, atol=0)
    area = int(masks[0].sum())
    torch.testing.assert_close(sim.masked_mean(feat, masks[0], eps=100.0), got[0] * area / 100, rtol=1e-12, atol=0)
    feat.requires_grad_()
    sim.masked_mean(feat, masks).sum().backward()
    assert feat.grad.isfinite().all()


DRAWN = {                                              # map, with # for the class -> regions as letters, in order
    "diagonal touch": ("#..  .#.  ..#", "a..  .a.  ..a"),
    "anti-diagonal": (".#.#  #.#.", ".a.a  a.a."),
    "knight's move": ("#...  ..#.  #...", "a...  ..b.  c..."),
    "a ring": ("###  #.#  ###", "aaa  a.a  aaa"),
    "no wrap around the edges": ("#..#  ....  #..#", "a..b  ....  c..d"),
    "area before order": ("#.##.###  ........  #.......", "c.bb.aaa  ........  d......."),
    "equal areas in reading order": ("...##  #....  #..##", "...aa  b....  b..cc"),
    "joined only below": ("#.#.#  #.#..  ###..", "a.a.b  a.a..  aaa.."),
    "one pixel": ("...  .#.", "...  .a."),
    "fills the image": ("###  ###", "aaa  aaa"),
    "absent": ("...  ...", "...  ..."),
}


@pytest.mark.parametrize("case", DRAWN)
def test_regions_of_drawn_maps(case):
    drawn, lettered = DRAWN[case]
    label_map = torch.tensor([[{"#": 7, ".": 2}[c] for c in row] for row in drawn.split()])
    got = sim.connected_regions(label_map, 7)
    rows = lettered.split()
    letters = sorted({c for row in rows for c in row} - {"."})
    assert got.dtype == torch.bool and got.shape == (len(letters), *label_map.shape)
    for region, letter in zip(got, letters):
        assert region.tolist() == [[c == letter for c in row] for row in rows]


@pytest.mark.parametrize("limit", [1, 10, 12, 100])
def test_at_most_limit_regions_the_largest(limit):
    """More than 10 regions: single pixels before, between and after two larger ones."""
    label_map = torch.full((7, 15), IGNORE)
    label_map[::2, ::2] = 3                                                      # 4 x 8 single pixels
    label_map[2, 4:7], label_map[6, 12:] = 3, 3                                  # two regions of 3
    expected = regions_of(label_map.tolist(), 3)
    assert [len(r) for r in expected] == [3, 3] + [1] * 28
    got = sim.connected_regions(label_map, 3, limit)
    assert [sorted(map(tuple, r.nonzero().tolist())) for r in got] == [sorted(r) for r in expected[:limit]]
    assert len(sim.connected_regions(label_map, 3)) == 10                        # Algorithm 1's z


def test_regions_of_random_maps_equal_flood_fill():
    for seed in range(8):
        label_map = labels(9, 12, K=3, seed=seed, ignored=0.3)
        expected = [sorted(r) for r in regions_of(label_map.tolist(), 1)]
        got = sim.connected_regions(label_map, 1, 99)
        assert [sorted(map(tuple, r.nonzero().tolist())) for r in got] == expected


@pytest.mark.parametrize(("H", "h"), [(32, 4), (33, 5), (61, 8), (8, 8), (3, 8)])
def test_labels_come_to_the_grid_by_the_nearest_centre(H, h):
    label = labels(2, H, 2 * H, K=19)
    picked = [[math.floor((i + 0.5) * size / new) for i in range(new)] for size, new in ((H, h), (2 * H, 7))]
    got = sim.resize_label(label, (h, 7))
    assert torch.equal(got, label[:, picked[0]][:, :, picked[1]]) and got.dtype == torch.int64


# --------------------------------------------------------------------------------------------------- banks


def test_a_ring_over_its_wrap_around():
    bank = sim.FeatureBank([2, 9, 5], 3, 2)
    assert all(bank.samples(k).shape == (0, 2) for k in (2, 9, 5))
    expected = {2: [], 9: [], 5: []}
    for n, k in enumerate([9, 9, 5, 9, 9, 5, 9, 9, 9, 5, 5]):                     # 7 writes of 9, 4 of 5, none of 2
        bank.write(k, torch.tensor([n, -n]).float())
        if len(expected[k]) < 3:
            expected[k].append(n)
        else:
            expected[k][expected[k].index(min(expected[k]))] = n                 # the oldest
        assert bank.samples(k).tolist() == [[float(v), float(-v)] for v in expected[k]]
    assert expected == {2: [], 9: [8, 6, 7], 5: [10, 5, 9]} and bank.written.tolist() == [0, 7, 4]
    assert bank.samples(2).shape == (0, 2)


@pytest.mark.parametrize("begin", range(5))
@pytest.mark.parametrize("count", range(10))
def test_several_writes_at_once(begin, count):
    """The same places as single writes, also across the end of the ring and for more features than places."""
    one, many = sim.FeatureBank([6, 7], 4, 3), sim.FeatureBank([6, 7], 4, 3)
    for bank in (one, many):
        for n in range(begin):
            bank.write(7, torch.full((3,), -1.0 - n))
    feat = random(count, 3).float()
    for row in feat:
        one.write(7, row)
    many.write(7, feat)
    assert torch.equal(many.features, one.features) and many.written.tolist() == one.written.tolist() == [0, begin + count]


def test_resume_with_a_half_filled_bank(tmp_path):
    def write(bank, first, last):
        for n in range(first, last):
            bank.write([1, 4][n % 3 == 0], random(6, seed=n).float())
    undisturbed, interrupted = sim.FeatureBank([1, 4, 6], 8, 6), sim.FeatureBank([1, 4, 6], 8, 6)
    write(undisturbed, 0, 20)
    write(interrupted, 0, 14)                                                          # class 1 wrapped, 4 part full, 6 empty
    torch.save(interrupted.state_dict(), tmp_path / "bank.pt")
    resumed = sim.FeatureBank([1, 4, 6], 8, 6)
    resumed.load_state_dict(torch.load(tmp_path / "bank.pt", weights_only=True))
    assert set(interrupted.state_dict()) == {"features", "written"} and resumed.written.tolist() == [9, 5, 0]
    assert all(torch.equal(resumed.samples(k), interrupted.samples(k)) for k in (1, 4, 6)) and len(resumed.samples(4)) == 5
    write(resumed, 14, 20)
    assert all(torch.equal(resumed.state_dict()[key], undisturbed.state_dict()[key]) for key in ("features", "written"))


def test_store_stuff_is_eq_5():
    feat, label_map = random(7, 5, 4, 6), labels(7, 4, 6, K=4, seed=3)
    label_map[label_map == 3] = 2
    label_map[2:4][label_map[2:4] == 1] = 0                                      # absent in two images: no write
    bank = sim.FeatureBank([3, 1, 0], 4, 5).double()
    S, c = eq5(feat, label_map, [3, 1, 0], 4)
    for part in (slice(0, 1), slice(1, 4), slice(4, 7)):                         # batches of 1, 3, 3
        sim.store_stuff(feat[part], label_map[part], bank)
    assert bank.written.tolist() == [c[k] for k in (3, 1, 0)] == [0, 5, 7]
    assert len(bank.samples(3)) == 0
    for k in (1, 0):
        np.testing.assert_allclose(bank.samples(k), S[k], rtol=1e-12)


@pytest.mark.parametrize("z", [1, 2, 10])
def test_store_instances_is_algorithm_1(z):
    feat, label_map = random(3, 5, 6, 9), labels(3, 6, 9, K=4, seed=1, ignored=0.4)
    label_map[label_map == 3] = IGNORE
    bank = sim.FeatureBank([2, 1, 3], 7, 5).double()
    S, c = algorithm1(feat, label_map, [2, 1, 3], 7, z)
    sim.store_instances(feat[:2], label_map[:2], bank, z)
    sim.store_instances(feat[2:], label_map[2:], bank, z)
    assert bank.written.tolist() == [c[k] for k in (2, 1, 3)] and len(bank.samples(3)) == 0
    assert (z == 1 and c[1] == 3) or (z == 2 and c[1] == 6) or c[1] > 7          # partly filled, and wrapped
    for k in (2, 1):
        np.testing.assert_allclose(bank.samples(k), [s for s in S[k] if s is not None], rtol=1e-12)


@pytest.mark.parametrize(("source", "count"), [("synthia", 16), ("gta5", 19)])
def test_banks_hold_stuff_and_things_by_name(source, count):
    classes = class_list(source)
    cfg = sim.Config(w=3, z=4)
    stuff, things = sim.make_banks(SimpleNamespace(device="cpu", classes=classes), cfg, 6)
    assert len(classes) == count and {classes.names[k] for k in stuff.classes} == STUFF & set(classes.names)
    assert len(stuff.classes) == (8 if source == "gta5" else 7)                  # SYNTHIA has no terrain
    assert sorted(stuff.classes + things.classes) == list(range(count))
    assert stuff.features.shape == (len(stuff.classes), 3, 6) and things.features.shape == (len(things.classes), 12, 6)
    for bank in sim.make_banks(SimpleNamespace(device="meta", classes=classes), cfg, 6):                 # another device
        assert (bank.features.device.type, bank.written.device.type) == ("meta", "cpu")
        bank.write(bank.classes[-1], torch.zeros(6, device="meta"))
        assert bank.samples(bank.classes[-1]).shape == (1, 6) and bank.written[-1] == 1


# ------------------------------------------------------------------------------------------------ matching


def test_nearest_sample_by_hand_and_ties():
    query = torch.tensor([[0.0, 0, 0, 0], [4, 4, 4, 4]], dtype=torch.float64)
    # 1-norms from the first query: 8, 9, 8, so first and last tie; in the 2-norm the second is nearest.
    samples = torch.tensor([[8.0, 0, 0, 0], [2.25, 2.25, 2.25, 2.25], [0, 0, 0, -8]], dtype=torch.float64)
    distances, which = sim.nearest_sample(query, samples)
    assert distances.tolist() == [2, 1.75] and which.tolist() == [0, 1] and which.dtype == torch.int64
    distances, which = sim.nearest_sample(query[:1], samples[[2, 0]])
    assert distances.tolist() == [2] and which.tolist() == [0]
    for seed in range(5):
        q, s = random(4, 6, seed=seed), random(7, 6, seed=100 + seed)
        distances, which = sim.nearest_sample(q, s)
        for a, d, j in zip(q.tolist(), distances.tolist(), which.tolist()):
            wanted = [distance(a, b) for b in s.tolist()]
            assert d == pytest.approx(min(wanted), rel=1e-12) and j == wanted.index(min(wanted))
    assert torch.autograd.gradcheck(lambda q: sim.nearest_sample(q, s)[0], q.requires_grad_())


@pytest.mark.parametrize("entries", [(1, 1), (3, 4), (9, 0)])
def test_stuff_loss_is_eq_6(entries):
    feat, label_map = random(3, 5, 4, 6, seed=1), labels(3, 4, 6, K=5, seed=2)
    label_map[1][label_map[1] == 3] = 0                                          # absent in an image
    bank, S = filled([3, 1], 4, entries)
    S = {k: s[-4:] for k, s in S.items()}
    loss = sim.stuff_loss(feat, label_map, bank)
    assert loss.shape == () and loss.item() == pytest.approx(eq6(feat, label_map, S), rel=1e-12) and loss > 0
    singles = [sim.stuff_loss(f[None], L[None], bank).item() for f, L in zip(feat, label_map)]
    assert loss.item() == pytest.approx(np.mean(singles), rel=1e-12)
    if entries == (3, 4):
        assert torch.autograd.gradcheck(lambda f: sim.stuff_loss(f, label_map, bank), feat.requires_grad_())


@pytest.mark.parametrize("z", [1, 3, 10])
@pytest.mark.parametrize("entries", [(1, 1), (3, 4), (9, 0)])
def test_instance_loss_is_eq_8(entries, z):
    feat, label_map = random(2, 5, 5, 9, seed=1), labels(2, 5, 9, K=5, seed=2, ignored=0.4)
    label_map[1][label_map[1] == 3] = 0
    bank, S = filled([3, 1], 4, entries)
    S = {k: s[-4:] for k, s in S.items()}
    assert len(regions_of(label_map[0].tolist(), 3)) > 3
    loss = sim.instance_loss(feat, label_map, bank, z)
    assert loss.shape == () and loss.item() == pytest.approx(eq8(feat, label_map, S, z), rel=1e-12) and loss > 0
    singles = [sim.instance_loss(f[None], L[None], bank, z).item() for f, L in zip(feat, label_map)]
    assert loss.item() == pytest.approx(np.mean(singles), rel=1e-12)
    if (z, entries) == (3, (3, 4)):
        assert torch.autograd.gradcheck(lambda f: sim.instance_loss(f, label_map, bank, z), feat.requires_grad_())


def test_ten_regions_per_class_and_image_by_default():
    """Fifteen single pixels with features 0, 1, .. 14, then a larger region with 20, which comes first."""
    label_map, feat = torch.full((1, 3, 31), IGNORE), torch.zeros(1, 1, 3, 31, dtype=torch.float64)
    label_map[0, 0, :30:2], feat[0, 0, 0, :30:2] = 1, torch.arange(15.0).double()
    label_map[0, 2, :2], feat[0, 0, 2, :2] = 1, 20
    bank, S = sim.FeatureBank([1], 100, 1).double(), {1: [[0.0]]}
    bank.write(1, torch.zeros(1))
    expected = (20 + sum(range(9))) / 10
    assert sim.instance_loss(feat, label_map, bank).item() == pytest.approx(expected) == eq8(feat, label_map, S, 10)
    assert torch.equal(sim.instance_loss(feat, label_map, bank), sim.instance_loss(feat, label_map, bank, 10))
    sim.store_instances(feat, label_map, bank)
    assert bank.samples(1).flatten().tolist() == [0, 20, *range(9)]


def test_losses_by_hand():
    """Two channels, class 1 is stuff, class 4 a thing with two regions of 2 and 1 cells."""
    label_map = torch.tensor([[[1, 1, 9, 4], [9, 9, 9, 9], [4, 4, 9, 9]]])
    feat = torch.zeros(1, 2, 3, 4, dtype=torch.float64)
    feat[0, :, 0, 0], feat[0, :, 0, 1] = torch.tensor([[1, 5], [3, -1]])         # mean (2, 2)
    feat[0, :, 0, 3] = 10
    feat[0, 0, 2, :2] = torch.tensor([4, 8])                                     # mean (6, 0)
    stuff, things = sim.FeatureBank([1, 2], 9, 2).double(), sim.FeatureBank([4, 5], 9, 2).double()
    for k, *value in ((1, 2, 9), (1, 5, 3), (2, 2, 2)):                          # distances 3.5, 2; class 2 is not used
        stuff.write(k, torch.tensor(value, dtype=torch.float64))
    for k, *value in ((4, 7, 1), (4, 10, 16), (5, 10, 10)):                      # (6, 0): 1, 10; (10, 10): 6, 3
        things.write(k, torch.tensor(value, dtype=torch.float64))
    feat.requires_grad_()
    stf, ins = sim.stuff_loss(feat, label_map, stuff), sim.instance_loss(feat, label_map, things)
    assert stf.item() == 2 and ins.item() == (1 + 3) / 2 and sim.instance_loss(feat, label_map, things, 1).item() == 1
    (grad,) = torch.autograd.grad(stf, feat)
    expected = torch.zeros_like(grad)
    expected[0, :, 0, :2] = torch.tensor([-1.0, -1])[:, None] / 2 / 2            # two channels, two cells; only the nearest
    assert torch.equal(grad, expected)
    (grad,) = torch.autograd.grad(ins, feat)
    expected = torch.zeros_like(grad)
    expected[0, :, 2, :2] = -1 / 2 / 2 / 2                                       # and two regions
    expected[0, 1, 0, 3] = -1 / 2 / 2                                            # its first channel has distance 0
    assert torch.equal(grad, expected)


@pytest.mark.parametrize("loss", [sim.stuff_loss, sim.instance_loss])
def test_only_the_nearest_pulls_and_of_equals_the_first(loss):
    feat, label_map = torch.zeros(1, 1, 2, 2, dtype=torch.float64, requires_grad=True), torch.ones(1, 2, 2, dtype=torch.int64)
    for values, direction in (((3, -3), -1), ((-3, 3), 1), ((3, -2, 9), 1)):
        bank = sim.FeatureBank([1], 5, 1).double()
        for value in values:
            bank.write(1, torch.tensor([value], dtype=torch.float64))
        (grad,) = torch.autograd.grad(loss(feat, label_map, bank), feat)
        assert (grad == direction / 4).all(), values


@pytest.mark.parametrize("loss", [sim.stuff_loss, sim.instance_loss])
def test_places_never_written_and_absent_classes_add_nothing(loss):
    feat = torch.zeros(2, 3, 2, 4, requires_grad=True)
    label_map = torch.tensor([[[0, 0, 1, 1], [0, 0, 1, 1]], [[IGNORE] * 4, [2] * 4]])
    bank = sim.FeatureBank([0, 1, 2, 3], 5, 3)
    assert loss(feat, label_map, bank).item() == 0                               # nothing is stored yet
    bank.write(0, torch.full((3,), 10.0))
    assert loss(feat, label_map, bank).item() == 5                               # matched to the first entry, never to zeros
    bank.write(3, torch.full((3,), 99.0))                                        # a class that no image has
    total = loss(feat, label_map, bank)
    (grad,) = torch.autograd.grad(total, feat)
    assert total.item() == 5 and (grad[1] == 0).all() and (grad[0][:, label_map[0] != 0] == 0).all() and (grad != 0).any()
    nothing = loss(feat, torch.full_like(label_map, IGNORE), bank)
    (grad,) = torch.autograd.grad(nothing + feat.sum(), feat)
    assert nothing.item() == 0 and nothing.shape == () and (grad == 1).all()


def test_no_gradient_reaches_the_bank():
    feat_s, feat_t = random(1, 5, 4, 6).requires_grad_(), random(1, 5, 4, 6, seed=1).requires_grad_()
    label_map = labels(1, 4, 6, K=4)
    stuff, things = sim.FeatureBank([0, 1], 4, 5).double(), sim.FeatureBank([2, 3], 8, 5).double()
    sim.store_stuff(2 * feat_s, label_map, stuff)
    sim.store_instances(2 * feat_s, label_map, things)
    stuff.write(0, feat_s[0, :, 0, 0])
    stored = stuff.features.clone(), things.features.clone()
    assert not any(t.requires_grad for bank in (stuff, things) for t in (bank.features, bank.samples(bank.classes[0])))
    (sim.stuff_loss(feat_t, label_map, stuff) + sim.instance_loss(feat_t, label_map, things)).backward()
    assert feat_s.grad is None and feat_t.grad.abs().sum() > 0
    assert torch.equal(stuff.features, stored[0]) and torch.equal(things.features, stored[1]) and not list(stuff.parameters())


def test_bfloat16_features_give_float32_losses():
    half, label_map = (100 * random(2, 5, 16, 32)).bfloat16(), labels(2, 16, 32, K=3)
    label_map[:, 4:12, :28] = 0                                                  # more cells than bfloat16 counts exactly: 256
    label_map[:, 4:12, 28] = IGNORE
    for store, loss in ((sim.store_stuff, sim.stuff_loss), (sim.store_instances, sim.instance_loss)):
        bank, exact = sim.FeatureBank([0, 1, 2], 4, 5), sim.FeatureBank([0, 1, 2], 4, 5).double()
        store(half.flip(0), label_map, bank)
        store(half.double().flip(0), label_map, exact)
        torch.testing.assert_close(bank.features.double(), exact.features, rtol=1e-5, atol=1e-4)
        feat = half.clone().requires_grad_()
        value = loss(feat, label_map, bank)
        assert value.dtype == torch.float32 == bank.features.dtype and value > 0
        assert value.item() == pytest.approx(loss(half.double(), label_map, exact).item(), rel=1e-4)
        value.backward()
        assert feat.grad.isfinite().all() and feat.grad.dtype == torch.bfloat16
        assert loss(half, label_map + IGNORE, bank).dtype == torch.float32


# ------------------------------------------------------------------------------------ self-supervised learning


CONFIDENCES = {
    "odd": [0.31, 0.72, 0.5, 0.11, 0.643],
    "even: the lower": [0.2, 0.81, 0.4, 0.6],
    "two": [0.75, 0.25],
    "one": [0.6181],
    "above the cap": [0.95, 0.97, 0.5, 0.99, 1.0],
    "all 1": [1.0, 1.0],
    "on an edge": [0.25, 0.5, 0.75],
    "on an edge, many": [0.1, 0.5, 0.5, 0.5, 0.9, 0.95],
    "the cap": [0.9, 0.9, 0.9],
    "random": np.random.default_rng(0).uniform(0.1, 1, 501).tolist(),
    "random, even": np.random.default_rng(1).uniform(0.05, 0.7, 500).tolist(),
}


@pytest.mark.parametrize("cap", [0.9, 0.5, 1.0])
@pytest.mark.parametrize("B", [8, 1000])
def test_thresholds_are_medians_by_sorting(B, cap):
    histogram, expected = torch.zeros(len(CONFIDENCES) + 1, B, dtype=torch.int64), []
    for row, values in zip(histogram, CONFIDENCES.values()):
        bins = [min(math.floor(c * B + 1e-9), B - 1) for c in values]
        for b in bins:
            row[b] += 1
        median = sorted(bins)[(len(bins) - 1) // 2] / B                          # the lower edge of the median's bin
        assert 0 <= sorted(values)[(len(values) - 1) // 2] - median <= 1 / B + 1e-9
        expected.append(min(median, cap))
    got = sim.class_thresholds(histogram, cap)
    assert got.tolist() == pytest.approx([*expected, cap], abs=1e-12) and got.dtype == torch.float64     # last: never predicted
    if cap == 0.9:
        assert torch.equal(sim.class_thresholds(histogram), got)


def test_pseudo_labels_are_eq_9():
    logits, thresholds = 2 * random(2, 4, 5, 6), torch.tensor([0.9, 0.5, 0.0, 0.6])
    got, kinds = sim.pseudo_labels(logits, thresholds), set()
    for n, i, j in np.ndindex(2, 5, 6):
        p = softmax(logits[n, :, i, j].tolist())
        k = p.index(max(p))
        assert got[n, i, j] == (k if p[k] > thresholds[k] else IGNORE)
        kinds.add((k, int(got[n, i, j])))
    assert {(0, IGNORE), (1, 1), (2, 2), (3, IGNORE), (3, 3)} <= kinds and got.dtype == torch.int64
    even = torch.zeros(1, 2, 1, 1)                                               # confidence 1/2 and no more
    assert sim.pseudo_labels(even, torch.tensor([0.5, 0])).item() == IGNORE      # strictly above
    assert sim.pseudo_labels(even, torch.tensor([0.499, 0.5])).item() == 0
    runner_up = torch.tensor([1.0, 0]).view(1, 2, 1, 1)                          # 0.73 and 0.27
    assert sim.pseudo_labels(runner_up, torch.tensor([0.9, 0.1])).item() == IGNORE


@pytest.mark.parametrize(("prediction", "pseudo", "expected"), [
    (3, 3, 3), (3, 5, 5), (5, 3, 3), (0, 5, 5), (3, 0, 0), (3, IGNORE, 3), (0, IGNORE, 0), (IGNORE, 5, 5), (IGNORE, 0, 0),
    (IGNORE, IGNORE, IGNORE)])
def test_all_combinations_of_eq_11(prediction, pseudo, expected):
    got = sim.augmented_label_map(torch.tensor([[[prediction, 1]]]), torch.tensor([[[pseudo, IGNORE]]]))
    assert got.tolist() == [[[expected, 1]]] and got.dtype == torch.int64


# ------------------------------------------------------------------------------------------- golden numbers


def normal(seed, *shape):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


MAP = torch.tensor([[[0, 0, 1, 2, 2], [0, 1, 1, IGNORE, 2], [2, IGNORE, 2, 2, 0]]])
LARGE = torch.from_numpy(np.random.default_rng(9).integers(0, 4, (1, 5, 9)))
LARGE[LARGE == 3] = IGNORE
LOGITS, FEAT = normal(0, 1, 3, 3, 5), normal(1, 1, 4, 3, 5)


def written(store, classes, slots, *limit):
    bank = sim.FeatureBank(classes, slots, 4).double()
    store(FEAT, MAP, bank, *limit)
    return bank.features


def bank_of(samples):
    bank = sim.FeatureBank(list(samples), 3, 4).double()
    for k, rows in samples.items():
        for row in rows:
            bank.write(k, row)
    return bank


STUFF_BANK, THINGS_BANK = {0: normal(6, 2, 4), 1: normal(7, 3, 4)}, {2: normal(8, 3, 4)}
CELLS = [0.28286439881249437, 0.2160081079142984, 0.39265284922070287, 0.034504524281164003]            # class 0's mean
FIRST = [-0.20060658065408737, -0.7917621192038847, 0.356338677745544, 0.21905265988124817]      # class 2's largest region's
GOLDEN = {                                             # computed once by the loops above, from the paper
    "Eq. (1), label of the grid's size": (lambda: sim.segmentation_loss(LOGITS, MAP), 1.1045728264529513),
    "Eq. (1), label of the image's size": (lambda: sim.segmentation_loss(LOGITS, LARGE), 1.4066486463465557),
    "Eq. (2)": (lambda: sim.adversarial_loss(normal(3, 1, 1, 2, 2)), 0.9026870866810313),
    "Eq. (3)": (lambda: sim.discriminator_loss(normal(2, 1, 1, 2, 2), normal(3, 1, 1, 2, 2)), 1.5310235740962062),
    "Eq. (4)": (lambda: sim.correct_label_map(LOGITS, MAP),
                [[[0, 0, 255, 2, 255], [0, 1, 255, 255, 2], [255, 255, 2, 2, 255]]]),
    "A of Eq. (5)": (lambda: sim.masked_mean(FEAT[0], MAP[0] == 0), CELLS),
    "S of Eq. (5)": (lambda: written(sim.store_stuff, [0], 2), [[CELLS, [0.0] * 4]]),
    "Eq. (6)": (lambda: sim.stuff_loss(FEAT, MAP, bank_of(STUFF_BANK)), 1.2591279675755604),
    "T of Eq. (7)": (lambda: sim.connected_regions(MAP[0], 2).nonzero(),                             # region, row, column
                     [[0, 0, 3], [0, 0, 4], [0, 1, 4], [0, 2, 2], [0, 2, 3], [1, 2, 0]]),
    "Algorithm 1": (lambda: written(sim.store_instances, [2], 2, 1), [[FIRST, [0.0] * 4]]),
    "min of Eq. (8)": (lambda: torch.stack(sim.nearest_sample(normal(4, 1, 4), normal(5, 3, 4))),
                       [[0.8626425252993261], [0]]),
    "Eq. (8)": (lambda: sim.instance_loss(FEAT, MAP, bank_of(THINGS_BANK)), 0.8997090091353299),
    "Eq. (8), z = 1": (lambda: sim.instance_loss(FEAT, MAP, bank_of(THINGS_BANK), 1), 1.0061720101409932),
    "Sec. 6.2": (lambda: sim.class_thresholds(torch.tensor([[6, 8, 2, 1, 7, 7, 4, 1, 7, 4], [0] * 10, [0] * 9 + [5]])),
                 [0.4, 0.9, 0.9]),
    "Eq. (9)": (lambda: sim.pseudo_labels(LOGITS, torch.tensor([0.5, 0.6, 0.4])),
                [[[0, 255, 0, 255, 1], [255, 255, 0, 2, 2], [255, 2, 2, 2, 2]]]),
    "Eq. (11)": (lambda: sim.augmented_label_map(LOGITS.argmax(dim=1), MAP),
                 [[[0, 0, 1, 2, 2], [0, 1, 1, 2, 2], [2, 2, 2, 2, 0]]]),
}


@pytest.mark.parametrize("equation", GOLDEN)
def test_golden_numbers(equation):
    compute, expected = GOLDEN[equation]
    torch.testing.assert_close(compute().double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


# --------------------------------------------------------------------------------------------- configuration


def test_defaults_are_the_papers():
    cfg = sim.Config()
    assert (cfg.lambda_seg, cfg.lambda_adv, cfg.lambda_ci, cfg.lambda_D) == (1, 0.001, 0.01, 1)
    assert (cfg.w, cfg.z, cfg.cap, Options().backbone, cfg.ssl) == (50, 10, 0.9, "resnet101", True)
    assert (Options().source, Options().target, Options().crop) == ("gta5", "cityscapes", None)
    assert (cfg.lr, cfg.momentum, cfg.nesterov, cfg.weight_decay) == (2.5e-4, 0.9, True, 5e-4)
    assert (cfg.lr_discriminator, cfg.beta1, cfg.beta2) == (1e-4, 0.9, 0.99)
    assert (sim.SIZES["gta5"], sim.SIZES["synthia"], sim.SIZES["cityscapes"]) == ((1280, 720), (1280, 760), (1024, 512))
    given = {field.name: field.metadata["paper"] for field in dataclasses.fields(sim.Config)}
    assert {name for name, paper in given.items() if paper is None} == {"iterations", "batch_size"}
    for name, paper in given.items():                                            # None: automatic, see SIZES
        assert getattr(cfg, name) in (paper, None) or paper is None, name


def test_departures_are_short_and_numbered():
    entries = re.split(r"\n *(\d+)\. ", sim.__doc__[sim.__doc__.index("Departures:"):])
    assert list(map(int, entries[1::2])) == list(range(1, len(entries[1::2]) + 1))
    assert all(entry.rstrip().count("\n") < 2 and re.match("Eqs?\\.|Sec\\.|Table|Published", entry) for entry in entries[2::2])


def test_refusals(tmp_path, capsys):
    for wrong in (dict(source_size=Size(64, 31)), dict(target_size=Size(31, 64)), dict(crop=Size(31, 32))):
        with pytest.raises(UserError, match="too small for the discriminator"):
            sim.check(sim.Config(), Options(**wrong))
    with pytest.raises(UserError, match="no-nesterov"):
        sim.check(sim.Config(momentum=0.0), Options())
    for wrong, message in ((["--source", "cityscapes"], "--source and --target are both"),
                           (["--target-labels"], "--stage step1"), (["--no-ssl", "--stage", "step2"], "the stages are step1"),
                           (["--crop", "1280x514"], "--crop 1280x514 is larger"), (["--crop", "64x31"], "too small"),
                           (["--momentum", "0"], "no-nesterov")):
        with pytest.raises(SystemExit):
            sim.main(["--runs", str(tmp_path / "runs"), *wrong])
        assert message in capsys.readouterr().err and not (tmp_path / "runs").exists()
    for options in (dict(), dict(crop=Size(32, 32)), dict(source_size=Size(32, 32), target_size=Size(33, 32))):
        sim.check(sim.Config(), Options(**options))
    sim.check(sim.Config(momentum=0.0, nesterov=False), Options())


# ------------------------------------------------------------------------------------------------- the steps


class Tiny(nn.Module):
    """Stride 8, six features, four classes."""

    num_classes, feat_channels = 4, 6

    def __init__(self):
        super().__init__()
        self.encoder, self.head = nn.Conv2d(3, 6, 3, stride=8, padding=1), nn.Conv2d(6, 4, 1)

    def forward(self, x):
        feat = self.encoder(x).tanh()
        return feat, self.head(feat)

    def parameter_groups(self, lr):
        return [{"params": self.encoder.parameters(), "lr": lr}, {"params": self.head.parameters(), "lr": 10 * lr}]


class FakeRun:
    """What train_step uses of a run; in float64."""

    def __init__(self, batches):
        self.batches, self.losses = batches, []

    def seed(self, *names):
        torch.manual_seed(7)

    def place(self, module):
        return module.double()

    def autocast(self):
        return contextlib.nullcontext()

    def stage(self, name, iterations, state, source, target, batch_size, note):
        self.called, self.state = (name, iterations, batch_size, note), state
        yield from ((it, *batch) for it, batch in enumerate(self.batches))

    def report(self, **losses):
        self.losses.append({name: loss.item() for name, loss in losses.items()})


def enlarged(logits):
    return nn.functional.interpolate(logits, (32, 64), mode="bilinear", align_corners=True)


def reference(step, cfg, model, D, stuff, things, batches):
    """Eqs. (12) and (13), with SGD and Adam written out. Returns: reported losses, last gradients of G and of D."""
    parts = [(list(model.encoder.parameters()), cfg.lr), (list(model.head.parameters()), 10 * cfg.lr)]
    G, weights = [(p, lr) for ps, lr in parts for p in ps], list(D.parameters())
    v, m, s = [0] * len(G), [0] * len(weights), [0] * len(weights)
    reported = []
    for t, ((x_s, y_s), (x_t, _, *y_hat)) in enumerate(batches, start=1):
        (feat_s, logits_s), (feat_t, logits_t) = model(x_s), model(x_t)
        prob_s, prob_t = (enlarged(z).softmax(dim=1) for z in (logits_s, logits_t))
        correct, predicted = y_s[:, 4::8, 4::8].clone(), logits_t.argmax(dim=1)  # of 8 pixels the fifth: floor(8 / 2)
        correct[logits_s.argmax(dim=1) != correct] = IGNORE
        sim.store_stuff(feat_s, correct, stuff)                                  # stored before the target is matched
        sim.store_instances(feat_s, correct, things, cfg.z)
        losses = {"seg_s": sim.segmentation_loss(logits_s, y_s)}
        if step == 2:
            losses["seg_t"] = sim.segmentation_loss(logits_t, y_hat[0])
            pseudo = y_hat[0][:, 4::8, 4::8]
            predicted = torch.where(pseudo == IGNORE, predicted, pseudo)
        losses |= {"adv": -(1 - D(prob_t).sigmoid()).log().mean(), "stuff": sim.stuff_loss(feat_t, predicted, stuff),
                   "things": sim.instance_loss(feat_t, predicted, things, cfg.z)}
        loss_D = -D(prob_t.detach()).sigmoid().log().mean() - (1 - D(prob_s.detach()).sigmoid()).log().mean()
        total = cfg.lambda_seg * (losses["seg_s"] + losses.get("seg_t", 0)) + cfg.lambda_adv * losses["adv"] \
            + cfg.lambda_ci * (losses["stuff"] + losses["things"])
        grad_G = torch.autograd.grad(total, [p for p, _ in G], retain_graph=True)
        grad_D = torch.autograd.grad(cfg.lambda_D * loss_D, weights)
        reported.append({name: loss.item() for name, loss in (losses | {"D": loss_D}).items()})
        with torch.no_grad():
            for i, ((p, lr), grad) in enumerate(zip(G, grad_G)):
                g = grad + cfg.weight_decay * p
                v[i] = cfg.momentum * v[i] + g
                p -= lr * (g + cfg.momentum * v[i])                              # Nesterov
            for i, (p, g) in enumerate(zip(weights, grad_D)):
                m[i], s[i] = cfg.beta1 * m[i] + (1 - cfg.beta1) * g, cfg.beta2 * s[i] + (1 - cfg.beta2) * g * g
                p -= cfg.lr_discriminator * m[i] / (1 - cfg.beta1 ** t) / ((s[i] / (1 - cfg.beta2 ** t)).sqrt() + 1e-8)
    return reported, grad_G, grad_D


@pytest.mark.parametrize("step", [1, 2])
def test_a_step_is_eq_12_or_13(step):
    cfg = sim.Config(lambda_seg=0.7, lambda_adv=0.3, lambda_ci=0.5, lambda_D=0.6, z=2, lr=0.01, weight_decay=0.03,
                     lr_discriminator=0.002, beta1=0.8, momentum=0.7, iterations=70, batch_size=5)
    torch.manual_seed(0)
    models = [Tiny().double(), Tiny().double()]
    models[1].load_state_dict(models[0].state_dict())
    batches = []
    for it in range(2):
        x_s, x_t = random(2, 3, 32, 64, seed=it), random(2, 3, 32, 64, seed=10 + it) + 0.3
        with torch.no_grad():                                                    # part of the pixels is predicted correctly
            y_s = models[0](x_s)[1].argmax(dim=1).repeat_interleave(8, 1).repeat_interleave(8, 2)
        wrong = labels(2, 32, 64, K=4, seed=it)
        y_s = torch.where(labels(2, 32, 64, K=3, seed=20 + it, ignored=0) == 0, wrong, y_s)
        y_hat = labels(2, 32, 64, K=4, seed=30 + it, ignored=0.6)
        batches.append(((x_s, y_s), (x_t, torch.ones_like(y_s), *[y_hat] * (step == 2))))
    banks = [(sim.FeatureBank([0, 2], 3, 6).double(), sim.FeatureBank([1, 3], 5, 6).double()) for _ in models]
    torch.manual_seed(7)
    D = sim.Discriminator(4).double()
    expected, grad_G, grad_D = reference(step, cfg, models[1], D, *banks[1], batches)
    run = FakeRun(batches)
    sim.train_step(run, cfg, step, models[0], *banks[0], None, None, {"of": step})
    assert run.called == (f"step{step}", 70, 5, {"of": step}) and len(run.losses) == 2
    for got, wanted in zip(run.losses, expected):
        assert got.keys() == wanted.keys() and got == pytest.approx(wanted, rel=1e-9)
    assert run.losses[0]["stuff"] > 0 and run.losses[0]["things"] > 0            # matched in the first iteration
    same = dict(rtol=1e-8, atol=1e-12)
    for ours, theirs in [(models[0], models[1]), (run.state["D"], D), *zip(*banks)]:
        for key, value in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[key], value, **same)
    for p, g in [*zip(models[0].parameters(), grad_G), *zip(run.state["D"].parameters(), grad_D)]:
        torch.testing.assert_close(p.grad, g, **same)
    in_state = [value for value in run.state.values() if isinstance(value, nn.Module)]
    assert {id(value) for value in in_state} == {id(value) for value in (models[0], *banks[0], run.state["D"])}
    assert sum(isinstance(value, torch.optim.Optimizer) for value in run.state.values()) == 2


def arguments(city, runs, *more):
    small = "--backbone resnet18 --init none --source-size 64x32 --target-size 64x32 --workers 0 --log-every 1 --device cpu"
    return ["--data", str(city), "--runs", str(runs), *small.split(), "--iterations", "3", *more]


def contents(dataset):
    """What a data set gives to a stage: images, sizes of evaluation and training items, augmentation, maps, labels."""
    item, training_item = dataset[0], dataset[0, 5]
    return {"images": [str(pair.image) for pair in dataset.pairs], "size": tuple(item[0].shape[1:]),
            "cropped": tuple(training_item[0].shape[1:]), "augment": dataset.augment, "maps": dataset.maps,
            "labelled": [bool((label != IGNORE).any()) for label in (item[1], training_item[1])],
            "transformed": dataset.transform is not None}


def batch_norm(model):
    """(in the encoder, elsewhere): sets of (uses running statistics, is trained)."""
    kinds = {True: set(), False: set()}
    for name, m in model.named_modules():
        if isinstance(m, nn.BatchNorm2d):
            kinds[name.startswith("encoder.")].add((not m.training, m.weight.requires_grad))
    return kinds[True], kinds[False]


def test_what_each_stage_receives(city, tmp_path, monkeypatch):
    data = tmp_path / "data"
    shutil.copytree(city, data)
    for pair in find_pairs(data, "gta5")[:2]:                                    # 6 of the source, 8 and 3 of the target
        pair.image.unlink()
        pair.label.unlink()
    settings = ["--data", str(data), *"--source-size 96x56 --target-size 80x40 --crop 64x32 --iterations 3 --lr 0.002 "
             "--lr-discriminator 0.0003 --lambda-adv 0.02 --lambda-ci 0.03 --w 7 --z 2 --batch-size 2 --seed 3".split()]
    steps, labelled = [], []

    def weights(model):
        return {key: value.clone() for key, value in model.state_dict().items()}

    def train_step(run, cfg, step, model, stuff, things, source, target, note=None, _train=sim.train_step):
        steps.append({"step": step, "cfg": cfg, "begin": weights(model), "batch_norm": batch_norm(model),
                      "training": model.training, "banks": [(bank.slots, int(bank.written.sum())) for bank in (stuff, things)],
                      "source": contents(source), "target": contents(target)})
        _train(run, cfg, step, model, stuff, things, source, target, note)
        steps[-1]["end"] = weights(model)

    def write_pseudo_labels(run, cfg, model, target, folder, _write=sim.write_pseudo_labels):
        labelled.append({"steps": len(steps), "weights": weights(model), "target": contents(target), "folder": folder})
        return _write(run, cfg, model, target, folder)

    def same(a, b):
        return all(torch.equal(value, b[key]) for key, value in a.items())

    monkeypatch.setattr(sim, "train_step", train_step)
    monkeypatch.setattr(sim, "write_pseudo_labels", write_pseudo_labels)
    sim.main([*arguments(city, tmp_path, "--freeze-bn", "affine"), *settings])
    sim.main([*arguments(city, tmp_path, "--stage", "step1", "--target-labels", "--tag", "up"), *settings])
    one, two, upper = steps[:3]

    def images(domain, split="train"):
        return [str(pair.image) for pair in find_pairs(data, domain, split)]
    augment = Augment(crop=Size(64, 32))                                         # no flip, no jitter, no random scale
    source = {"images": images("gta5"), "size": (56, 96), "cropped": (32, 64), "augment": augment, "transformed": False,
              "labelled": [True, True], "maps": []}
    target = source | {"images": images("cityscapes"), "size": (40, 80), "labelled": [False, False]}
    folder = tmp_path / "sim-gta5/pseudo_labels"
    assert (len(source["images"]), len(target["images"]), len(images("cityscapes", "val"))) == (6, 8, 3)
    assert [step["step"] for step in steps[:3]] == [1, 2, 1]
    assert one["source"] == two["source"] == source
    assert one["target"] == target and two["target"] == target | {"maps": [folder]}
    assert upper["source"] == target | {"labelled": [True, True]} and upper["target"] == target

    assert same(one["begin"], two["begin"]) and same(one["begin"], upper["begin"]) and not same(one["begin"], one["end"])
    (labelling,) = labelled
    assert labelling["steps"] == 1 and same(labelling["weights"], one["end"])
    assert labelling["target"] == target and labelling["folder"] == folder
    assert one["batch_norm"] == two["batch_norm"] == ({(False, False)}, set())   # batch statistics, fixed affine parameters
    assert upper["batch_norm"] == ({(False, True)}, set()) and all(step["training"] for step in steps)
    assert all(step["banks"] == [(7, 0), (14, 0)] for step in steps)

    for step, lambda_adv, lambda_ci in ((one, 0.02, 0.03), (two, 0.02, 0.03), (upper, 0, 0)):
        cfg = step["cfg"]
        assert (cfg.lambda_seg, cfg.lambda_adv, cfg.lambda_ci, cfg.lambda_D) == (1, lambda_adv, lambda_ci, 1)
        assert (cfg.lr, cfg.lr_discriminator, cfg.iterations, cfg.batch_size, cfg.z) == (0.002, 0.0003, 3, 2, 2)

    # Each step's last model on the target's validation images at the target's size.
    test = sim.SegmentationDataset(find_pairs(data, "cityscapes", "val"), "cityscapes", class_list("gta5"), Size(80, 40))
    for run, stages in (("sim-gta5", [one, two]), ("sim-gta5-up", [upper])):
        results = json.loads((tmp_path / run / "results.json").read_text())
        assert list(results) == [f"step{step['step']}" for step in stages]
        for step in stages:
            saved = torch.load(tmp_path / run / f"step{step['step']}.pt", weights_only=True)
            assert saved["iteration"] == 3 and same(step["end"], saved["state"]["model"])
            model = build_model("v2", "resnet18", 19, "none")
            model.load_state_dict(step["end"])
            batches = [(image[None], label[None]) for image, label, _ in (test[k] for k in range(3))]
            matrix = metrics.evaluate(model, batches, 19, "cpu")
            assert matrix.tolist() == results[f"step{step['step']}"]["single-scale"]["matrix"]


def test_step_2_learns_from_step_1(city, tmp_path, monkeypatch):
    started, augmented, matched = {}, [], {1: [], 2: []}

    def train_step(run, cfg, step, model, stuff, things, *data, _train=sim.train_step):
        begin = {key: value.clone() for key, value in model.state_dict().items()}
        started[step] = begin, int(stuff.written.sum() + things.written.sum()), model.training
        _train(run, cfg, step, model, stuff, things, *data)

    def augment(prediction, pseudo, _augment=sim.augmented_label_map):
        augmented.append((prediction, pseudo, _augment(prediction, pseudo)))
        return augmented[-1][2]

    def match(loss):
        def spy(feat, label_map, *rest):
            matched[max(started)].append(label_map)
            return loss(feat, label_map, *rest)
        return spy

    def write_pseudo_labels(run, cfg, model, *rest, _write=sim.write_pseudo_labels):
        return _write(run, cfg, model.train(), *rest)                            # the mode after --from
    monkeypatch.setattr(sim, "train_step", train_step)
    monkeypatch.setattr(sim, "write_pseudo_labels", write_pseudo_labels)
    monkeypatch.setattr(sim, "augmented_label_map", augment)
    monkeypatch.setattr(sim, "stuff_loss", match(sim.stuff_loss))
    monkeypatch.setattr(sim, "instance_loss", match(sim.instance_loss))
    sim.main(arguments(city, tmp_path, "--lr", "0.0005", "--seed", "1"))
    folder = tmp_path / "sim-gta5"
    first = torch.load(folder / "step1.pt", weights_only=True)["state"]["model"]

    # Step 2 starts again from the initial weights, with empty banks.
    assert all(torch.equal(started[2][0][key], started[1][0][key]) for key in first)
    assert not torch.equal(first["encoder.conv1.weight"], started[2][0]["encoder.conv1.weight"])
    assert started[1][1:] == started[2][1:] == (0, True)

    # Thresholds and pseudo labels, from all confidences of step 1's model.
    model = build_model("v2", "resnet18", 19, "none").eval()
    model.load_state_dict(first)
    data = sim.SegmentationDataset(find_pairs(city, "cityscapes", labels=False), "cityscapes", class_list("gta5"), Size(64, 32))
    outputs = []
    for image, _, name in (data[i] for i in range(len(data))):
        with torch.no_grad():
            logits = enlarged(model(image[None])[1])
        outputs.append((name, logits, *logits.softmax(dim=1).max(dim=1)))
    confidence, predicted = (torch.cat(parts) for parts in list(zip(*outputs))[2:])
    (line,) = [line for line in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if "thresholds" in line]
    logged = torch.tensor([line["thresholds"][name] for name in class_list("gta5").names])
    for k in range(19):
        ranked = confidence[predicted == k].sort().values.tolist()
        median = min(ranked[(len(ranked) - 1) // 2], 0.9) if ranked else 0.9
        assert median - 1 / sim.BINS - 1e-6 <= logged[k] <= median + 1e-6
    pngs = set()
    for name, logits, c, _ in outputs:
        png = torch.from_numpy(np.array(Image.open(folder / f"pseudo_labels/{name}.png"))).long()
        expected = sim.pseudo_labels(logits, logged)[0]
        certain = (c[0] - logged[logits.argmax(dim=1)[0]]).abs() > 1e-6
        assert torch.equal(png[certain], expected[certain]) and certain.float().mean() > 0.9
        pngs.add(tuple(png[4::8, 4::8].flatten().tolist()))
    assert len(data) == len(list(folder.glob("pseudo_labels/**/*.png"))) and len(predicted.unique()) > 1
    assert 0 < sum(k != IGNORE for png in pngs for k in png) < len(pngs) * 32            # some have labels, some have none

    # Eq. (11) is used only in step 2, with the files on the grid; both losses get its result.
    assert len(augmented) == 3 and len(matched[1]) == len(matched[2]) == 6
    for n, (prediction, pseudo, result) in enumerate(augmented):
        assert pseudo.shape == prediction.shape == (1, 4, 8) and tuple(pseudo.flatten().tolist()) in pngs
        assert matched[2][2 * n] is result and matched[2][2 * n + 1] is result and prediction.max() < 19
    assert any(not torch.equal(prediction, result) for prediction, _, result in augmented)


class Killed(BaseException):
    """Like a real kill, it is not caught."""


def test_a_run_killed_before_its_pictures_draws_them_after_resume(city, tmp_path, monkeypatch):
    sim.main(arguments(city, tmp_path, "--tag", "undisturbed"))
    pictures = {step: (tmp_path / f"sim-gta5-undisturbed/step{step}-matches.png").read_bytes() for step in (1, 2)}
    results, folder, kills = (tmp_path / "sim-gta5-undisturbed/results.json").read_text(), tmp_path / "sim-gta5-killed", []

    def draw(run, cfg, step, *rest, _draw=sim.draw_matches):
        if step not in kills:
            kills.append(step)
            raise Killed
        _draw(run, cfg, step, *rest)
    monkeypatch.setattr(sim, "draw_matches", draw)
    for step in (1, 2):
        with pytest.raises(Killed):
            sim.main(arguments(city, tmp_path, "--tag", "killed"))
        assert kills[-1] == step and not (folder / f"step{step}-matches.png").exists()
        trained = torch.load(folder / f"step{step}.pt", weights_only=True)
        assert trained["iteration"] == 3 and not (folder / "last.pt").exists()
    sim.main(arguments(city, tmp_path, "--tag", "killed"))
    assert {step: (folder / f"step{step}-matches.png").read_bytes() for step in pictures} == pictures
    assert len(set(pictures.values())) == 2 and (folder / "results.json").read_text() == results
