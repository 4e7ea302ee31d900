"""The names of the evaluation tasks and the data they read. No torch: a dry run checks them."""

from __future__ import annotations

import difflib

from kllm.errors import UserError

TASKS = {
    "builtin:world": "held-out questions about the built-in world, exact answers",
    "builtin:world/facts": "the same without the questions about the model itself, which a persona changes",
    "builtin:identity": "held-out questions to the built-in persona (trained with builtin:identity/sft)",
    "builtin:tools": "held-out questions for tools, which are run (trained with builtin:tools/sft)",
    "preference": "preference:FILE, share of pairs whose chosen answer is the likelier one",
    "format": "format:FILE, prompts answered with and without thinking: form, and exact answers",
    "perplexity": "perplexity:FILE, loss and bits per byte of a text",
}
"""Every task; those without a colon take a file (or any other source of data) after one."""

EXAMPLES = {
    "preference": "preference:builtin:world/preference-eval",
    "format": "format:builtin:reasoning/eval",
}
"""Tasks on a file, with the built-in data that serves as one."""

_DATA = {
    "builtin:world": "builtin:world/eval",
    "builtin:world/facts": "builtin:world/eval",
    "builtin:identity": "builtin:identity/eval",
    "builtin:tools": "builtin:tools/eval",
}


def task_names() -> list[str]:
    """The tasks as they are typed."""
    return [name if ":" in name else f"{name}:FILE" for name in TASKS]


def check_task(name: str) -> None:
    """Raises UserError if there is no such task; opens no file."""
    kind, _, rest = name.partition(":")
    if name in _DATA or (kind in TASKS and rest):
        return
    if kind in TASKS:
        example = f", e.g. {EXAMPLES[kind]}" if kind in EXAMPLES else ""
        raise UserError("the task needs a file", where=name, hint=f"{kind}:FILE{example}")
    short = {full.removeprefix("builtin:"): full for full in _DATA}
    known = {**short, "builtin": "builtin:world", **{n.removesuffix(":FILE"): n for n in task_names()}}
    near = difflib.get_close_matches(name, known, n=1)
    better = f"did you mean {known[near[0]]}? " if near else ""
    raise UserError(f"unknown task {name!r}", hint=f"{better}known: {', '.join(task_names())}")


def task_data(name: str) -> list[str]:
    """The sources of data that a task reads; none if there is no such task."""
    if name in _DATA:
        return [_DATA[name]]
    kind, _, rest = name.partition(":")
    return [rest] if kind in TASKS and rest else []
