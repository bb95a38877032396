"""The help text of a script: --help in 24 lines, --help-all in full."""

from __future__ import annotations

import re
import shutil
import textwrap

from common.cli import Size, flag, flags

COMMON = ("source", "target", "data", "init", "seed", "tag", "stage", "from_", "eval", "toy")      # in --help
METHOD = "method: the paper's symbols; † marks what the paper does not give"
GROUPS = {                                                       # of --help-all
    "data": "source target city data target_data classes label_ids source_images target_labels source_size target_size crop",
    "network": "backbone init branches input entry partial_init freeze_bn",
    METHOD: "",                                                  # flags in no other group
    "training": "stage from_ toy seed device amp channels_last workers",     # and what `SCHEDULE` knows
    "output": "runs tag eval eval_every log_every save_every predict out export tensorboard",
}
PATHS = {"data", "target_data", "source_images", "init", "classes", "runs", "from_", "predict", "out", "export", "stm_weights",
         "offline_anchors", "align"}
SCHEDULE = re.compile(r"(source_|adversarial_|distill_|warmup_|selftrain_|stage_|step0?_|adapt_|head_|encoder_)?"
                      r"(lr|rate|iterations|epochs|batch_size|size|crop|scale)|lr_discriminator|momentum|nesterov|weight_decay"
                      r"|beta[12]|jitter")


def text(prog: str, doc: str, classes: tuple[type, ...], defaults: dict, everything: bool) -> str:
    """The help of a script, wrapped at the terminal's width.

    Args: doc: the script's docstring; classes: the method's dataclass first; defaults: name -> value if no flag is given;
        everything: all flags and the docstring, not only those that most people use."""
    width = min(shutil.get_terminal_size().columns, 128)
    fields = {}                                                  # name -> (field, whether the paper's value is shown)
    for cls in classes:
        fields |= {field.name: (field, cls is classes[0]) for field, _ in flags(cls) if field.name not in fields}
    title, stages = doc.strip().splitlines()[0], re.search(r"^.*\bStages: (.+?)\.$", doc, re.MULTILINE)

    def rows(names) -> list[str]:
        listed = {"stage": f": {stages[1]}"} if stages else {}
        return [row for name in names for row in describe(*fields[name], defaults[name], listed.get(name, ""), width)]

    usage = [f"usage: python {prog} [flags]        (the same line again resumes)", ""]
    if not everything:
        end = f"All flags, the paper's values, the equations: python {prog} --help-all"
        chosen = [name for name in COMMON if name in fields]
        return "\n".join([*usage, *textwrap.wrap(title, width), "", *rows(chosen), "", *textwrap.wrap(end, width)])
    group_of = {name: "training" if SCHEDULE.fullmatch(name) else METHOD for name in fields}
    group_of |= {name: group for group, names in GROUPS.items() for name in names.split()}
    parts = ["\n".join(["", group, *rows(name for name in fields if group_of[name] == group)]) for group in GROUPS]
    return "\n".join([*usage, doc.strip(), *parts])


def describe(field, from_paper: bool, default, more: str, width: int) -> list[str]:
    """One flag: its name and values on the left, its meaning, default and the paper's value on the right."""
    kind = field.type.split(" | ")[0]
    value = "|".join(map(str, field.metadata["choices"])) or ("PATH" if field.name in PATHS else {
        "int": "N", "float": "X", "bool": "", "str": "NAME", "Size": "WxH"}.get(kind, "X ..." if "..." in kind else "X X"))
    left = f"  {flag(field.name)}{', --no-' + flag(field.name)[2:] if kind == 'bool' and default else ''} {value}".rstrip()
    default = "" if default is None or default is False else show(default)
    paper = f"paper: {paper_value(field)}" if from_paper else ""
    end = "; ".join(filter(None, [default, paper]))
    right = textwrap.wrap(field.metadata["help"] + more + f" [{end}]" * bool(end), max(width - 26, 20))
    first = [left] if len(left) > 24 else [f"{left:<26}{right.pop(0)}"]
    return first + [" " * 26 + line for line in right]


def show(value) -> str:
    """A value as it is typed."""
    if value is None or isinstance(value, bool):
        return {None: "automatic", True: "yes", False: "no"}[value]
    return " ".join(map(str, value)) if isinstance(value, tuple) and not isinstance(value, Size) else str(value)


def paper_value(field) -> str:
    """The paper's value and its section; † if the paper gives none."""
    return "†" if field.metadata["paper"] is None else f"{show(field.metadata['paper'])} ({field.metadata['section']})"
