from __future__ import annotations

import json
import math
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from common.data import ClassList
from common.metrics import confusion_matrix, evaluate, iou, mean_iou, percent, predict, print_scores, print_table, summary

TRAIN_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)


class TinyNet(nn.Module):
    """Stride 4, so that logits are coarser than the image; batch norm, so that the mode matters."""

    def __init__(self, num_classes: int = 5, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 4, stride=4), nn.BatchNorm2d(8)
        self.head, self.dtype = nn.Conv2d(8, num_classes, 3, padding=1), dtype

    def forward(self, x):
        feat = self.bn(self.conv(x)).relu()
        return feat, (4 * self.head(feat)).to(self.dtype)


def upsampled(logits, size):
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=True)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return TinyNet()


def test_agrees_with_cityscapesscripts(tmp_path):
    evaluator = pytest.importorskip("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")
    rng = np.random.default_rng(0)
    args = evaluator.args
    args.evalInstLevelScore = False
    theirs, ours = evaluator.generateMatrix(args), torch.zeros(19, 19, dtype=torch.int64)
    # Label ids with ignored ones (0 unlabeled, 4 static, 29 caravan); 16 truly absent; 13 predicted, never labelled.
    labelled = [t for t in range(19) if t not in (13, 16)]
    label_ids = np.array([TRAIN_IDS[t] for t in labelled] + [0, 4, 29])
    for n in range(3):
        label = rng.choice(label_ids, size=(37, 53))
        guess = np.where((rng.random(label.shape) < 0.5) & np.isin(label, TRAIN_IDS), label,
                         rng.choice([TRAIN_IDS[t] for t in range(19) if t != 16], size=label.shape))
        files = [str(tmp_path / f"{kind}{n}.png") for kind in ("prediction", "label")]
        for file, ids in zip(files, (guess, label)):
            Image.fromarray(ids.astype(np.uint8)).save(file)
        evaluator.evaluatePair(*files, theirs, {}, {}, args)
        to_train = np.full(256, 255)
        to_train[list(TRAIN_IDS)] = range(19)
        ours += confusion_matrix(torch.tensor(to_train[guess]), torch.tensor(to_train[label]), 19)
    scores = {evaluator.id2label[i].name: evaluator.getIouScoreForLabel(i, theirs, args) for i in TRAIN_IDS}
    np.testing.assert_allclose(iou(ours).numpy(), list(scores.values()), rtol=0, atol=1e-6)
    assert math.isnan(scores["train"]) and scores["truck"] > 0 and scores["car"] == iou(ours)[13] == 0
    assert mean_iou(ours) == pytest.approx(evaluator.getScoreAverage(scores, args), abs=1e-6)


def test_three_classes_by_hand():
    label = torch.tensor([[0, 0, 0, 1], [1, 1, 2, 255]], dtype=torch.uint8)
    prediction = torch.tensor([[0, 0, 1, 1], [1, 2, 0, 99]])            # an ignored pixel's prediction may be anything
    matrix = confusion_matrix(prediction, label, 3)
    assert matrix.dtype == torch.int64 and matrix.tolist() == [[2, 1, 0], [0, 2, 1], [1, 0, 0]]
    assert iou(matrix).tolist() == [2 / 4, 2 / 4, 0 / 2]
    assert mean_iou(matrix) == pytest.approx(1 / 3) and mean_iou(matrix, (1, 2)) == 0.25


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_class_indices_in_few_bits_do_not_wrap_and_stay_as_they_are(dtype):
    label, prediction = torch.full((5,), 18, dtype=dtype), torch.full((5,), 17, dtype=dtype)
    assert confusion_matrix(prediction, label, 19)[18, 17] == 5
    assert label.tolist() == [18] * 5 and prediction.tolist() == [17] * 5


def test_everything_ignored_is_nan_without_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        matrix = confusion_matrix(torch.zeros(4, dtype=torch.int64), torch.full((4,), 255), 3)
        assert matrix.sum() == 0 and iou(matrix).isnan().all()
        assert math.isnan(mean_iou(matrix)) and math.isnan(mean_iou(matrix, present=True))
        assert math.isnan(mean_iou(matrix, []))


def test_absent_and_stray_classes():
    # Class 3 occurs nowhere; class 2 is predicted once and never labelled: 0 for the one mean, left out of the other.
    matrix = torch.tensor([[3, 0, 1, 0], [0, 4, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    assert mean_iou(matrix) == pytest.approx((0.75 + 1 + 0) / 3)
    assert mean_iou(matrix, present=True) == pytest.approx((0.75 + 1) / 2)
    assert mean_iou(matrix, (1, 2, 3), present=True) == 1 and math.isnan(mean_iou(matrix, (2, 3), present=True))


@pytest.mark.parametrize("prediction, label, message", [
    (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(3, 2, dtype=torch.int64), r"\(2, 3\).*\(3, 2\)"),
    (torch.full((2, 3), 5), torch.zeros(2, 3, dtype=torch.int64), r"6 labelled pixels.*0\.\.4"),
    (torch.full((2, 3), -1), torch.zeros(2, 3, dtype=torch.int64), "6 labelled pixels"),
    (torch.zeros(2, 3, dtype=torch.int64), torch.full((2, 3), 7), "6 labelled pixels"),
    (torch.full((2, 3), 256), torch.zeros(2, 3, dtype=torch.uint8), "6 labelled pixels"),
    (torch.full((2, 3), -256), torch.tensor([[255, 255, 0], [0, 0, 0]]), "4 labelled pixels"),
    (torch.zeros(2, 3, dtype=torch.uint8), torch.full((2, 3), 511), "6 labelled pixels"),
    (torch.full((2, 3), 255, dtype=torch.uint8), torch.zeros(2, 3, dtype=torch.int32), "6 labelled pixels"),
    (torch.full((2, 3), 2**40), torch.full((2, 3), -1), "6 labelled pixels"),
    (torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64), "float32"),
])
def test_impossible_input(prediction, label, message):
    with pytest.raises(ValueError, match=message):
        confusion_matrix(prediction, label, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_view_is_the_argmax_of_the_upsampled_logits(model, dtype):
    model.dtype = dtype
    image = torch.randn(2, 3, 32, 48).contiguous(memory_format=torch.channels_last)
    expected = upsampled(model.eval()(image)[1].float(), (61, 95)).argmax(dim=1)
    result = predict(model, image, (61, 95))
    assert result.dtype == torch.int64 and result.shape == (2, 61, 95) and torch.equal(result, expected)
    assert len(result.unique()) > 2


def test_scales_and_flip_against_a_plain_loop(model):
    model.eval()
    image, probs = torch.randn(2, 3, 32, 48), []
    for h, w in ((24, 36), (32, 48), (40, 60)):
        for mirror in (False, True):
            view = F.interpolate(image, (h, w), mode="bilinear", antialias=True)
            prob = upsampled(model(view.flip(-1) if mirror else view)[1], (61, 95)).softmax(dim=1)
            probs.append(prob.flip(-1) if mirror else prob)
    expected = torch.stack(probs).mean(dim=0)
    result = predict(model, image, (61, 95), scales=(0.75, 1, 1.25), flip=True)
    # Two classes may be equal within rounding: the chosen class has the highest mean, up to that.
    chosen = expected.gather(1, result[:, None])[:, 0]
    assert (expected.amax(dim=1) - chosen).max() < 1e-5
    for part in (probs[2], (probs[2] + probs[3]) / 2, expected - probs[0] / 6):   # each view changes something
        assert not torch.equal(result, part.argmax(dim=1))


def test_evaluate_sums_over_the_loader_at_the_labels_resolution(model):
    loader, expected = [], torch.zeros(5, 5, dtype=torch.int64)
    model.bn.running_mean.uniform_(-1, 1)
    for n, (batch, size) in enumerate([(1, (64, 96)), (2, (30, 40)), (1, (33, 97))]):
        image, label = torch.randn(batch, 3, 32, 48), torch.randint(0, 5, (batch, *size))
        label[:, : n * 8] = 255
        loader.append((image, label, ["name"] * batch))
        model.eval()
        prediction = upsampled(model(image)[1], size).argmax(dim=1)
        for t, p in zip(label.flatten().tolist(), prediction.flatten().tolist()):
            if t != 255:
                expected[t, p] += 1
    model.train()
    model.head.eval()                                                   # another mode, as frozen layers have
    state = {k: v.clone() for k, v in model.state_dict().items()}
    matrix = evaluate(model, loader, 5, "cpu")
    assert torch.equal(matrix, expected) and matrix.dtype == torch.int64
    assert model.training and model.bn.training and not model.head.training
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_evaluate_restores_the_mode_after_a_failure(model):
    with pytest.raises(ValueError, match=r"\(1, 8, 8\).*\(2, 8, 8\)"):
        evaluate(model, [(torch.randn(1, 3, 8, 8), torch.zeros(2, 8, 8, dtype=torch.int64))], 5, "cpu")
    assert model.training and model.bn.training
    with pytest.raises(ValueError, match="64 labelled pixels"):
        evaluate(model, [(torch.randn(1, 3, 8, 8), torch.full((1, 8, 8), 9))], 5, "cpu")


def test_scores_of_several_tests_side_by_side(capsys):
    classes = SimpleNamespace(names=("road", "sky", "wall"), means={"mIoU": (0, 1, 2), "mIoU*": (0, 1)})
    source = torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]])            # no wall
    stray = torch.tensor([[3, 0, 1], [0, 4, 0], [0, 0, 0]])             # a pixel taken for wall
    results = {"source only": summary(source, classes), "FADA": summary(stray, classes)}
    results = json.loads(json.dumps(results))                           # as a run reads them again
    assert results["source only"]["iou"] == {"road": 0.75, "sky": 0.8, "wall": None}
    assert percent(results["FADA"]) == {"mIoU": 58.33, "mIoU*": 87.5, "mIoU present": 87.5, "mIoU* present": 87.5}
    print_scores("IoU in percent", results)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["", "IoU in percent"] and set(lines[3]) == {"-"} and len(set(map(len, lines[2:]))) == 1
    assert [line.split() for line in lines[2:3] + lines[4:]] == [
        ["source", "only", "FADA"], ["road", "75.0", "75.0"], ["sky", "80.0", "100.0"], ["wall", "-", "0.0"],
        ["mIoU", "77.5", "58.3"], ["mIoU*", "77.5", "87.5"],
        ["mIoU", "present", "77.5", "87.5"], ["mIoU*", "present", "77.5", "87.5"]]


def test_what_is_not_defined_is_null_and_a_dash(capsys):
    """Labels of the second class only, and a mean over the third: no score, in results.json as in the table."""
    classes = ClassList(("a", "b", "c"), ((0, 0, 0),) * 3, (0, 1, 2), {"mIoU": (0, 1, 2), "mIoU*": (2,)})
    result = summary(torch.tensor([[0, 0, 0], [0, 5, 0], [0, 0, 0]]), classes)
    assert json.loads(json.dumps(result, allow_nan=False))["mIoU*"] is None
    assert list(result["iou"].values()) == [None, 1.0, None] and (result["mIoU"], result["mIoU* present"]) == (1.0, None)
    assert percent(result) == {"mIoU": 100.0, "mIoU present": 100.0}
    print_scores("scores", {"one": result})
    assert [line.split() for line in capsys.readouterr().out.splitlines()[4:]] == [
        ["a", "-"], ["b", "100.0"], ["c", "-"], ["mIoU", "100.0"], ["mIoU*", "-"], ["mIoU", "present", "100.0"],
        ["mIoU*", "present", "-"]]


def test_a_table_of_any_numbers(capsys):
    print_table("distances", {"a": [1.23456, None], "longer name": [float("nan"), 1000.0]}, ["x", "a row"], digits=3)
    assert capsys.readouterr().out.splitlines() == [
        "", "distances", "           a  longer name", "-" * 25, "x      1.235            -", "a row      -     1000.000"]
