"""Training a byte-level BPE tokenizer in bounded memory.

Text streams through a word counter (`words`), merges are learnt from the counts (`bpe`), and the result is
written as the tokenizer that other programs read unchanged: their pre-tokenizer pattern, no normaliser,
every byte in the alphabet, so any text comes back exactly. The same texts give the same file, byte for byte.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from kllm.errors import UserError
from kllm.tokenizer.bpe import learn_merges
from kllm.tokenizer.pieces import byte_alphabet
from kllm.tokenizer.source import Source, bpe_spec, template_text
from kllm.tokenizer.template import DEFAULT_TEMPLATE, compile_template
from kllm.tokenizer.tokenizer import Tokenizer
from kllm.tokenizer.words import PATTERN, WordCounter

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TAG_TOKENS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")

_CONFIG: dict[str, Any] = {
    "bos_token": None,
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "unk_token": None,
    "add_bos_token": False,
    "add_prefix_space": False,
    "split_special_tokens": False,
    "model_max_length": 131072,
}

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class TrainReport:
    """What a training saw and made.

    Attributes:
        documents: texts read.
        bytes_read: their UTF-8 bytes, at most `max_bytes`.
        capped: whether text was left unread because of `max_bytes`.
        max_bytes: the cap.
        words: word occurrences counted.
        distinct_words: entries of the word table at the end.
        pruned_words: occurrences that were dropped to keep the table small.
        vocab_size: entries of the vocabulary, added tokens included.
        wanted_vocab_size: what was asked for; larger than `vocab_size` when the text has too few pairs.
        count_seconds, merge_seconds: wall time.
    """

    documents: int
    bytes_read: int
    capped: bool
    max_bytes: int
    words: int
    distinct_words: int
    pruned_words: int
    vocab_size: int
    wanted_vocab_size: int
    count_seconds: float
    merge_seconds: float

    def notes(self) -> list[str]:
        """What a user should know about the result, one line each."""
        notes = []
        if self.capped:
            notes.append(f"read the first {self.bytes_read / 1e6:,.1f} MB only (max_bytes)")
        if self.vocab_size < self.wanted_vocab_size:
            notes.append(
                f"the text gives {self.vocab_size:,} tokens, not {self.wanted_vocab_size:,}: "
                "more text or a lower min_frequency gives more"
            )
        if self.pruned_words:
            share = self.pruned_words / max(self.words, 1)
            notes.append(f"{share:.1%} of the words were too rare to be kept in the table")
        return notes


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    *,
    max_bytes: int = 256 << 20,
    min_frequency: int = 2,
    han_cut: int = 2,
    reserved: int = 16,
    chat_template: str | None = None,
    progress: Progress | None = None,
) -> tuple[Tokenizer, TrainReport]:
    """Trains a tokenizer on streamed texts.

    Args:
        texts: read once, never held.
        vocab_size: entries wanted, added tokens and the 256 bytes included.
        max_bytes: stop reading after that many UTF-8 bytes.
        min_frequency: a pair seen less often is never merged.
        han_cut: longest run of Han characters that can become one token; 0 for no limit of its own.
        reserved: spare added tokens `<|buffer1|>` ... for later use.
        chat_template: template text or the path of a .jinja file; `DEFAULT_TEMPLATE` if None.
        progress: called with ("count", bytes read, max_bytes) and ("merge", merges done, merges wanted).

    Raises:
        UserError: no text at all, a vocabulary too small for the bytes and the added tokens, a broken
            chat template.
    """
    added = _added_tokens(reserved, vocab_size)
    template, where = template_text(chat_template) if chat_template else (DEFAULT_TEMPLATE, "")
    compile_template(template, where)
    start = time.perf_counter()
    feed = _Feed(texts, max_bytes, progress)
    counter = WordCounter(han_cut)
    for text in feed:
        counter.add(text)
    counts = counter.finish()
    counted = time.perf_counter()
    if not counts:
        raise UserError("no text to train a tokenizer on", where="data", hint="check the data files")
    words, distinct = counts.total() + counter.pruned, len(counts)
    merges = _learn(counts, vocab_size - len(added) - 256, min_frequency, progress)
    source = Source("trained tokenizer", json.dumps(_spec(added, merges)), dict(_CONFIG))
    tokenizer = Tokenizer(source, template)
    return tokenizer, TrainReport(
        documents=feed.documents,
        bytes_read=feed.bytes_read,
        capped=feed.capped,
        max_bytes=max_bytes,
        words=words,
        distinct_words=distinct,
        pruned_words=counter.pruned,
        vocab_size=tokenizer.vocab_size,
        wanted_vocab_size=vocab_size,
        count_seconds=counted - start,
        merge_seconds=time.perf_counter() - counted,
    )


def _added_tokens(reserved: int, vocab_size: int) -> list[str]:
    added = [*SPECIAL_TOKENS, *TAG_TOKENS, *(f"<|buffer{i + 1}|>" for i in range(reserved))]
    least = len(added) + 256
    if vocab_size < least:
        raise UserError(
            f"a vocabulary of {vocab_size} is too small: {len(added)} added tokens + 256 bytes",
            where="vocab_size",
            hint=f"take at least {least + 1}",
        )
    return added


def _learn(
    counts: Counter[str], tokens: int, min_frequency: int, progress: Progress | None
) -> list[tuple[int, int, int]]:
    def report(done: int) -> None:
        if progress:
            progress("merge", done, tokens)

    return learn_merges(*_word_arrays(counts), tokens=tokens, min_frequency=min_frequency, progress=report)


class _Feed:
    """The texts up to `max_bytes`, counted."""

    def __init__(self, texts: Iterable[str], max_bytes: int, progress: Progress | None) -> None:
        self.documents = 0
        self.bytes_read = 0
        self.capped = False
        self._texts, self._max, self._progress = texts, max_bytes, progress

    def __iter__(self) -> Iterator[str]:
        reported = 0
        for text in self._texts:
            if self.bytes_read >= self._max:
                self.capped = True
                return
            size = _utf8_size(text)
            room = self._max - self.bytes_read
            if size > room:
                self.capped = True
                text = text.encode("utf-8", "replace")[:room].decode("utf-8", "ignore")
                size = room
            self.documents += 1
            self.bytes_read += size
            yield text
            if self._progress and self.bytes_read - reported >= 1 << 20:
                reported = self.bytes_read
                self._progress("count", self.bytes_read, self._max)


def _utf8_size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "replace"))


def _word_arrays(counts: Counter[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(symbols, lengths, counts) of the table, which is emptied; a symbol is a byte's alphabet rank."""
    occurrences = np.fromiter(counts.values(), np.int64, count=len(counts))
    words = [word.encode("utf-8", "replace") for word in counts]
    counts.clear()
    lengths = np.fromiter(map(len, words), np.int32, count=len(words))
    rank = np.empty(256, np.uint8)
    rank[np.argsort([ord(char) for char in byte_alphabet()])] = np.arange(256)
    return rank[np.frombuffer(b"".join(words), np.uint8)], lengths, occurrences


def _spec(added: list[str], merges: list[tuple[int, int, int]]) -> dict[str, Any]:
    """tokenizer.json: added tokens first, then the bytes, then the merges in the order they were learnt."""
    symbols = sorted(byte_alphabet(), key=ord)
    pairs = []
    for first, second, made in merges:
        pairs.append([symbols[first], symbols[second]])
        if made == len(symbols):
            symbols.append(symbols[first] + symbols[second])
    vocab = {token: index for index, token in enumerate(dict.fromkeys([*added, *symbols]))}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
    return bpe_spec(
        vocab,
        pairs,
        [(index, token, token in SPECIAL_TOKENS) for index, token in enumerate(added)],
        {"type": "Sequence", "pretokenizers": [split, level]},
        {**level, "add_prefix_space": True, "use_regex": True},
    )
