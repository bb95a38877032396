"""The diagnosis of runs: its measures by hand, and its results for two very short runs."""

from __future__ import annotations

import json

import diagnose
import numpy as np
import pytest
import torch
from PIL import Image

import cag
import fada
from common import data, layouts, page
from common.data import IGNORE
from common.deeplab import upsample

SHORT = ["--backbone", "resnet18", "--init", "none", "--source-size", "64x32", "--target-size", "64x32", "--workers", "0",
         "--crop", "64x32", "--device", "cpu"]


def test_label_matrix():
    label = torch.tensor([[0, 0, 1, IGNORE]], dtype=torch.uint8)
    pseudo_label = torch.tensor([[0, IGNORE, 0, 1]], dtype=torch.uint8)
    assert diagnose.label_matrix(label, pseudo_label, 2).tolist() == [[1, 0, 1], [1, 0, 0]]


def test_center_distances():
    feat = torch.tensor([[0.0, 1.0], [3.0, 4.0], [9.0, 9.0], [0.0, 3.0]]).T[None, :, None]        # (1, 2, 1, 4)
    label = torch.tensor([[[0, 1, IGNORE, 2]]])
    centers = torch.tensor([[0.0, 0.0], [0.0, 4.0], [torch.nan, torch.nan]])
    pixels, own, other, nearest = diagnose.center_distances(feat, label, centers).tolist()
    assert pixels == nearest == [1, 1, 0] and own == pytest.approx([1, 3, 0]) and other == pytest.approx([3, 5, 0])
    label = torch.tensor([[[1, IGNORE, IGNORE, 0]]])                        # both nearer to the other's centre
    pixels, own, other, nearest = diagnose.center_distances(feat, label, centers).tolist()
    assert own == pytest.approx([3, 3, 0]) and other == pytest.approx([1, 1, 0]) and nearest == [0, 0, 0]


def test_a_wrong_pixel_is_drawn_pale():
    classes, road, sidewalk = data.class_list("gta5"), (128, 64, 128), (244, 35, 232)
    picture = diagnose.drawn(torch.tensor([[0, 1, 1]]), torch.tensor([[0, 0, IGNORE]]), classes)
    assert picture.tolist() == [[[*road], [192 + value // 4 for value in sidewalk], [*sidewalk]]]


def test_two_runs(city, tmp_path, monkeypatch, capsys):
    runs, common = tmp_path / "runs", ["--data", str(city), "--seed", "3", *SHORT]
    cag.main([*common, "--runs", str(runs), "--tag", "toy-cag-3", "--source-iterations", "2", "--warmup-epochs", "0.25",
              "--stage-epochs", "0.25", "--K", "1", "--margin", "0.02"])
    fada.main([*common, "--runs", str(runs), "--tag", "toy-fada-3", "--source-iterations", "1", "--adversarial-iterations", "1",
               "--no-distill", "--batch-size", "2"])
    argv = ["diagnose.py", *map(str, sorted(runs.iterdir())), "--data", str(city), "--images", "3", "--root", str(tmp_path)]
    monkeypatch.setattr("sys.argv", argv)
    diagnose.main()
    path = tmp_path / "docs/results/toy/diagnosis.json"
    diagnosis, K = json.loads(path.read_text()), 19
    assert list(diagnosis) == ["cag-cag-3", "fada-fada-3"]
    labelled = sum(int((data.read_label(pair.label, "cityscapes", data.class_list("gta5")) != IGNORE).sum())
                   for pair in layouts.find_pairs(city, "cityscapes", "train"))
    labels = diagnosis["cag-cag-3"]["labels"]
    assert list(labels) == ["stage1/anchor_labels", "stage1/probability_labels"] and not diagnosis["fada-fada-3"]["labels"]
    for matrix in labels.values():                                          # every labelled pixel is counted once
        assert len(matrix) == K and {len(row) for row in matrix} == {K + 1} and sum(map(sum, matrix)) == labelled
    note = next(json.loads(line) for line in open(runs / "cag-gta5-toy-cag-3/log.jsonl") if "active_percent" in line)
    coverage = page.label_quality(labels["stage1/anchor_labels"])[1]
    assert 0 < coverage < 100 and coverage == pytest.approx(note["active_percent"]["anchor_labels"]["all"], abs=10)
    features = diagnosis["cag-cag-3"]["features"]
    assert [sorted(entry.keys() - {"class center distance"}) for entry in features.values()] == [
        [], ["discriminator", "stage1, before"], ["stage1, after"]]
    assert list(features) == ["source", "warmup", "stage1"]
    assert list(diagnosis["fada-fada-3"]["features"]) == ["source", "adversarial"]
    for entry in (*features.values(), *diagnosis["fada-fada-3"]["features"].values()):
        assert all(value > 0 for value in entry["class center distance"].values())
        assert all(0 <= value <= 1 for value in entry.get("discriminator", {}).values())
    diagnose.main()                                                         # a run is measured once
    assert capsys.readouterr().out.count("cag-cag-3:") == 1
    path.write_text(json.dumps(diagnosis | {"cag-cag-3": diagnosis["cag-cag-3"] | {"stages": ["source"]}}))
    diagnose.main()                                                         # again if more stages are finished
    assert "cag-cag-3:" in capsys.readouterr().out and json.loads(path.read_text()) == diagnosis
    checkpoint = runs / "cag-gta5-toy-cag-3/source.pt"
    monkeypatch.setattr("sys.argv", ["diagnose.py", "--margin", str(checkpoint), "--data", str(city)])
    diagnose.main()
    assert float(capsys.readouterr().out.split()[1]) > 0


def test_class_center_distance_and_discriminator_of_a_measured_model(city, tmp_path):
    """Both agree with the paper's functions on all pixels at once."""
    fada.main(["--data", str(city), *SHORT, "--runs", str(tmp_path), "--tag", "toy-fada-0", "--source-iterations", "1",
               "--adversarial-iterations", "1", "--no-distill", "--batch-size", "2"])
    config = json.loads((tmp_path / "fada-gta5-toy-fada-0/config.json").read_text())
    domains, path = diagnose.Domains(config, str(city), None, 3), tmp_path / "fada-gta5-toy-fada-0/adversarial.pt"
    measured = diagnose.measure(path, "fada", config, domains, {})
    model, state = diagnose.network(path, "fada", config, 19)
    D = fada.FineGrainedDiscriminator(model.feat_channels, 19)
    D.load_state_dict(state["D"])
    feats, labels, correct = [], [], []
    with torch.no_grad():
        for feat, _, label, _ in diagnose.passes(model, domains.target, config):
            feats.append(feat[0].flatten(1).T)
            labels.append(label.flatten())
            p = D(feat).softmax(dim=1)
            correct.append((p[:, 19:].sum(dim=1) > p[:, :19].sum(dim=1)).float())
    ccd = fada.class_center_distance(torch.cat(feats), torch.cat(labels)).nanmean().item()
    assert measured["class center distance"]["target"] == pytest.approx(ccd, rel=1e-9)
    assert measured["discriminator"]["target"] == pytest.approx(torch.cat(correct).mean().item(), abs=1e-6)
    diagnose.strip(str(tmp_path / "strip.png"), [path.parent], domains)                 # one column: no other run is given
    sheet = np.array(Image.open(tmp_path / "strip.png"))
    with torch.no_grad():
        image, label, *_ = domains.target[0]
        prediction = upsample(model(image[None])[1], label.shape).argmax(dim=1)[0]
    panel = diagnose.drawn(prediction, label, domains.classes)
    assert sheet.shape[1] == 256 + 20 and (sheet[30:30 + 128:4, 10:10 + 256:4] == panel).mean() > 0.99
