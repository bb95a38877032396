"""Print docs/settings.md from the scripts' Configs and the shared Options:

    python -m common.settings > docs/settings.md
"""

from __future__ import annotations

import dataclasses
import importlib

from common.cli import flag, flags
from common.run import Options
from common.usage import paper_value, show

SCRIPTS = ("fada", "cag", "c2f", "sim", "bismap")
TOP = """# Settings

Every flag of every script with its default, the paper's value and the section that gives it (†: the paper gives none).
Which flags all scripts share, and which of these may change when a run continues.
`python -m common.settings` prints this page, `python fada.py --help-all` the flags of one script in groups.
"""
SHARED = """
## Shared flags that define a run

A run is continued only with the same values; another value needs another `--tag`. If a flag is also in a script's own
table, its default is the one given there.
"""
FREE = """
## Shared flags that may change when a run continues
"""


def table(rows: list[tuple[str, ...]]) -> str:
    """A Markdown table; the first row is its head."""
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([head, "|---" * len(rows[0]) + "|", *body])


def meaning(field: dataclasses.Field) -> str:
    """A flag's help with its choices."""
    choices = field.metadata["choices"]
    return field.metadata["help"] + f" ({', '.join(map(str, choices))})" * bool(choices)


def default(field: dataclasses.Field) -> str:
    """A flag's default: "automatic" if its help explains it, nothing if there is no value."""
    return "" if field.default is None and "automatic" not in field.metadata["help"] else show(field.default)


def config_table(cls: type) -> str:
    """A script's Config: flag, default, the paper's value and where the paper gives it, meaning."""
    rows = [(f"`{flag(field.name)}`", default(field), paper_value(field), meaning(field)) for field, _ in flags(cls)]
    return table([("flag", "default", "paper", "meaning"), *rows])


def options_table(defines_run: bool) -> str:
    """The shared Options that do or do not define a run: flag, default, meaning."""
    rows = [(f"`{flag(field.name)}`", default(field), meaning(field)) for field, _ in flags(Options)
            if field.metadata["defines_run"] is defines_run]
    return table([("flag", "default", "meaning"), *rows])


def page() -> str:
    """docs/settings.md."""
    parts = [TOP]
    for script in SCRIPTS:
        parts.append(f"\n## {script}.py\n\n{config_table(importlib.import_module(script).Config)}\n")
    parts += [SHARED, "\n", options_table(True), "\n", FREE, "\n", options_table(False), "\n"]
    return "".join(parts)


if __name__ == "__main__":
    print(page(), end="")
