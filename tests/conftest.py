"""Fixtures shared by the tests: a very small toy city; one torch thread, here and in processes that tests start."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from common import toycity
from common.cli import Size

torch.set_num_threads(1)                                 # a second thread gains nothing at these sizes
os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parent))           # tests/starts.py


def pytest_addoption(parser):
    parser.addoption("--soak", action="store_true", help="the long versions of the tests of faults")


class Progress:
    """Prints a line for each test file that is done: which, how many of all, and about how long the others take."""

    def __init__(self, terminal):
        self.terminal, self.begin, self.left, self.files, self.tests = terminal, time.monotonic(), Counter(), 0, 0

    def collected(self, ids: list[str]) -> None:
        """ids: those of all tests, such as tests/test_x.py::test_y."""
        self.left = Counter(name.split("::")[0] for name in ids)
        self.files, self.tests = len(self.left), len(ids)

    def pytest_collection_finish(self, session):
        if session.items:                                # none where pytest-xdist's processes collect: then the next is called
            self.collected([item.nodeid for item in session.items])

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node, ids):
        if not self.files:
            self.collected(ids)

    def pytest_runtest_logreport(self, report):
        file = report.nodeid.split("::")[0]
        self.left[file] -= report.when == "teardown"
        if report.when == "teardown" and not self.left[file]:
            del self.left[file]
            ahead = self.left.total()
            minutes = (time.monotonic() - self.begin) / (self.tests - ahead) * ahead / 60
            self.terminal.write_line(f"\n{file}: done, {self.files - len(self.left)} of {self.files}; {minutes:.0f} min left")


@pytest.hookimpl(trylast=True)                           # after the terminal's reporter is there
def pytest_configure(config):
    if not hasattr(config, "workerinput"):               # of pytest-xdist's processes only the first prints
        config.pluginmanager.register(Progress(config.pluginmanager.get_plugin("terminalreporter")))


@pytest.fixture(scope="session")
def soak(request) -> bool:
    return request.config.getoption("--soak")


@pytest.fixture(scope="session")
def city(tmp_path_factory) -> Path:
    """A toy city of 8 + 3 images of 64x32 in all four layouts."""
    root = tmp_path_factory.mktemp("city")
    toycity.render(root, seed=0, train=8, val=3, size=Size(64, 32))
    return root
