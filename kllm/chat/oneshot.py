"""One answer for a script: plain words on stdout, or one JSON object."""

from __future__ import annotations

import contextlib
import json
import os
import select
import sys
from typing import Any

from kllm.chat.conversation import Conversation, Turn
from kllm.chat.interrupt import Interrupts
from kllm.chat.model import tokens_per_second
from kllm.chat.repl import clean_input
from kllm.chat.show import PlainShow
from kllm.errors import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_OK, KllmError, UserError


def question_of(prompt: str | None, *, interactive: bool) -> str:
    """The question: `--prompt`, what is piped in, or both with an empty line between.

    Raises:
        UserError: there is none.
    """
    piped = "" if interactive else _read_stdin()
    question = "\n\n".join(part for part in (prompt, piped.strip()) if part and part.strip())
    if not question:
        raise UserError("nothing to answer: the prompt is empty", where="prompt")
    return clean_input(question)


def answer_once(chat: Conversation, question: str, *, json_output: bool) -> int:
    """Answers and returns the exit code: 130 if Ctrl-C cut the answer, 1 if it never came.

    Raises:
        KllmError: the answer cannot be written; BrokenPipeError: its reader has left.
    """
    try:
        return _answer(chat, question, json_output)
    except BrokenPipeError:
        raise
    except OSError as error:
        with contextlib.suppress(OSError):  # or Python would try again at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise KllmError(f"cannot write the answer: {error.strerror}", where="standard output") from None


def _answer(chat: Conversation, question: str, json_output: bool) -> int:
    show = None if json_output else PlainShow(sys.stdout, sys.stderr, hold=chat.code)
    before = chat.turns[-1] if chat.turns else None
    with Interrupts() as interrupts:
        for item in chat.ask(question, interrupts.pending):
            if show is not None:
                show.item(item)
    if show is not None:
        show.end()
    turn = chat.turns[-1] if chat.turns else None
    if turn is None or turn is before:  # cut before there was an answer
        turn = Turn([{"role": "user", "content": question}])
    if json_output:
        sys.stdout.write(json.dumps(to_json(turn, chat.model.name), ensure_ascii=False) + "\n")
    elif show is not None and not show.text.endswith("\n"):
        sys.stdout.write("\n")
    sys.stdout.flush()
    if turn.finish_reason == "cancelled":
        return EXIT_INTERRUPTED
    if turn.finish_reason == "length" and not json_output:
        sys.stderr.write(f"note: cut after {turn.said[-1].completion_tokens} tokens\n")
    answered = turn.finish_reason != "tool_calls" or bool(turn.answer.get("content"))
    return EXIT_OK if answered else EXIT_FAILURE


def to_json(turn: Turn, model: str) -> dict[str, Any]:
    """{text, reasoning, tool_calls, usage, finish_reason, timings, model}; times in seconds.

    `usage` and `timings` are sums over the turn's answers, `tool_calls` all that was run, with results.
    """
    said = turn.said
    prompt, completion = sum(s.prompt_tokens for s in said), sum(s.completion_tokens for s in said)
    speed = tokens_per_second(said)
    calls = [
        {
            "name": c.name,
            "arguments": c.arguments,
            "result": c.text,
            "error": c.error,
            "seconds": round(c.seconds, 4),
        }
        for c in turn.called
    ]
    return {
        "text": turn.answer.get("content") or "",
        "reasoning": turn.answer.get("reasoning_content"),
        "tool_calls": calls,
        "finish_reason": turn.finish_reason,
        "model": model,
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        },
        "timings": {
            "prefill_s": round(sum(s.prefill_s for s in said), 4),
            "decode_s": round(sum(s.decode_s for s in said), 4),
            "tokens_per_second": None if speed is None else round(speed, 1),
        },
    }


def _read_stdin() -> str:
    """All of stdin, with a word to the user when it stays open and silent (ssh, job runners)."""
    if sys.stdin is None or sys.stdin.closed:
        return ""
    try:
        ready, _, _ = select.select([sys.stdin], [], [], 2.0)
        if not ready:
            sys.stderr.write("waiting for text on stdin (</dev/null if there is none)\n")
            sys.stderr.flush()
    except (OSError, ValueError):  # not a real file, or a system that cannot wait on pipes
        pass
    return sys.stdin.buffer.read().decode("utf-8-sig", "replace")
