"""What a model is measured by; one function for every task.

`builtin:world`, `builtin:world/facts` and `builtin:identity` ask held-out questions (see `questions`),
`builtin:tools` those that need tools, and runs these (see `tooluse`),
`preference:FILE` compares pairs of answers, `format:FILE` looks at thinking, `perplexity:FILE` reads texts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kllm.engine import Engine
from kllm.eval.asking import Asker
from kllm.eval.format import run_format
from kllm.eval.names import check_task
from kllm.eval.perplexity import run_perplexity
from kllm.eval.preference import run_preference
from kllm.eval.questions import run_identity, run_world
from kllm.eval.tooluse import run_tools

if TYPE_CHECKING:
    from kllm.model.transformer import Transformer
    from kllm.tokenizer.tokenizer import Tokenizer

_BUILTIN_PROMPT = 512  # tokens that hold every built-in prompt without tools
_TOOLS_PROMPT = 4096  # and with them, several rounds included


def run_task(
    name: str,
    model: Transformer,
    tokenizer: Tokenizer,
    *,
    limit: int | None = None,
    batch_size: int = 64,
    max_new_tokens: int = 64,
    seed: int = 0,
    chat: bool | None = None,
) -> dict[str, Any]:
    """Runs one task and returns its JSON-able result (`task`, and what the task's own function gives).

    Args:
        limit: at most so many questions, pairs, or documents of a perplexity file.
        batch_size: questions answered side by side.
        max_new_tokens: longest answer.
        seed: unused by greedy tasks; here so that every task is called alike. The world is always the
            one of seed 0, which `builtin:world/*` training data tells about.
        chat: ask built-in questions in chat turns (True) or in text style (False); None finds out which
            the model knows.

    Raises:
        UserError: no such task, or its file cannot be read.
    """
    del seed
    check_task(name)
    kind, _, rest = name.partition(":")
    if kind == "perplexity":
        return {"task": name, **run_perplexity(model, tokenizer, rest, limit=limit)}
    if kind == "preference":
        return {"task": name, **run_preference(model, tokenizer, rest, limit=limit)}
    context = model.shape.max_position_embeddings
    if kind == "builtin":  # a cache for all positions of a large model would be a waste
        room = _TOOLS_PROMPT if name == "builtin:tools" else _BUILTIN_PROMPT
        context = min(context, room + max_new_tokens)
    engine = Engine(model, tokenizer, max_batch=batch_size, max_context=context)
    asker = Asker(engine, tokenizer, max_new_tokens=max_new_tokens, batch_size=batch_size)
    if kind == "format":
        return {"task": name, **run_format(asker, rest, limit=limit)}
    if name == "builtin:tools":
        return {"task": name, **run_tools(asker, limit=limit)}
    if name == "builtin:identity":
        return {"task": name, **run_identity(asker, limit=limit, chat=chat)}
    result = run_world(asker, limit=limit, chat=chat, itself=name == "builtin:world")
    return {"task": name, **result}
