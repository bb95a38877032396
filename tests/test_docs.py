"""README and the pages of docs/: sizes, first lines, links, commands, flags, snippets, the page of settings."""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch
from test_scripts import SCRIPTS
from torch import nn

from common import settings, start
from common.cli import flag, flags
from common.run import Options

ROOT = Path(__file__).parents[1]
README, DOCS = ROOT / "README.md", sorted(ROOT.glob("docs/*.md"))
PAGES = [README, *DOCS]
WITH_COMMANDS = [*PAGES, *(ROOT / f"{script}.py" for script in SCRIPTS),
                 *(ROOT / f"common/{name}.py" for name in ("curves", "results", "settings", "toycity"))]
OTHERS_FLAGS = {"--shm-size", "--soak", "--help", "--help-all"}          # of other programs, and those of all parsers


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def prose(page: Path) -> str:
    """The text of a page without fenced blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The anchors of a page: its headings, as GitHub names them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_readme_is_short():
    text = README.read_bytes()
    assert text.count(b"\n") <= 220 and len(text) <= 12 * 1024


@pytest.mark.parametrize("page", DOCS, ids=name)
def test_a_page_begins_with_three_lines_that_say_what_it_answers(page):
    title, empty, *three, end = page.read_text(encoding="utf-8").splitlines()[:6]
    assert title.startswith("# ") and not empty and all(three) and not end


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_and_names_of_files_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        path, _, anchor = link.partition("#")
        if not link.startswith("https://"):
            file = page.parent / path if path else page
            assert file.exists(), link
            assert not anchor or anchor in anchors(file), link
    for file in re.findall(r"`((?:common|tests|docs)/[\w./]+\.(?:py|md))`", prose(page)):
        assert (ROOT / file).exists() or "METHOD" in file, file


def test_each_picture_is_shown():
    shown = {link for page in PAGES for link in re.findall(r"!\[[^\]]*\]\((?:\.\./)?([^)]+)\)", prose(page))}
    assert {path.relative_to(ROOT).as_posix() for path in ROOT.glob(".github/*.png")} == shown


def commands(page: Path) -> list[list[str]]:
    """The words of each command of a page or of a file's docstring, without comments and what torchrun takes itself."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".py":
        text = re.sub(r"[][]", "", ast.get_docstring(ast.parse(text)))          # of what may be left out
    matches = re.findall(r"`((?:python|torchrun) [^`]+)`|^ *((?:python|torchrun) .*)$", text, re.MULTILINE)
    split = [shlex.split(re.split(r"\s{2,}|\s[#>]", code or line)[0]) for code, line in matches]
    first = [next(k for k, word in enumerate(words) if word == "-m" or word.endswith(".py")) for words in split]
    return [words[k:] for words, k in zip(split, first)]


class ParsedError(Exception):
    """Raised instead of running a command, once its flags are read and checked."""


@pytest.fixture
def parsed(monkeypatch, tmp_path):
    """`parsed(words)`: the folder, the stages and the options of a script's start; None for another command."""
    monkeypatch.chdir(tmp_path)                                  # a folder without runs

    def run(method, cfg, options, stages, sizes=None, largest_scale=1.0):
        named = tuple(stage for stage, iterations in stages.items() if iterations != 0)
        sizes = {"source": options.source_size or (sizes or {}).get(options.source),
                 "target": options.target_size or (sizes or {}).get(options.target)}
        folder = start.run_folder(method, options)
        start.check_settings(options, named, sizes, largest_scale, folder)
        raise ParsedError(folder, named, options)

    def only_parse(parser, *args, _parse_args=argparse.ArgumentParser.parse_args):
        _parse_args(parser, *args)
        raise ParsedError(None)

    def read(words):
        script, argv = words[0].removesuffix(".py"), words[1:]
        if words == ["-m", "common.settings"] or "--help-all" in words:          # they only print
            return None
        if script not in SCRIPTS and words[0] != "-m":
            assert (ROOT / words[0]).exists(), words
            return None
        with monkeypatch.context() as patch, pytest.raises(ParsedError) as stop:
            if words[0] == "-m":
                patch.setattr(argparse.ArgumentParser, "parse_args", only_parse)
                importlib.import_module(words[1]).main(words[2:])
            patch.setattr(f"{script}.Run", run)
            if script == "c2f":
                patch.setattr("c2f.align_files", lambda cfg: (_ for _ in ()).throw(ParsedError(None)))
            importlib.import_module(script).main(argv)
        return stop.value.args if len(stop.value.args) == 3 else None
    return read


def test_every_command_is_parsed_and_starts_from_what_another_has_made(parsed):
    stages_of, checkpoints, count = {}, [], 0
    for page in WITH_COMMANDS:
        for words in commands(page):
            try:
                result, count = parsed(words), count + 1
            except SystemExit as error:
                raise AssertionError(f"{name(page)}: {' '.join(words)}") from error
            if result:
                folder, stages, options = result
                stages_of[folder.as_posix()] = stages_of.get(folder.as_posix(), ()) + stages
                checkpoints += [(name(page), options.from_)] if (options.from_ or "").startswith("runs/") else []
    for page, checkpoint in checkpoints:
        assert Path(checkpoint).stem in stages_of.get(Path(checkpoint).parent.as_posix(), ()), (page, checkpoint)
    assert count > 100 and len(checkpoints) > 20


def test_a_wrong_command_is_noticed(parsed):
    for line in ("fada.py --lamda 1", "fada.py --stage finish", "sim.py --crop 9999x99", "bismap.py --assign ias --delta 3",
                 "-m common.toycity --sizes 1x1 x"):
        with pytest.raises(SystemExit):
            parsed(line.split())


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_flag_in_the_text_exists(page):
    known = set(OTHERS_FLAGS)
    for cls in (Options, *(importlib.import_module(script).Config for script in SCRIPTS)):
        known |= {flag(field.name) for field, _ in flags(cls)}
        known |= {flag(f"no_{field.name}") for field, kind in flags(cls) if kind is bool}
    assert set(re.findall(r"`(--[\w-]+)", prose(page))) <= known


def test_the_page_of_settings_is_what_the_code_prints():
    assert (ROOT / "docs/settings.md").read_text(encoding="utf-8") == settings.page()


class Tiny(nn.Module):
    """2048 features at stride 8, and 19 classes."""

    def __init__(self):
        super().__init__()
        self.encoder, self.classifier = nn.Conv2d(3, 2048, 3, stride=8, padding=1), nn.Conv2d(2048, 19, 1)

    def forward(self, x):
        feat = self.encoder(x)
        return feat, self.classifier(feat)


SNIPPETS = re.findall(r"^\*\*\w+\*\*.*?^```python\n(from (\w+) .*?)^```", README.read_text(encoding="utf-8"), re.DOTALL | re.M)


def test_each_script_has_a_snippet():
    assert [script for _, script in SNIPPETS] == ["fada", "cag", "c2f", "sim", "bismap"]


@pytest.mark.parametrize(("snippet", "script"), SNIPPETS, ids=[script for _, script in SNIPPETS])
def test_a_snippet_runs_and_teaches_the_model(snippet, script):
    torch.manual_seed(0)
    model, old = Tiny(), Tiny().requires_grad_(False)
    x_s = torch.randn(2, 3, 32, 64)
    x_t, y_grid = x_s.flip(0) + 0.1, model(x_s)[1].argmax(dim=1)                   # the model is right on the source
    y_s = y_grid.repeat_interleave(8, dim=1).repeat_interleave(8, dim=2)
    old.classifier.weight.mul_(100)                              # sure predictions, so that there are pseudo labels
    names = {"torch": torch, "model": model, "old": old, "x_s": x_s, "y_s": y_s, "y_grid": y_grid, "x_t": x_t,
             "x_tau": 0.9 * x_t, "source": [(x_s, y_grid), (x_s, y_grid)],
             "image_s": torch.rand(3, 16, 24), "image_t": torch.rand(3, 8, 8),
             "samples": [old(x_t)[0].movedim(1, -1).flatten(0, 2)[k::2] for k in range(19)]}
    exec(compile(snippet, f"README: {script}", "exec"), names)
    names["loss"].backward()
    assert names["loss"].isfinite() and names["loss"] > 0
    assert model.encoder.weight.grad.isfinite().all() and model.encoder.weight.grad.abs().sum() > 0
    if script == "fada":
        names["D"].zero_grad()
        names["loss_D"].backward()
        assert all(p.grad.abs().sum() > 0 for p in names["D"].parameters())
    if script == "c2f":
        assert names["aligned"].shape == (3, 16, 24)


def test_the_makefile_installs_what_pyproject_names():
    project, makefile = ((ROOT / file).read_text(encoding="utf-8") for file in ("pyproject.toml", "Makefile"))
    lists = [re.findall(r'"([^"]+)"', re.search(rf"^{key} = \[(.*)\]$", project, re.M)[1]) for key in ("dependencies", "test")]
    assert [shlex.split(line) for line in re.findall(r"pip install (.+)", makefile)] == lists
