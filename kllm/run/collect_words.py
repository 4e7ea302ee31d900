"""What can be told from an answer's words alone: that it refuses, and in which language it is."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence

_CANNOT = r"(can'?t|cannot|can not|unable|not able|won'?t)"
_NOR = rf"({_CANNOT}|don'?t|do not)"
_AI = "(ai|artificial intelligence|(large )?language)( language)? (model|assistant)"
_REFUSALS = re.compile(
    rf"^(i'?m |i am )?(really |very |so |terribly )?(sorry|afraid)\b.{{0,40}}\b{_CANNOT}\b"
    rf"|\bas an? {_AI}\b.*\b{_NOR}\b"
    r"|\bi( can'?t| cannot| can not| won'?t| will not|( am|'m) (unable|not able) to| must decline to)"
    r" (help|assist|provide|comply|fulfil|answer|discuss|generate|create|continue|engage|do that|support)"
    r"|^(很|非常|十分|实在)?(抱歉|对不起|不好意思).{0,30}(无法|不能|没法|没有办法|不便)"
    r"|作为(一个|一名|一款|一位)?\s*(ai|人工智能|大?语言模型|大模型).*(无法|不能|没有|不会)"
    r"|我(无法|不能|没法)(回答|提供|协助|帮助|完成|满足|讨论|生成|继续|为您|为你)"
    r"|^(无法|不能)(回答|提供|满足|协助)",
    re.DOTALL,
)
_OPENING = 160  # characters in which a refusal shows
_CODE = re.compile(r"```.*?(?:```|$)|`[^`\n]*`|https?://\S+|\\[a-zA-Z]+|<[^<>\n]{1,40}>", re.DOTALL)
_ASKED = re.compile(
    r"translat|\b(in|into|to) (english|chinese|mandarin|japanese|korean|french|german|spanish|russian)\b"
    r"|翻译|译成|译为|英文|英语|中文|汉语|日语|日文|韩语|法语|德语|俄语|西班牙语",
    re.IGNORECASE,
)
_SCRIPTS = {
    "CJK": "han", "HIRAGANA": "kana", "KATAKANA": "kana", "HANGUL": "ko", "LATIN": "en", "CYRILLIC": "ru",
}  # fmt: skip
_SYLLABLES = ("han", "kana", "ko")
_LETTER = 0.25  # a letter says about a quarter of what a Chinese character says
_ENOUGH = 1.0
LANGUAGES = ("match", "any", "zh", "en", "ja", "ko", "ru")


def refuses(content: str, phrases: Sequence[str] = ()) -> bool:
    """Whether an answer begins by declining to answer, in English or Chinese, or with one of `phrases`."""
    folded = unicodedata.normalize("NFKC", content[: 2 * _OPENING]).replace("’", "'").casefold().strip()
    opening = folded[:_OPENING]
    return bool(_REFUSALS.search(opening)) or any(opening.startswith(p.casefold()) for p in phrases)


def languages(text: str) -> dict[str, float]:
    """Shares of a text's languages, told by their script: zh, ja, ko, en (Latin), ru, ...; {} if none shows.

    Code, addresses, tags and LaTeX commands do not count; Chinese characters with kana are Japanese.
    """
    weights: defaultdict[str, float] = defaultdict(float)
    for char, count in Counter(_CODE.sub(" ", text)).items():
        if char.isalpha():
            name = unicodedata.name(char, "").split(" ")[0]
            script = _SCRIPTS.get(name, name.lower())
            weights[script] += count * (1.0 if script in _SYLLABLES else _LETTER)
    han, kana = weights.pop("han", 0.0), weights.pop("kana", 0.0)
    weights["ja" if kana > 0.1 * (han + kana) else "zh"] = han + kana
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items() if weight} if total >= _ENOUGH else {}


def right_language(wanted: str, question: str, answer: str, talk: str = "") -> bool:
    """Whether the answer is mostly in the `wanted` language; what shows no language passes.

    "match" wants one that the question has too, or most of the talk before it, unless the question speaks of
    a language or of translating; "any" is content with all.
    """
    found = {} if wanted == "any" else languages(answer)
    if not found:
        return True
    main = max(found, key=lambda name: found[name])
    if wanted != "match":
        return main == wanted
    asked = languages(question)
    if not asked or asked.get(main, 0.0) >= 0.2 or _ASKED.search(question):
        return True
    return languages(talk).get(main, 0.0) >= 0.5
