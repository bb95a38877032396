"""Random damage to images, labels, checkpoints, config.json and pseudo labels, through the scripts' real entry points.

Each start ends with the result of undamaged files or with one sentence: never with a traceback, a hang or another result.
`make soak` runs 5,000 starts, `make test` a few per kind."""

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


def damaged(content: bytes, rng: random.Random) -> bytes:
    """The content with one bit flipped, or bytes removed, doubled, zeroed or replaced, or cut short."""
    start, length = rng.randrange(len(content)), rng.choice([1, 1, 2, 4, 16, 256])
    return rng.choice([
        lambda: content[:start] + bytes([content[start] ^ 1 << rng.randrange(8)]) + content[start + 1:],
        lambda: content[:start] + content[start + length:],
        lambda: content[:start] + content[start:start + length] + content[start:],
        lambda: content[:start] + bytes(len(content[start:start + length])) + content[start + length:],
        lambda: content[:start] + rng.randbytes(len(content[start:start + length])) + content[start + length:],
        lambda: content[:start],
    ])()


def table(text: str) -> list[str]:
    """The lines with scores."""
    return re.findall(r"^(?:mIoU|road|sky).*$", text, re.MULTILINE)


@pytest.fixture(scope="module")
def run(starts, city, tmp_path_factory):  # noqa: F811
    """A copy of the city, and a run of FADA that stopped in the middle of its last stage."""
    root = tmp_path_factory.mktemp("fuzz")
    shutil.copytree(city, root / "data")
    argv = arguments("fada", root / "data", root / "runs", "--distill-iterations", "5")
    start = starts.start("fada", argv)
    start.until("distill 1/5")
    start.kill(signal.SIGTERM)
    assert start.wait() == 128 + signal.SIGTERM
    assert (root / "runs/fada-gta5/last.pt").exists()
    shutil.copytree(root / "runs", root / "saved")
    return root, argv


@pytest.mark.parametrize(("kind", "share"), [("image", 0.25), ("label", 0.25), ("checkpoint", 0.2), ("config", 0.15),
                                             ("pseudo label", 0.15)])
def test_damaged_files_end_in_the_same_result_or_in_a_sentence(kind, share, run, starts, soak):  # noqa: F811
    root, argv = run
    folder, rng = root / "runs/fada-gta5", random.Random(kind)
    test = find_pairs(root / "data", "cityscapes", "val")
    evaluation = [*argv, "--eval", "--from", str(root / "saved/fada-gta5/source.pt")]
    path, command = {
        "image": (test[1].image, evaluation), "label": (test[1].label, evaluation),
        "checkpoint": (root / "damaged.pt", [*evaluation[:-1], str(root / "damaged.pt")]),
        "config": (folder / "config.json", argv),
        "pseudo label": (folder / f"pseudo_labels/{find_pairs(root / 'data', 'cityscapes', labels=False)[0].name}.png", argv),
    }[kind]
    if kind == "checkpoint":
        shutil.copy(root / "saved/fada-gta5/source.pt", path)
    intact = path.read_bytes()

    def start():
        if command is argv:                                       # a run that resumes, always from the same state
            shutil.rmtree(root / "runs")
            shutil.copytree(root / "saved", root / "runs", copy_function=link_checkpoints)
            path.write_bytes(content)
        status, text = starts.run("fada", command)
        end = folder / "distill.pt"
        return status, text, torch.load(end, weights_only=True)["state"] if command is argv and end.exists() else None

    content = intact
    status, expected, final = start()
    assert status == 0, expected
    refused = 0
    for _ in range(int(5000 * share) if soak else 4):
        content = damaged(intact, rng)
        path.write_bytes(content)
        status, text, state = start()
        assert status in (0, 2) and "Traceback" not in text, text
        if status == 2:
            assert text.count("error: ") == 1, text
            refused += 1
        else:
            assert table(text) == table(expected), text
            assert final is None or all(torch.equal(state["model"][key], final["model"][key]) for key in final["model"])
    path.write_bytes(intact)
    assert refused, "no damage was noticed"
