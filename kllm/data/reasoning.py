"""Thinking in conversations: every dialect of it in one form, and the switch `enable_thinking` as data.

The one form is a message with `reasoning_content` (the words inside the tags, without newlines around
them) and `content` (what follows). An answer that was not to think has an *empty think block*: it is what
chat templates write into the prompt for `enable_thinking=False` (Qwen3, technical report 2025, 4.3).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from kllm.data.messages import BadRow, Message
from kllm.errors import UserError
from kllm.tokenizer.chat import ChatEncoder

EMPTY_THINK = "<think>\n\n</think>\n\n"
AnswerTags = Literal["keep", "strip", "add"]

_THINK = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
)
_ANSWER = (("<answer>", "</answer>"), ("<|begin_of_solution|>", "<|end_of_solution|>"))
# of models whose template opens the thinking, so that their text begins inside it (DeepSeek-R1, QwQ);
# a closer between quotes is a word about tags
_LONE = re.compile(r"(?<![`'\"])(</think>|\[/THINK\]|</seed:think>)(?![`'\"])")


def split_thinking(text: str) -> tuple[str | None, str]:
    """An answer's text in any dialect as (reasoning, rest).

    Known are a leading block in one of several tags, and a text that begins inside the thinking (no opening
    tag). The reasoning is None where there is no thinking and "" where its block is empty.

    Raises:
        BadRow: the thinking never ends.
    """
    words = text.lstrip()
    for opener, closer in _THINK:
        if words.startswith(opener):
            inner, found, rest = words[len(opener) :].partition(closer)
            if not found:
                raise BadRow("the thinking never ends")
            return inner.strip(), rest.lstrip()
    lone = _LONE.search(text)
    if lone is None or any(opener in text[: lone.start()] for opener, _ in _THINK):
        return None, text
    return text[: lone.start()].strip(), text[lone.end() :].lstrip()


def untag_answer(content: str, tags: AnswerTags = "strip") -> str:
    """The answer after the thinking, with answer tags around all of it or without.

    `keep` brings tags that are there to one spelling, `strip` takes them off, `add` puts them around what
    has none. Tags in the middle of other words stay as they are.
    """
    words = content.strip()
    for opener, closer in _ANSWER:
        if words.startswith(opener):
            inner = words[len(opener) :]
            bare = inner.removesuffix(closer)
            if (
                closer not in bare and opener not in bare
            ):  # an answer that ends without its closing tag is one
                bare = bare.strip()
                return bare if tags == "strip" else f"<answer>\n{bare}\n</answer>"
    return f"<answer>\n{words}\n</answer>" if tags == "add" and words else content


def one_form(message: Message, tags: AnswerTags = "strip") -> Message:
    """An assistant's message in the one form; others come back as they are.

    The reasoning may stand in a field (`reasoning_content`, `reasoning`, `thinking`) or in the content. An
    empty think block gives an empty `reasoning_content`.

    Raises:
        BadRow: the thinking never ends.
    """
    if message.get("role") != "assistant":
        return message
    out = {k: v for k, v in message.items() if k not in ("reasoning_content", "reasoning", "thinking")}
    given = next(
        (str(message[k]) for k in ("reasoning_content", "reasoning", "thinking") if message.get(k)), None
    )
    inner, content = split_thinking(message.get("content") or "")
    if given is not None and given.strip():
        # some servers give the thinking twice, some leave its closing tag
        repeated = inner is None or not inner or inner == given.strip()
        content = content if repeated else message["content"]
        inner = given.strip()
    if inner is None and message.get("reasoning_content") == "":
        inner = ""
    if inner is not None:
        out["reasoning_content"] = inner
    out["content"] = untag_answer(content, tags)
    return out


@dataclass(frozen=True)
class ThinkOptions:
    """What is done to the thinking of a data set's conversations.

    unify: bring every dialect to the one form, answer tags as `answer_tags` says.
    add_empty: share of the conversations without reasoning whose answers get an empty think block.
    drop: share of the conversations with reasoning that lose it, for empty blocks.
    train_empty: whether an empty block is learned. If not, it is context, as it will be in the prompts that
    switch the thinking off: the model learns to answer at once after it, and to think without it.
    """

    unify: bool = False
    answer_tags: AnswerTags = "keep"
    add_empty: float = 0.0
    drop: float = 0.0
    train_empty: bool = False

    def apply(
        self, sides: Sequence[Sequence[Message]], key: Sequence[Message], seed: int = 0
    ) -> list[list[Message]]:
        """A record's conversations (one; the two of a pair) as these options want them, all alike.

        Args:
            key: the messages that, with the seed, decide whether the record is one of the share.

        Raises:
            BadRow: with `unify`, thinking that never ends.
        """
        out = [[one_form(m, self.answer_tags) for m in side] if self.unify else list(side) for side in sides]
        thinks = any(_thinks(message) for side in out for message in side)
        share, purpose = (self.drop, "drop") if thinks else (self.add_empty, "empty")
        if draw(key, seed, purpose) < share:
            return [without_reasoning(side) for side in out]
        return out


def without_reasoning(messages: Sequence[Message]) -> list[Message]:
    """The conversation with an empty think block (an empty `reasoning_content`) for every answer."""
    out = []
    for message in messages:
        if message["role"] == "assistant":
            content = message["content"]
            try:
                inner, rest = split_thinking(content)
            except BadRow:
                inner, rest = None, content
            message = {**message, "content": content if inner is None else rest, "reasoning_content": ""}
        out.append(message)
    return out


def place_empty(messages: Sequence[Message], in_field: bool) -> list[Message]:
    """Empty think blocks as an empty `reasoning_content` or, for files and plain templates, in the content.

    Only the exact form that templates write back is moved; the text that is rendered stays the same.
    """
    out = []
    for message in messages:
        if message["role"] == "assistant":
            content = message["content"]
            if in_field and content.startswith(EMPTY_THINK) and "reasoning_content" not in message:
                message = {**message, "content": content[len(EMPTY_THINK) :], "reasoning_content": ""}
            elif not in_field and message.get("reasoning_content") == "":
                message = {k: v for k, v in message.items() if k != "reasoning_content"}
                message["content"] = EMPTY_THINK + content
        out.append(message)
    return out


def renders_empty(encoder: ChatEncoder) -> bool:
    """Whether the chat template writes an empty `reasoning_content` as an empty think block."""
    user, answer = {"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}
    try:
        as_field = encoder.text([user, {**answer, "reasoning_content": ""}])
        as_words = encoder.text([user, {**answer, "content": EMPTY_THINK + "answer"}])
    except UserError:
        return False
    return as_field == as_words and EMPTY_THINK in as_field


def draw(messages: Sequence[Message], seed: int, purpose: str) -> float:
    """A number in [0, 1) that depends on the conversation's words, the seed and the purpose only."""
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8)
    for message in messages:
        digest.update(f"\0{message['role']}={message['content']}".encode("utf-8", "surrogatepass"))
    return int.from_bytes(digest.digest(), "little") / 2**64


def _thinks(message: Message) -> bool:
    if message["role"] != "assistant":
        return False
    if message.get("reasoning_content"):
        return True
    try:
        return bool(split_thinking(message["content"])[0])
    except BadRow:
        return True
