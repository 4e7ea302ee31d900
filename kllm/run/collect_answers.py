"""Whether an answer says what is known to be right: numbers by value, choices by letter, else by words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from kllm.eval.scoring import normalise

_NUMBER = r"(?:(?<!\d)[-−])?(?:\d{1,3}(?:[,，]\d{3})+|\d+)(?:\.\d+)?(?:\s*/\s*\d+)?"
_FIND = re.compile(_NUMBER)
_BARE = re.compile(rf"[^\w-]*({_NUMBER})\s*(?:%|％|[^\d\s\w]|[a-zA-Z一-鿿°²³]+|\s)*")
_TAG = re.compile(r"<answer>(.*?)(?:</answer>|$)", re.DOTALL)
_SAID = re.compile(r"####|答案(?:是|为|：|:)?|final answer(?: is)?|answer(?: is|:)", re.IGNORECASE)
_CHOICE = re.compile(r"(?<![A-Za-z])(?!A\s+(?!is\b)[a-z])([A-H])(?![A-Za-z'’])")  # "A cat" names no choice
_FRAC = re.compile(r"\\[dt]?frac\{([^{}]+)\}\{([^{}]+)\}")


def agrees(text: str, expected: Any) -> bool:
    """Whether `text` answers with `expected`.

    What counts of the text is the last `<answer>` tag or `\\boxed{}`, else what follows the last "answer
    is" (`####`, 答案), else, for a number, what follows the last "=", else the last number. Numbers are
    compared by value, a lone letter A to H as a choice, anything else by its words; of a list every entry
    must occur in the text.
    """
    if isinstance(expected, (list, tuple)):
        return bool(expected) and all(_contains(text, str(entry)) for entry in expected)
    wanted = _final(str(expected))
    marked = _marked(text)
    value = number(wanted)
    if value is not None:
        found = number(marked) if marked is not None else None
        return value == (found if found is not None else _last_number(text if marked is None else marked))
    if re.fullmatch(r"[A-H]", wanted):
        return _choice(text if marked is None else marked, marked is not None) == wanted
    said = [text, *text.strip().splitlines()[-1:]] if marked is None else [marked]
    return any(_words(one) == _words(wanted) for one in said)


def answer_key(text: str) -> str:
    """What answers that agree have in common: the final number, or the words of the answer."""
    marked = _marked(text)
    value = number(marked) if marked is not None else None
    value = value if value is not None else _last_number(text if marked is None else marked)
    return str(value) if value is not None else _words(text if marked is None else marked)


def number(text: str) -> Fraction | None:
    """The value of a text that is one number, perhaps with a unit; None of any other."""
    match = _BARE.fullmatch(_plain(text))
    return _value(match[1]) if match else None


def _value(text: str) -> Fraction | None:
    text = re.sub(r"[,，\s]", "", text).replace("−", "-")
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        return None


def _plain(text: str) -> str:
    """Without the dress of LaTeX: `$\\frac{1}{2}$` is 1/2."""
    text = _FRAC.sub(r"\1/\2", text)
    text = re.sub(r"\\(?:left|right|,|;|!|text|mathrm|%)", "", text)
    return text.replace("$", "").replace("{", "").replace("}", "").strip()


def _marked(text: str) -> str | None:
    """What the answer itself marks as its result."""
    if tags := _TAG.findall(text):
        inner = tags[-1].strip()
        return _boxed(inner) or inner
    return _boxed(text)


def _boxed(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    at = start = start + len("\\boxed{")
    depth = 1
    while at < len(text) and depth:
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        at += 1
    return text[start : at - 1].strip() if not depth else None


def _final(expected: str) -> str:
    """GSM8K and its kin write the working before the result."""
    result = expected.rpartition("####")[2]
    return (_boxed(result) or result).strip()


def _last_number(text: str) -> Fraction | None:
    text = _plain(text)
    said = list(_SAID.finditer(text))
    parts = [text[said[-1].end() :]] if said else []
    for part in (*parts, text.rpartition("=")[2], text):
        if found := _FIND.findall(part):
            return _value(found[0] if said and part is parts[0] else found[-1])
    return None


def _choice(text: str, marked: bool) -> str | None:
    said = None if marked else list(_SAID.finditer(text))
    if said and (found := _CHOICE.search(text, said[-1].end())):
        return found[1]
    letters: Sequence[str] = _CHOICE.findall(text)
    return letters[-1] if letters else None


def _contains(text: str, entry: str) -> bool:
    value = number(entry)
    if value is None:
        return normalise(entry) in normalise(text)
    return any(_value(found) == value for found in _FIND.findall(_plain(text)))


def _words(text: str) -> str:
    return re.sub(r"\s+", " ", normalise(_plain(text)))
