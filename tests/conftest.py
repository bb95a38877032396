"""Fixtures shared by the tests: a very small toy city, and torch kept to one thread, here and in the processes started here."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from common import toycity
from common.cli import Size

torch.set_num_threads(1)                                 # a second one gains nothing at these sizes
os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parent))           # tests/starts.py


def pytest_addoption(parser):
    parser.addoption("--soak", action="store_true", help="the long versions of the tests of faults")


@pytest.fixture(scope="session")
def soak(request) -> bool:
    return request.config.getoption("--soak")


@pytest.fixture(scope="session")
def city(tmp_path_factory) -> Path:
    """A toy city of 8 + 3 images of 64x32 in all four layouts."""
    root = tmp_path_factory.mktemp("city")
    toycity.render(root, seed=0, train=8, val=3, size=Size(64, 32))
    return root
