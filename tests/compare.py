"""Whether two checkouts compute the same: `python tests/compare.py OTHER [SCRIPT ...]`, by hand, not part of the tests.

Runs each script with a few iterations per stage in this checkout and in OTHER, and compares every checkpoint's networks, every
pseudo label and map, and results.json, bit for bit. The flags are those of tests/test_faults.py here."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).parents[1]
sys.path[:0] = [str(HERE), str(HERE / "tests")]


def networks(path: Path) -> dict[str, torch.Tensor]:
    """Name -> tensor of everything in a stage's checkpoint except optimizers."""
    state = torch.load(path, weights_only=True)["state"]
    return {f"{key}.{name}": value for key, values in state.items() for name, value in values.items()
            if isinstance(value, torch.Tensor)}


def main(other: str, *scripts: str) -> None:
    from test_faults import FLAGS, arguments

    from common import toycity
    from common.cli import Size
    different = 0
    with tempfile.TemporaryDirectory() as folder:
        city = Path(folder, "city")
        toycity.render(city, seed=0, train=8, val=3, size=Size(64, 32))
        for script in scripts or FLAGS:
            runs = [Path(folder, f"{script}-{k}") for k in range(2)]
            processes = [subprocess.Popen([sys.executable, f"{script}.py", *arguments(script, city, run)], cwd=checkout,
                                          stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
                         for run, checkout in zip(runs, (HERE, Path(other)))]
            if any([process.wait() for process in processes]):
                raise SystemExit(f"{script}.py failed; its message stands above")
            results = [run / f"{script}-gta5/results.json" for run in runs]
            stages = [path.stem for path in sorted(results[0].parent.glob("*.pt"))
                      if "state" in torch.load(path, weights_only=True)]
            for stage in stages:
                one, two = (networks(path.parent / f"{stage}.pt") for path in results)
                same = one.keys() == two.keys() and all(torch.equal(one[k].nan_to_num(), two[k].nan_to_num()) for k in one)
                different += not same
                print(f"{script} {stage}: {'the same' if same else 'DIFFERENT'}", flush=True)
            images = [path.relative_to(runs[0]) for path in runs[0].rglob("*/*/*.png")
                      if path.name != "labels.png" and (runs[1] / path.relative_to(runs[0])).exists()]
            same = results[0].read_text() == results[1].read_text() and all(
                (runs[0] / name).read_bytes() == (runs[1] / name).read_bytes() for name in images)
            different += not same
            print(f"{script} results.json and {len(images)} labels and maps: {'the same' if same else 'DIFFERENT'}", flush=True)
    raise SystemExit(f"{different} differ" if different else 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
