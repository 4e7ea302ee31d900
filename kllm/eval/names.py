"""The names of the evaluation tasks. No torch: a dry run checks them."""

from __future__ import annotations

import difflib

from kllm.errors import UserError

TASKS = {
    "builtin:world": "held-out questions about the built-in world, exact answers",
    "perplexity": "perplexity:FILE, loss and bits per byte of a text",
}


def check_task(name: str) -> None:
    """Raises UserError if there is no such task; opens no file."""
    kind, _, rest = name.partition(":")
    if name == "builtin:world" or (kind == "perplexity" and rest):
        return
    if kind == "perplexity":
        raise UserError("the task needs a file", where=name, hint="perplexity:FILE")
    near = difflib.get_close_matches(name, [*TASKS, "world", "builtin"], n=1)
    meant = {"world": "builtin:world", "builtin": "builtin:world", "perplexity": "perplexity:FILE"}
    better = f"did you mean {meant.get(near[0], near[0])}? " if near else ""
    raise UserError(f"unknown task {name!r}", hint=f"{better}known: builtin:world, perplexity:FILE")
