"""When an answer counts as exact, and the table of counts. No torch."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

_NUMBER = re.compile(r"-?\d+")
_STOPS = ".。!！"
_AROUND = " \n.。!！\"'`*“”‘’"  # of a result that is said
_GROUPS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_HAN = re.compile(r"[\u3400-\u9fff]")
_SAMPLES = 20  # answers kept in a result


def normalise(text: str) -> str:
    """Width forms (NFKC), case, runs of spaces and the final stop do not matter; everything else does."""
    folded = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return folded.rstrip(_STOPS).rstrip()


def final_answer(text: str) -> str | None:
    """The last number of a worked answer ("..., so 47+38=85." gives "85"), None without one."""
    found = _NUMBER.findall(text.rpartition("=")[2]) or _NUMBER.findall(text)
    return found[-1] if found else None


def exact(answer: str, expected: str) -> bool:
    """The rule of `builtin:world`.

    If `expected` is a bare number, the answer is judged by its final number (after the last "=" if there
    is one), so that a worked sum may show its steps. Anything else must be equal after `normalise`: the
    whole answer, nothing more and nothing less.
    """
    if _NUMBER.fullmatch(expected.strip()):
        return final_answer(answer) == expected.strip()
    return normalise(answer) == normalise(expected)


def says(answer: str, expected: str) -> bool:
    """Whether the answer ends with `expected`, in any words before it.

    Case counts; stops, quotes and emphasis around it do not, nor commas between the digits of a number.
    """
    said = unicodedata.normalize("NFKC", answer).strip(_AROUND)
    if _NUMBER.match(expected):
        said = _GROUPS.sub("", said)
    before = said[: -len(expected)]
    return said.endswith(expected) and not (before and re.match(r"[\w.:-]", before[-1], re.ASCII))


def names_all(answer: str, must: Sequence[Sequence[str]], never: Sequence[str] = ()) -> bool:
    """Whether the answer has one phrase of each group of `must`, and none of `never`; whole words only."""
    said = normalise(answer)
    return all(any(_has(said, phrase) for phrase in group) for group in must) and not any(
        _has(said, phrase) for phrase in never
    )


def _has(said: str, phrase: str) -> bool:
    phrase = normalise(phrase)
    edges = (r"\b" * phrase[:1].isascii(), r"\b" * phrase[-1:].isascii())  # Chinese has no word borders
    return re.search(f"{edges[0]}{re.escape(phrase)}{edges[1]}", said, re.ASCII) is not None


def language_of(text: str) -> str:
    """ "zh" if there is any Chinese character, else "en"."""
    return "zh" if _HAN.search(text) else "en"


def shown(marks: Sequence[bool]) -> list[int]:
    """Which answers to show: half mistakes (where there are any), half right ones, in the order asked."""
    wrong = [i for i, mark in enumerate(marks) if not mark][: _SAMPLES // 2]
    right = [i for i, mark in enumerate(marks) if mark][: _SAMPLES - len(wrong)]
    return sorted(wrong + right)


def tally(marks: Iterable[tuple[str, str, bool]]) -> dict[str, Any]:
    """Counts and accuracies of (language, category, correct) marks; categories in the order they came."""
    total = _Count()
    by_language: dict[str, _Count] = {}
    by_category: dict[str, dict[str, _Count]] = {}
    for lang, category, correct in marks:
        here = by_category.setdefault(lang, {}).setdefault(category, _Count())
        for count in (total, by_language.setdefault(lang, _Count()), here):
            count.total += 1
            count.correct += correct
    return {
        **total.row(),
        "by_language": {lang: count.row() for lang, count in by_language.items()},
        "by_category": {
            lang: {name: count.row() for name, count in names.items()} for lang, names in by_category.items()
        },
    }


class _Count:
    def __init__(self) -> None:
        self.correct = self.total = 0

    def row(self) -> dict[str, Any]:
        share = self.correct / self.total if self.total else 0.0
        return {"accuracy": share, "correct": self.correct, "total": self.total}
