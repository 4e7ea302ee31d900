"""The parts of an answer that may think first, and what is wrong with its form. No torch.

The form: one `<think>` block, closed, with the answer after it; the answer may stand between `<answer>`
and `</answer>`, once. An answer without thinking has no tags of thinking at all.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_TAG = re.compile(r"</?(?:think|answer)>")


@dataclass(frozen=True)
class Reply:
    """thought: what stands in the think block, None without one; answer: what is said in the end;
    fault: what is wrong with the form, "" if nothing is."""

    thought: str | None
    answer: str
    fault: str = ""


def read_reply(text: str, *, opened: bool = False, ended: bool = True) -> Reply:
    """The parts of an answer.

    Args:
        opened: the prompt has opened the think block already.
        ended: the model ended the answer itself; otherwise it was cut.
    """
    whole = f"<think>{text}" if opened else text
    thought, rest = _split(whole)
    inner = re.search(r"<answer>(.*?)(?:</answer>|$)", rest, re.DOTALL)
    answer = _TAG.sub("", inner[1] if inner else rest).strip()
    return Reply(thought, answer, _fault(whole, answer, ended))


def _split(text: str) -> tuple[str | None, str]:
    """(think block or None, what comes after it); an open block is all thinking."""
    if "<think>" not in text and "</think>" not in text:
        return None, text
    before, closed, rest = text.rpartition("</think>")
    if not closed:
        return text.partition("<think>")[2].strip(), ""
    return before.partition("<think>")[2].strip(), rest


def _fault(text: str, answer: str, ended: bool) -> str:
    tags = _TAG.findall(text)
    thinking = [tag for tag in tags if "think" in tag]
    if thinking:
        if thinking.count("<think>") > 1 or thinking.count("</think>") > 1:
            return "more than one think block"
        if thinking == ["<think>"]:
            return "think block not closed"
        if thinking != ["<think>", "</think>"]:
            return "think tags out of order"
        if _TAG.sub("", text.partition("<think>")[0]).strip():
            return "words before the think block"
    answering = tags[len(thinking) :]
    if any("answer" in tag for tag in tags) and answering != ["<answer>", "</answer>"]:
        return "answer tags out of order"
    if answering and (text.partition("</answer>")[2].strip() or not _only_thinking_before(text)):
        return "words outside the answer tags"
    if not answer:
        return "no answer"
    return "" if ended else "cut before its end"


def _only_thinking_before(text: str) -> bool:
    before = text.partition("<answer>")[0]
    return not before.rpartition("</think>")[2].strip()
