"""Tokenizers in GGUF metadata, both ways.

Byte-level BPE is stored as tokens, merges and the *name* of a pre-tokenizer whose pattern llama.cpp has in
its code: a wrong name goes unnoticed and splits text differently, so an unknown pattern is refused.
SentencePiece-type BPE is stored as tokens with scores.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from kllm.errors import UserError
from kllm.tokenizer.source import Source, bpe_spec
from kllm.tokenizer.tokenizer import Tokenizer
from kllm.tokenizer.words import PATTERN

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""llama.cpp's token types."""

_LLAMA3 = PATTERN.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)
_QWEN35 = PATTERN.replace(r"]?\p{L}+", r"]?[\p{L}\p{M}]+", 1).replace(
    r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]"
)
_SPLITS = {"qwen2": PATTERN, "llama-bpe": _LLAMA3, "qwen35": _QWEN35}
_SAME = {
    "smollm": ("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    "gpt-2": ("gpt2", "phi-2", "roberta-bpe", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de"),
    "qwen2": ("deepseek-r1-qwen", "megrez"),
    "llama-bpe": ("llama3", "llama-v3", "falcon3", "pixtral"),
}
_CANONICAL = {other: name for name, others in _SAME.items() for other in others}
_GENERATION = re.compile(r"{%(-?)\s*(end)?generation\s*(-?)%}")


def tokenizer_metadata(tokenizer: Tokenizer, rows: int) -> dict[str, Any]:
    """`tokenizer.*` keys: lists, ints, bools and strings.

    Args:
        tokenizer: byte-level BPE of a known pattern, or SentencePiece-type BPE.
        rows: of the embedding; tokens beyond the tokenizer are named `[PADn]`.

    Raises:
        UserError: llama.cpp has no pre-tokenizer that splits as this one does.
    """
    spec = tokenizer.spec()
    sentencepiece = bool(spec["model"].get("byte_fallback"))
    if spec["model"].get("type") != "BPE":
        raise UserError(f"a {spec['model'].get('type')} tokenizer has no GGUF form here", where="tokenizer")
    tokens, types = _tokens_and_types(tokenizer, rows)
    bos = tokenizer.bos_token_id
    keys: dict[str, Any] = {
        "tokenizer.ggml.model": "llama" if sentencepiece else "gpt2",
        "tokenizer.ggml.pre": "default" if sentencepiece else pre_tokenizer_name(spec),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
        "tokenizer.ggml.padding_token_id": tokenizer.pad_token_id,
        # written even if there is none: llama.cpp's default is id 11
        "tokenizer.ggml.bos_token_id": tokenizer.eot_token_id if bos is None else bos,
        "tokenizer.ggml.add_bos_token": bos is not None and tokenizer.adds_bos,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": sentencepiece and _prepends(spec),
    }
    merges = [m if isinstance(m, str) else " ".join(m) for m in spec["model"]["merges"]]
    if sentencepiece:
        keys["tokenizer.ggml.scores"] = _scores(tokens, merges)
        unknown = tokenizer.token_to_id(spec["model"].get("unk_token") or "")
        if unknown is not None:
            keys["tokenizer.ggml.unknown_token_id"] = unknown
            types[unknown] = UNKNOWN
    else:
        keys["tokenizer.ggml.merges"] = merges
    if tokenizer.chat_template:
        keys["tokenizer.chat_template"] = plain_template(tokenizer.chat_template)
    return keys


def plain_template(template: str) -> str:
    """The template without `{% generation %}`, which many readers do not know; its text stays the same."""
    return _GENERATION.sub(lambda m: f"{{%{m[1]} {'endif' if m[2] else 'if true'} {m[3]}%}}", template)


def _tokens_and_types(tokenizer: Tokenizer, rows: int) -> tuple[list[str], list[int]]:
    special = set(tokenizer.special_tokens.values())
    added = {index: text for text, index in tokenizer.added_tokens.items()}
    tokens, types = [], []
    for i in range(rows):
        token = added.get(i, tokenizer.id_to_token(i) if i < tokenizer.vocab_size else None)
        if token is None:
            tokens.append(f"[PAD{i}]")
            types.append(UNUSED)
            continue
        tokens.append(token)
        if i in added:
            types.append(CONTROL if i in special else USER_DEFINED)
        else:
            types.append(BYTE if re.fullmatch(r"<0x[0-9A-F]{2}>", token) else NORMAL)
    return tokens, types


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """Scores that make llama.cpp merge in the order of `merges`: minus the first rank of a token."""
    rank: dict[str, int] = {}
    for i, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", ""), i)
    return [-float(rank[token]) if token in rank else 0.0 for token in tokens]


def _prepends(spec: Mapping[str, Any]) -> bool:
    normalizer = spec.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    pre = spec.get("pre_tokenizer") or {}
    return any(s.get("type") == "Prepend" for s in steps) or (
        pre.get("type") == "Metaspace" and pre.get("prepend_scheme", "always") != "never"
    )


def pre_tokenizer_name(spec: Mapping[str, Any]) -> str:
    """`tokenizer.ggml.pre` of a byte-level BPE tokenizer.json."""
    pre = spec.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", [pre])
    kinds = [step.get("type") for step in steps]
    last = steps[-1]
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space"):
        whole = last.get("use_regex", True)
        if kinds == ["ByteLevel"] and whole:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and whole and steps[0].get("individual_digits"):
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not whole and not steps[0].get("invert"):
            pattern = (steps[0].get("pattern") or {}).get("Regex")
            for name, known in _SPLITS.items():
                if pattern == known and steps[0].get("behavior") == "Isolated":
                    return name
    raise UserError(
        f"llama.cpp has no pre-tokenizer that splits as {json.dumps(pre, ensure_ascii=False)[:300]}",
        where="tokenizer",
        hint="known: the patterns of qwen2, gpt-2, smollm, llama-bpe and qwen35",
    )


def tokenizer_from_metadata(fields: Mapping[str, Any], where: str) -> Tokenizer:
    """The tokenizer that a GGUF file's `tokenizer.*` keys describe.

    Raises:
        UserError: a model or a pre-tokenizer that cannot be rebuilt.
    """
    ggml = {k.removeprefix("tokenizer.ggml."): v for k, v in fields.items() if k.startswith("tokenizer.")}
    tokens, kind = ggml.get("tokens"), ggml.get("model")
    if not tokens:
        raise UserError("no tokenizer in the GGUF file", where=where, hint="give one: --tokenizer DIR")
    hint = "give the original: --tokenizer DIR"
    if kind not in ("gpt2", "llama"):
        message = f"a tokenizer of type {kind!r} cannot be rebuilt from GGUF"
        raise UserError(message, where=where, hint=hint)
    try:
        types = ggml.get("token_type") or [NORMAL] * len(tokens)
        rebuild = _bpe if kind == "gpt2" else _sentencepiece
        spec, config = rebuild(tokens, types, ggml, where), _config(tokens, ggml)
    except (TypeError, ValueError, LookupError, AttributeError):
        message = "the lists of its tokenizer do not fit together"
        raise UserError(message, where=where, hint=hint) from None
    template = fields.get("tokenizer.chat_template")
    try:
        return Tokenizer(Source(where, json.dumps(spec, ensure_ascii=False), config, template or None))
    except UserError as e:  # its own words name a tokenizer.json
        raise UserError(f"its tokenizer cannot be rebuilt: {e.message}", where=where, hint=hint) from None


def _config(tokens: list[str], ggml: Mapping[str, Any]) -> dict[str, Any]:
    def name(key: str) -> str | None:
        index = ggml.get(f"{key}_token_id")
        return tokens[index] if isinstance(index, int) and 0 <= index < len(tokens) else None

    add_bos = ggml.get("add_bos_token", ggml.get("model") == "llama")
    return {
        "bos_token": name("bos")
        if add_bos or ggml.get("bos_token_id") != ggml.get("padding_token_id")
        else None,
        "eos_token": name("eos"),
        "pad_token": name("padding"),
        "unk_token": name("unknown"),
        "add_bos_token": bool(add_bos),
        "add_prefix_space": False,
    }


def _added(tokens: list[str], types: list[int]) -> list[tuple[int, str, bool]]:
    kinds = (UNKNOWN, CONTROL, USER_DEFINED)
    return [
        (i, token, kind != USER_DEFINED)
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in kinds
    ]


def _bpe(tokens: list[str], types: list[int], ggml: Mapping[str, Any], where: str) -> dict[str, Any]:
    name = str(ggml.get("pre"))
    name = _CANONICAL.get(name, name)
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    inner = {**level, "use_regex": False}
    if name == "gpt-2":
        pre: dict[str, Any] = level
    elif name == "smollm":
        digits = {"type": "Digits", "individual_digits": True}
        pre = {"type": "Sequence", "pretokenizers": [digits, level]}
    elif name in _SPLITS:
        pattern = {"Regex": _SPLITS[name]}
        split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
        pre = {"type": "Sequence", "pretokenizers": [split, inner]}
    else:
        raise UserError(
            f"the pre-tokenizer {name!r} is not known here",
            where=where,
            hint="give the original tokenizer: --tokenizer DIR",
        )
    vocab = {t: i for i, (t, kind) in enumerate(zip(tokens, types, strict=True)) if kind != UNUSED}
    merges = [_split_merge(merge) for merge in ggml.get("merges") or []]
    spec = bpe_spec(vocab, merges, _added(tokens, types), pre, level)
    spec["model"]["ignore_merges"] = name == "llama-bpe"
    if ggml.get("add_bos_token") and isinstance(ggml.get("bos_token_id"), int):
        spec["post_processor"] = _prefix(tokens[ggml["bos_token_id"]], ggml["bos_token_id"])
    return spec


def _split_merge(merge: str) -> list[str]:
    left, _, right = merge.partition(" ")
    return [left, right]


def _sentencepiece(
    tokens: list[str], types: list[int], ggml: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """tokenizer.json of a SentencePiece BPE: every way to halve a token is a merge, best scores first."""
    vocab = {t: i for i, (t, kind) in enumerate(zip(tokens, types, strict=True)) if kind != UNUSED}
    scores = ggml.get("scores") or [0.0] * len(tokens)
    normal = {t for t, i in vocab.items() if types[i] in (NORMAL, USER_DEFINED)}
    merges: list[tuple[float, int, int, str, str]] = []
    for token in normal:
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in normal and right in normal:
                merges.append((-scores[vocab[token]], vocab[left], vocab[right], left, right))
    merges.sort()
    spec = bpe_spec(vocab, [[left, right] for *_, left, right in merges], _added(tokens, types), {}, {})
    unknown = ggml.get("unknown_token_id")
    spec["model"] |= {
        "unk_token": tokens[unknown] if isinstance(unknown, int) else None,
        "fuse_unk": True,
        "byte_fallback": True,
    }
    prepend = ggml.get("add_space_prefix", True)
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    steps = [*([{"type": "Prepend", "prepend": "▁"}] if prepend else []), space]
    back = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prepend else []),
    ]
    spec |= {
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": back},
    }
    if ggml.get("add_bos_token", True) and isinstance(ggml.get("bos_token_id"), int):
        spec["post_processor"] = _prefix(tokens[ggml["bos_token_id"]], ggml["bos_token_id"])
    return spec


def _prefix(token: str, index: int) -> dict[str, Any]:
    """A post-processor that puts `token` in front."""
    first = {"SpecialToken": {"id": token, "type_id": 0}}
    a, b = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [first, a],
        "pair": [first, a, {**first, "SpecialToken": {"id": token, "type_id": 1}}, b],
        "special_tokens": {token: {"id": token, "ids": [index], "tokens": [token]}},
    }
