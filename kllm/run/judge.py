"""Who says which answer is better: a known answer, a length, one's own function, a model at an URL."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from kllm.config.align import JUDGE_KEY, RolloutSection
from kllm.config.recipe import is_url
from kllm.data.messages import BadRow
from kllm.data.reasoning import one_form
from kllm.errors import KllmError, UserError
from kllm.eval.scoring import exact
from kllm.run.collect_client import Refused, RemoteTeacher, Sampling
from kllm.run.collect_journal import Reply
from kllm.run.collect_prompts import Prompt
from kllm.run.stoppable import run_stoppable

Judge = Callable[[Sequence[tuple[Prompt, str]]], list[float]]
"""(prompt, answer) pairs -> a mark for each; higher is better."""

_AT_ONCE = 8
_BEST = 10
_SAMPLING = Sampling(max_tokens=1024, temperature=0.0, top_p=None, enable_thinking=False)
_NUMBER = r"(?<![A-Za-z0-9_.])-?\d+(?:\.\d+)?"
_TEN = r"\W{0,4}10(?![\d.]*\d)"
_OF_TEN = re.compile(rf"({_NUMBER})\W{{0,4}}(?:/|out of|of){_TEN}", re.IGNORECASE)
_SCALE = re.compile(rf"\b[01]\s*(?:to|and|-|–|~|到|至){_TEN}|(?:/|out of|满分){_TEN}", re.IGNORECASE)
_MARK = re.compile(_NUMBER)
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


def check_prompts(rollout: RolloutSection, prompts: Iterable[Prompt]) -> None:
    """Refuses prompts that the reward cannot judge.

    Raises:
        UserError: `match`, and a prompt without a known answer.
    """
    lacking = next((p for p in prompts if p.answer is None), None) if rollout.reward == "match" else None
    if lacking is not None:
        raise UserError(
            "the prompt has no known answer to match",
            where=lacking.where,
            hint="give prompts with answers, or another rollout.reward",
        )


def _match(pairs: Sequence[tuple[Prompt, str]]) -> list[float]:
    """1 for the prompt's known answer, else 0."""
    return [float(exact(text.strip(), str(prompt.answer))) for prompt, text in pairs]


def _own(name: str) -> Judge:
    """`module:function`, a function (prompt messages, answer text, known answer) -> number."""
    module, colon, function = name.partition(":")
    hint = "match, brief, module:function, or the URL of a judge"
    if not colon or not module or not function:
        raise UserError(f"no such reward: {name!r}", where="rollout.reward", hint=hint)
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as e:  # whatever the user's module raises when it is loaded
        raise UserError(f"cannot load {name}: {e}", where="rollout.reward", hint=hint) from None
    if not callable(found) or len(inspect.signature(found).parameters) != 3:
        raise UserError(f"{name} is no function of (messages, text, answer)", where="rollout.reward")

    def mark(prompt: Prompt, text: str) -> float:
        try:
            said = float(found(prompt.messages, text, prompt.answer))
        except Exception as e:  # whatever the user's function raises, or gives instead of a number
            what = str(e) or type(e).__name__
            raise UserError(f"{name}: {what}", where="rollout.reward") from e
        if not math.isfinite(said):
            raise UserError(f"{name}: {said} is no mark", where="rollout.reward")
        return said

    return lambda pairs: [mark(prompt, text) for prompt, text in pairs]


async def _asked(rollout: RolloutSection, pairs: Sequence[tuple[Prompt, str]]) -> list[float]:
    """Marks of a model at an URL; an answer that holds no mark is a failure."""
    gate = asyncio.Semaphore(_AT_ONCE)
    judge = RemoteTeacher(
        rollout.reward,
        key=os.environ.get(JUDGE_KEY),
        key_name=f"environment variable {JUDGE_KEY}",
        model=rollout.judge_model,
        sampling=_SAMPLING,
    )

    async def mark(prompt: Prompt, text: str) -> float:
        question = "\n".join(f"{m['role']}: {m['content']}" for m in prompt.messages)
        asked = [{"role": "user", "content": _QUESTION.format(question=question, answer=text)}]
        async with gate:
            try:
                return mark_of(await _reply(judge, asked), rollout.reward)
            except Refused as e:
                raise KllmError(
                    f"the judge gave no mark: {e.reason} {e.detail}".strip(), rollout.reward
                ) from None

    async with judge:
        return list(await asyncio.gather(*(mark(prompt, text) for prompt, text in pairs)))


async def _reply(judge: RemoteTeacher, asked: list[dict[str, str]]) -> Reply:
    """The judge's answer; a server that does not know the switch of thinking is asked without it."""
    try:
        return await judge.ask(asked, None, None)
    except Refused as e:
        if not e.ours or "chat_template_kwargs" not in e.detail:
            raise
    judge.sampling = replace(judge.sampling, enable_thinking=None)
    return await judge.ask(asked, None, None)


def mark_of(reply: Reply, where: str) -> float:
    """The number that is meant in a judge's answer: what it thought before is no mark, nor is the scale.

    Raises:
        KllmError: the answer is cut, holds no number, or one that is not between 0 and 10.
    """
    if reply.finish_reason == "length":
        raise KllmError("the judge's answer is cut: no mark", where=where)
    try:
        said = str(one_form({**reply.message, "role": "assistant"})["content"])
    except BadRow as e:
        raise KllmError(f"the judge's answer holds no mark: {e}", where=where) from None
    found = _OF_TEN.findall(said) or _MARK.findall(_SCALE.sub(" ", said))
    if not found:
        raise KllmError(f"the judge's answer holds no number: {said[:80]!r}", where=where)
    if not 0 <= (mark := float(found[-1])) <= _BEST:
        raise KllmError(f"the judge's mark {found[-1]} is not between 0 and {_BEST}", where=where)
    return mark
