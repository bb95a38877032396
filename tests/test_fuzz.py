"""Random damage to images, labels, checkpoints, config.json and pseudo labels, through the scripts' real entry points.

Each start ends in success, and then with the result of undamaged files, or in one sentence: never in a traceback, a hang, or
another result. `make soak` does 5,000, `make test` a few of each kind."""

from __future__ import annotations

import random
import re
import shutil
import signal

import pytest
import torch
from starts import link_checkpoints
from test_faults import arguments, starts  # noqa: F401 (a fixture)

from common.layouts import find_pairs


def damaged(content: bytes, dice: random.Random) -> bytes:
    """The content with a bit turned, bytes lost, doubled, zeroed or replaced, or cut short."""
    at, length = dice.randrange(len(content)), dice.choice([1, 1, 2, 4, 16, 256])
    return dice.choice([
        lambda: content[:at] + bytes([content[at] ^ 1 << dice.randrange(8)]) + content[at + 1:],
        lambda: content[:at] + content[at + length:],
        lambda: content[:at] + content[at:at + length] + content[at:],
        lambda: content[:at] + bytes(len(content[at:at + length])) + content[at + length:],
        lambda: content[:at] + dice.randbytes(len(content[at:at + length])) + content[at + length:],
        lambda: content[:at],
    ])()


def table(text: str) -> list[str]:
    """The lines with scores."""
    return re.findall(r"^(?:mIoU|road|sky).*$", text, re.MULTILINE)


@pytest.fixture(scope="module")
def run(starts, city, tmp_path_factory):  # noqa: F811
    """A copy of the city, and a run of FADA that was stopped inside its last stage."""
    root = tmp_path_factory.mktemp("fuzz")
    shutil.copytree(city, root / "data")
    argv = arguments("fada", root / "data", root / "runs", "--distill-iterations", "5")
    start = starts.start("fada", argv)
    start.until("distill 1/5")
    start.kill(signal.SIGTERM)
    assert start.wait() == 128 + signal.SIGTERM
    assert (root / "runs/fada-gta5/last.pt").exists()
    shutil.copytree(root / "runs", root / "kept")
    return root, argv


@pytest.mark.parametrize(("kind", "share"), [("image", 0.25), ("label", 0.25), ("checkpoint", 0.2), ("config", 0.15),
                                             ("pseudo label", 0.15)])
def test_damaged_files_end_in_the_same_result_or_in_a_sentence(kind, share, run, starts, soak):  # noqa: F811
    root, argv = run
    folder, dice = root / "runs/fada-gta5", random.Random(kind)
    test = find_pairs(root / "data", "cityscapes", "val")
    evaluation = [*argv, "--eval", "--from", str(root / "kept/fada-gta5/source.pt")]
    path, line = {
        "image": (test[1].image, evaluation), "label": (test[1].label, evaluation),
        "checkpoint": (root / "damaged.pt", [*evaluation[:-1], str(root / "damaged.pt")]),
        "config": (folder / "config.json", argv),
        "pseudo label": (folder / f"pseudo_labels/{find_pairs(root / 'data', 'cityscapes', labels=False)[0].name}.png", argv),
    }[kind]
    if kind == "checkpoint":
        shutil.copy(root / "kept/fada-gta5/source.pt", path)
    good = path.read_bytes()

    def start():
        if line is argv:                                          # a run that goes on: from the same state each time
            shutil.rmtree(root / "runs")
            shutil.copytree(root / "kept", root / "runs", copy_function=link_checkpoints)
            path.write_bytes(content)
        status, text = starts.run("fada", line)
        end = folder / "distill.pt"
        return status, text, torch.load(end, weights_only=True)["state"] if line is argv and end.exists() else None

    content = good
    status, expected, final = start()
    assert status == 0, expected
    refused = 0
    for _ in range(int(5000 * share) if soak else 4):
        content = damaged(good, dice)
        path.write_bytes(content)
        status, text, state = start()
        assert status in (0, 2) and "Traceback" not in text, text
        if status == 2:
            assert text.count("error: ") == 1, text
            refused += 1
        else:
            assert table(text) == table(expected), text
            assert final is None or all(torch.equal(state["model"][key], final["model"][key]) for key in final["model"])
    path.write_bytes(good)
    assert refused, "no damage was noticed"
