"""Limits on the size of the code and on its imports. A new feature must fit into them.

`python tests/test_house.py` prints, per script, the files, lines and tokens of all modules of this project that it imports when
it starts: those reached by imports at the top of a file. Imports inside functions are not followed."""

from __future__ import annotations

import ast
import io
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = {"fada": 400, "cag": 460, "sim": 490, "c2f": 560, "bismap": 720}              # name -> most lines
ROOMS = {"run": 520, "data": 430, "deeplab": 365, "cli": 170}                           # files of common -> most lines
LAZY = {"checks", "curves", "faults", "layouts", "network", "page", "pixels", "predict", "published", "results", "settings",
        "start", "toycity", "usage"}
COUNTED = (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING)


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def imports(path: Path, everywhere: bool = False) -> set[str]:
    """Dotted names that a file imports at its top, also in `if` and `try`; with `everywhere`, inside functions too."""
    names, nodes = set(), list(ast.parse(path.read_text(encoding="utf-8")).body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif everywhere or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            nodes += ast.iter_child_nodes(node)
    return names


def closure(script: str) -> dict[Path, int]:
    """Files that a script imports when it starts, itself included -> number of tokens."""
    seen, todo = {}, [ROOT / f"{script}.py"]
    while todo:
        path = todo.pop()
        if path not in seen and path.is_file() and lines(path):
            readline = io.StringIO(path.read_text(encoding="utf-8")).readline
            seen[path] = sum(token.type in COUNTED for token in tokenize.generate_tokens(readline))
            todo += [ROOT / (name.replace(".", "/") + ".py") for name in imports(path)]
    return seen


def table() -> str:
    rows = []
    for script in SCRIPTS:
        files = closure(script)
        common = sum(len(lines(path)) for path in files if path.parent.name == "common")
        rows.append(f"{script:<8}{len(lines(ROOT / f'{script}.py')):>6}{len(files):>7}{common:>8}"
                    f"{sum(len(lines(path)) for path in files):>8}{sum(files.values()):>8}")
    return "\n".join(["script   lines  files  common closure  tokens", *rows])


def functions(path: Path) -> dict[str, ast.FunctionDef | ast.ClassDef]:
    return {node.name: node for node in ast.parse(path.read_text(encoding="utf-8")).body
            if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def test_what_a_script_imports_is_small():
    print(table())
    files = closure("fada")
    common = {path: len(lines(path)) for path in files if path.parent.name == "common"}
    assert len(files) <= 10 and sum(files.values()) <= 20_000
    assert sum(common.values()) <= 1850 and sum(common.values()) + len(lines(ROOT / "fada.py")) <= 2300
    for script in SCRIPTS:
        others = {path.stem for path in closure(script) if path.parent == ROOT} - {script}
        assert others == ({"c2f"} if script == "bismap" else set()), script
        more = {path.name for path in closure(script) if path.parent.name == "common" and path not in common}
        assert not more, f"{script} imports also {more}"


@pytest.mark.parametrize(("name", "most"), [*SCRIPTS.items(), *((f"common/{name}", most) for name, most in ROOMS.items())])
def test_no_file_outgrows_its_size(name, most):
    assert len(lines(ROOT / f"{name}.py")) <= most


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_short_where_it_begins_and_mostly_code(script):
    path = ROOT / f"{script}.py"
    main = functions(path)["main"]
    assert main.end_lineno - main.lineno + 1 <= (48 if script == "bismap" else 35)
    tree, words = ast.parse(path.read_text(encoding="utf-8")), set()
    for node in ast.walk(tree):                                                         # docstrings
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node, clean=False) is not None:
            words |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    code = [text for number, text in enumerate(lines(path), 1)
            if number not in words and text.strip() and not text.strip().startswith("#")]
    assert len(code) >= 0.6 * len([text for text in lines(path) if text.strip()])


def test_a_run_has_few_methods():
    names = [node.name for node in functions(ROOT / "common/run.py")["Run"].body if isinstance(node, ast.FunctionDef)]
    assert len(names) <= 35 and len([name for name in names if not name.startswith("_")]) <= 16


def test_no_line_is_long():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("common/*.py"), *ROOT.glob("tests/*.py")]:
        long = [number for number, text in enumerate(lines(path), 1) if len(text) > 128]
        assert not long, f"{path}: lines {long}"


def test_who_may_import_whom():
    for script in SCRIPTS:
        names = imports(ROOT / f"{script}.py", everywhere=True)
        allowed = {"c2f", "c2f.photometric_fit"} if script == "bismap" else set()
        assert {name for name in names if name.split(".")[0] in SCRIPTS} == allowed, script
        assert not names & {f"common.{name}" for name in ("toycity", "curves", "results", "settings")}, script
    for path in ROOT.glob("common/*.py"):
        names = imports(path, everywhere=True)
        if path.stem not in ("run", "results", "settings"):
            assert not names & {"common.run", "common.cli.parse"}, path
        assert not {name for name in names if name.split(".")[0] in SCRIPTS}, path
    for path in {path for script in SCRIPTS for path in closure(script)}:
        assert path.stem not in LAZY, f"{path} is imported when a script starts"


if __name__ == "__main__":
    print(table())
    rooms = {path.stem: len(lines(path)) for path in sorted(ROOT.glob("common/*.py")) if path.stem in LAZY}
    print("imported where they are used, not counted:", ", ".join(f"{name} {count}" for name, count in rooms.items()))
