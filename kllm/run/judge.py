"""Who says which answer is better: a known answer, a length, one's own function, a model at an URL."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import os
import re
from collections.abc import Callable, Sequence

from kllm.config.align import RolloutSection
from kllm.config.recipe import is_url
from kllm.errors import KllmError, UserError
from kllm.eval.scoring import exact
from kllm.run.collect_client import Refused, RemoteTeacher, Sampling
from kllm.run.collect_prompts import Prompt
from kllm.run.stoppable import run_stoppable

Judge = Callable[[Sequence[tuple[Prompt, str]]], list[float]]
"""(prompt, answer) pairs -> a mark for each; higher is better."""

KEY = "OPENAI_API_KEY"
_AT_ONCE = 8
_MARK = re.compile(r"\d+(?:\.\d+)?")
_QUESTION = """Rate how well the answer serves the question, from 0 (useless or wrong) to 10 (perfect). \
Say the number only.

Question:
{question}

Answer:
{answer}"""


def judge_of(rollout: RolloutSection) -> Judge:
    """The judge that `rollout.reward` names.

    Raises:
        UserError: no such function.
    """
    if rollout.reward == "match":
        return _match
    if rollout.reward == "brief":
        return lambda pairs: [-float(len(text)) for _, text in pairs]
    if is_url(rollout.reward):
        return lambda pairs: run_stoppable(_asked(rollout, pairs), "stopped while the judge was asked")
    return _own(rollout.reward)


def _match(pairs: Sequence[tuple[Prompt, str]]) -> list[float]:
    """1 for the prompt's known answer, else 0."""
    for prompt, _ in pairs:
        if prompt.answer is None:
            raise UserError(
                "the prompt has no known answer to match",
                where=prompt.where,
                hint="give prompts with answers, or another rollout.reward",
            )
    return [float(exact(text.strip(), str(prompt.answer))) for prompt, text in pairs]


def _own(name: str) -> Judge:
    """`module:function`, a function (prompt messages, answer text, known answer) -> number."""
    module, colon, function = name.partition(":")
    hint = "match, brief, module:function, or the URL of a judge"
    if not colon or not module or not function:
        raise UserError(f"no such reward: {name!r}", where="rollout.reward", hint=hint)
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as e:
        raise UserError(f"cannot load {name}: {e}", where="rollout.reward", hint=hint) from None
    if not callable(found) or len(inspect.signature(found).parameters) != 3:
        raise UserError(f"{name} is no function of (messages, text, answer)", where="rollout.reward")
    return lambda pairs: [float(found(p.messages, text, p.answer)) for p, text in pairs]


async def _asked(rollout: RolloutSection, pairs: Sequence[tuple[Prompt, str]]) -> list[float]:
    """Marks of a model at an URL; an answer that holds no number is a failure, not a mark."""
    gate = asyncio.Semaphore(_AT_ONCE)
    judge = RemoteTeacher(
        rollout.reward,
        key=os.environ.get(KEY),
        key_name=f"environment variable {KEY}",
        model=rollout.judge_model,
        sampling=Sampling(max_tokens=16, temperature=0.0, top_p=None),
    )

    async def mark(prompt: Prompt, text: str) -> float:
        question = "\n".join(f"{m['role']}: {m['content']}" for m in prompt.messages)
        asked = [{"role": "user", "content": _QUESTION.format(question=question, answer=text)}]
        async with gate:
            try:
                reply = await judge.ask(asked, None, None)
            except Refused as e:
                raise KllmError(
                    f"the judge gave no mark: {e.reason} {e.detail}".strip(), rollout.reward
                ) from None
        found = _MARK.search(str(reply.message.get("content", "")))
        if found is None:
            raise KllmError("the judge's answer holds no number", where=rollout.reward)
        return float(found.group())

    async with judge:
        return list(await asyncio.gather(*(mark(prompt, text) for prompt, text in pairs)))
