"""What a model is measured by: exact answers about the built-in world, and perplexity on a text.

`builtin:world` asks the held-out questions (`kllm.data.builtin`, split eval) greedily and counts exact
answers. `perplexity:FILE` reads any source of texts and gives loss, perplexity and bits per byte.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from kllm.data.builtin import generate
from kllm.engine import Engine, SamplingParams
from kllm.errors import UserError
from kllm.eval.names import check_task
from kllm.eval.perplexity import run_perplexity
from kllm.eval.scoring import exact, tally
from kllm.tokenizer.chat import ChatEncoder

if TYPE_CHECKING:
    from kllm.model.transformer import Transformer
    from kllm.tokenizer.tokenizer import Tokenizer

_SAMPLES = 20  # answers kept in the result
_PROBES = 8  # questions that decide whether a model chats


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
    """Runs one task and returns its JSON-able result (`task`, and what `run_world` / `run_perplexity` give).

    Args:
        limit: at most so many questions, or documents of a perplexity file.
        batch_size: questions answered side by side.
        seed: unused by greedy tasks; here so that every task is called alike. The world is always the
            one of seed 0, which `builtin:world/*` training data tells about.
        chat: ask in chat turns (True) or in text style (False); None finds out which the model knows.

    Raises:
        UserError: no such task, or its file cannot be read.
    """
    check_task(name)
    kind, _, rest = name.partition(":")
    if kind == "perplexity":
        return {"task": name, **run_perplexity(model, tokenizer, rest, limit=limit)}
    engine = Engine(model, tokenizer, max_batch=batch_size, max_context=_context(model, max_new_tokens))
    result = run_world(
        engine,
        tokenizer,
        limit=limit,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        seed=seed,
        chat=chat,
    )
    return {"task": name, **result}


def _context(model: Transformer, max_new_tokens: int) -> int:
    """The world's prompts are short: a cache for all positions of a large model would be a waste."""
    return min(model.shape.max_position_embeddings, 512 + max_new_tokens)


def run_world(
    engine: Engine,
    tokenizer: Tokenizer,
    *,
    limit: int | None = None,
    batch_size: int = 64,
    max_new_tokens: int = 64,
    seed: int = 0,
    chat: bool | None = None,
) -> dict[str, Any]:
    """Greedy answers to the held-out questions, scored by `exact`.

    Questions come in turn from every category and language, so a `limit` keeps the balance. In text style
    the conversation is written as in the pretraining text ("user:", the words, "assistant:") and the answer
    is the first line: so a model that was only pretrained can be measured with the same questions.

    Returns:
        accuracy and counts: `accuracy`, `correct`, `total`, `by_language` {lang: {accuracy, correct,
        total}}, `by_category` {lang: {category: ...}}; `style` ("chat" or "text"); `samples`
        [{lang, category, question, answer, expected, correct}].
    """
    del seed  # greedy
    rows = list(generate("eval"))[:limit]
    if not rows:
        raise UserError("there is nothing to ask", where="limit", hint="limit must be at least 1")
    if chat is None:
        chat = _knows_turns(engine, tokenizer, rows[:_PROBES], max_new_tokens)
    answers = _ask(engine, tokenizer, rows, max_new_tokens, batch_size, chat)
    marks = [exact(answer, row["answer"]) for answer, row in zip(answers, rows, strict=True)]
    return {
        **tally([(row["lang"], row["category"], mark) for row, mark in zip(rows, marks, strict=True)]),
        "style": "chat" if chat else "text",
        "samples": [
            {
                "lang": row["lang"],
                "category": row["category"],
                "question": row["question"],
                "answer": answer,
                "expected": row["answer"],
                "correct": mark,
            }
            for row, answer, mark in _worth_showing(rows, answers, marks)
        ],
    }


def _worth_showing(
    rows: Sequence[dict[str, Any]], answers: Sequence[str], marks: Sequence[bool]
) -> Iterator[tuple[dict[str, Any], str, bool]]:
    """Half mistakes (where there are any), half right answers, in the order asked."""
    wrong = [i for i, mark in enumerate(marks) if not mark][: _SAMPLES // 2]
    right = [i for i, mark in enumerate(marks) if mark][: _SAMPLES - len(wrong)]
    for i in sorted(wrong + right):
        yield rows[i], answers[i], marks[i]


def _ask(
    engine: Engine, tokenizer: Tokenizer, rows: Sequence[dict[str, Any]], limit: int, batch: int, chat: bool
) -> list[str]:
    if chat:
        encoder = ChatEncoder(tokenizer)
        prompts = [encoder.prompt(row["messages"]) for row in rows]
        params = SamplingParams(max_tokens=limit, temperature=0.0)
    else:
        prompts = [tokenizer.encode(text_prompt(row["messages"])) for row in rows]
        params = SamplingParams(max_tokens=limit, temperature=0.0, stop=("\n",))
    order = sorted(range(len(rows)), key=lambda i: len(prompts[i]))  # neighbours of equal length: no padding
    answers = [""] * len(rows)
    for at in range(0, len(order), batch):
        some = order[at : at + batch]
        done = engine.generate([prompts[i] for i in some], params)
        for i, completion in zip(some, done, strict=True):
            answers[i] = completion.text.strip()
    return answers


def text_prompt(messages: Sequence[dict[str, str]]) -> str:
    """The conversation as the pretraining text writes it, up to the answer to come."""
    turns = [f"{message['role']}:\n{message['content']}" for message in messages]
    return "\n".join([*turns, "assistant:\n"])


def _knows_turns(engine: Engine, tokenizer: Tokenizer, rows: Sequence[dict[str, Any]], limit: int) -> bool:
    """Whether the model ends a chat answer with its end-of-turn token, which pretraining text never has."""
    try:
        encoder = ChatEncoder(tokenizer)
    except UserError:
        return False  # no chat template
    prompts = [encoder.prompt(row["messages"]) for row in rows]
    done = engine.generate(prompts, SamplingParams(max_tokens=limit, temperature=0.0))
    return any(c.token_ids and c.token_ids[-1] == tokenizer.eos_token_id for c in done)
