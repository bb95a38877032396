"""The command line: values, bounds, one-sentence errors, exit status 2."""

from __future__ import annotations

import json
import os
import pickle
from dataclasses import dataclass

import pytest
import torch

from common.cli import Size, command, option, parse, to_json
from common.files import UserError, read_json, read_log, write_atomically, write_json


@dataclass
class Config:
    """the method"""

    rate: float = option(0.5, "rate of 100 %", paper=0.5, section="Sec. 1", low=0.0, high=1.0)
    steps: int = option(7, "steps", low=1)
    kind: str = option("soft", "kind", choices=("soft", "hard"))
    crop: Size | None = option(None, "crop")
    scales: tuple[float, ...] = option((1.0, 2.0), "scales", low=0.1)
    fine: bool = option(True, "fine")
    pair: tuple[float, float] = option((0.5, 2.0), "pair")
    from_: str | None = option(None, "start", defines_run=False)


@dataclass
class Options:
    """the machine"""

    toy: bool = option(False, "toy")
    steps: int = option(9, "steps of any method", low=0)
    command: str = ""


def read(*argv: str, toy=None):
    return parse("x.py", "doc", (Config, Options), list(argv), toy)


def test_defaults_and_values():
    cfg, options = read()
    assert cfg == Config() and options.command.endswith("/x.py")
    cfg, options = read("--rate", "1e-1", "--crop", "12x7", "--scales", "0.5", "1", "3", "--no-fine", "--from", "a b.pt")
    assert (cfg.rate, cfg.crop, cfg.scales, cfg.fine, cfg.from_) == (0.1, Size(12, 7), (0.5, 1.0, 3.0), False, "a b.pt")
    assert options.command.endswith("--from 'a b.pt'")           # can be pasted into a shell


def test_toy_values_are_defaults_that_flags_override():
    toy = {"steps": 3, "rate": 0.25}
    assert (read("--toy", toy=toy)[0].steps, read("--toy", "--steps", "4", toy=toy)[0].steps) == (3, 4)
    assert read("--toy", "--steps", "4", toy=toy)[0].rate == 0.25 and read(toy=toy)[0].steps == 7


@pytest.mark.parametrize(("argv", "words"), [
    (["--rat", "0.1"], "--rat 0.1 (did you mean --rate?)"),       # no abbreviations
    (["--stpes", "3"], "did you mean --steps?"),
    (["--steps", "1.5"], "--steps: invalid int value: '1.5'"),
    (["--steps", "0"], "--steps: 0 is below the smallest possible value 1"),
    (["--rate", "1.01"], "--rate: 1.01 is above the largest possible value 1.0"),
    (["--rate", "nan"], "--rate: nan is not a finite number"),
    (["--kind", "softer"], "--kind: invalid choice: 'softer'"),
    (["--crop", "640"], "--crop: '640' is not a size; write WIDTHxHEIGHT"),
    (["--crop", "0x5"], "--crop: '0x5' is not a size"),
    (["--scales", "1", "0"], "--scales: 0 is below the smallest possible value 0.1"),
    (["--crop"], "--crop: expected one argument"),
    (["--pair", "1"], "--pair: expected 2 arguments"),
])
def test_a_mistake_is_one_sentence_and_status_2(argv, words, capsys):
    with pytest.raises(SystemExit) as stop:
        read(*argv)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert words in err and err.startswith("x.py: error: ") and err.count("\n") == 1


def helped(*argv: str, capsys, toy=None, doc="doc") -> str:
    with pytest.raises(SystemExit) as stop:
        parse("x.py", doc, (Config, Options), list(argv), toy)
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_help_all_shows_the_papers_values_and_those_of_the_toy(capsys):
    text = " ".join(helped("--help-all", capsys=capsys).split())
    assert "--rate X rate of 100 % [0.5; paper: 0.5 (Sec. 1)]" in text and "--steps N steps [7; paper: †]" in text
    assert "--fine, --no-fine fine [yes; paper: †]" in text and "--kind soft|hard" in text and text.count("--steps") == 1
    text = " ".join(helped("--help-all", "--toy", capsys=capsys, toy={"rate": 0.25}).split())
    assert "[0.25; paper: 0.5 (Sec. 1)]" in text


@pytest.mark.parametrize("width", ["70", "100"])
def test_help_is_wrapped_at_the_width_of_the_terminal(width, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", width)
    for argv in (["--help"], ["--help-all"], ["-h"]):
        assert max(map(len, helped(*argv, capsys=capsys, doc="A title.\n\nStages: a -> b.\n").splitlines())) <= int(width)


def test_user_error_becomes_one_line_and_status_2(capsys):
    @command
    def main(argv=None):
        raise UserError("the file x is missing; make it")

    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2 and capsys.readouterr().err == "test_cli.py: error: the file x is missing; make it\n"


@pytest.mark.parametrize(("error", "words"), [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "memory is full: try a smaller --batch-size"),
    (RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:3"), "another process of this run ended; see its message"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "a worker process was killed"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that"), "with --shm-size"),
    (RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback\n  File\nRuntimeError: unable to "
                  "allocate shared memory(shm) for file </torch_1_2_3>: Success (0)"), "is full; containers"),
    (RuntimeError("unable to write to file </torch_1_2_3>: No space left on device (28)"), "with --shm-size"),
    (UserError("Caught UserError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File\n"
               "common.files.UserError: x.png is damaged\n"), "error: x.png is damaged"),
])
def test_what_torch_reports_though_the_user_can_fix_it_is_one_sentence(error, words, capsys, monkeypatch):
    @command
    def main(argv=None):
        raise error

    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as stop:
        main([])
    text = capsys.readouterr().err
    assert stop.value.code == 2 and text.startswith("test_cli.py (process 1): error: ")
    assert words in text and text.count("\n") == 1


def test_a_mistake_of_the_code_keeps_its_traceback():
    @command
    def main(argv=None):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        main([])


def test_json_keeps_what_makes_a_run():
    cfg = Config(crop=Size(4, 3))
    assert to_json(cfg)["crop"] == "4x3" and to_json(cfg)["scales"] == [1.0, 2.0]
    assert "from_" in to_json(cfg) and "from_" not in to_json(cfg, defining_only=True)


def test_a_common_field_that_the_method_repeats_is_one_flag_with_the_methods_default(capsys):
    assert [part.steps for part in read()] == [7, 7] and [part.steps for part in read("--steps", "4")] == [4, 4]
    with pytest.raises(SystemExit):
        read("--steps", "0")                                     # the method's bound
    with pytest.raises(SystemExit):
        read("--help-all")
    assert "steps of any method" not in capsys.readouterr().out


def test_a_write_cut_short_leaves_the_previous_file(tmp_path):
    write_atomically(tmp_path / "a/x.bin", lambda file: file.write(b"whole"))

    def half(file):
        file.write(b"ha")
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")

    with pytest.raises(UserError, match="cannot write .*x.bin: .*enforce fail"):
        write_atomically(tmp_path / "a/x.bin", half)
    assert (tmp_path / "a/x.bin").read_bytes() == b"whole" and os.listdir(tmp_path / "a") == ["x.bin"]
    with pytest.raises(UserError, match="cannot write .*y.bin: (File exists|Not a directory)"):
        write_atomically(tmp_path / "a/x.bin/y.bin", half)


def test_json_files_and_logs_that_are_damaged(tmp_path):
    assert read_json(tmp_path / "x.json") == {} and read_log(tmp_path) == []
    write_json(tmp_path / "x.json", {"a": [1, None]})
    assert read_json(tmp_path / "x.json") == {"a": [1, None]}
    for content in (b'{"cut": ', b"[1, 2]", b"\xff\xfe"):
        (tmp_path / "x.json").write_bytes(content)
        with pytest.raises(UserError, match="x.json cannot be read or is damaged"):
            read_json(tmp_path / "x.json")
    good = {"stage": "a", "iteration": 3, "loss": 0.5}
    lines = (b'\xff\xfe{"stage"', b"[1]", b'{"stage": "a"}', json.dumps(good).encode(), b'{"stage": "a", "it')
    (tmp_path / "log.jsonl").write_bytes(b"\n".join(lines))
    assert read_log(tmp_path) == [good]


def test_a_size_survives_a_worker_process():
    assert pickle.loads(pickle.dumps(Size(3, 4))) == Size(3, 4)
