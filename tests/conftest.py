"""Fixtures shared by the tests: a very small toy city, and torch kept to two threads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from common import toycity
from common.cli import Size

torch.set_num_threads(2)


@pytest.fixture(scope="session")
def city(tmp_path_factory) -> Path:
    """A toy city of 8 + 3 images of 64x32 in all four layouts."""
    root = tmp_path_factory.mktemp("city")
    toycity.render(root, seed=0, train=8, val=3, size=Size(64, 32))
    return root
