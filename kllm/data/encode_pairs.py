"""Preference pairs and rated answers to documents.

A pair is one document: shared beginning | chosen | rejected. The shared beginning holds the tokens that
both conversations begin with, at most up to the first answer in which they differ; its last token stands
at the head of both answers instead, so that inside each part the label of a token is the next one. An
answer is trained as a whole, its first words too if both answers begin alike: in DPO they cancel, but
length-normalised and reference-free losses (SimPO, ORPO) and the SFT term count them. Earlier answers,
which are part of the prompt, are not trained.

Both sides of a pair go through the same augmentation: one system prompt, and empty think blocks kept
in both or removed from both. Drawn apart, a third of the pairs would differ by the block alone.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kllm.data.encode import (
    Arrays,
    ChatDocuments,
    Document,
    EncodeOptions,
    Encoder,
    Form,
    Request,
    TextEncoder,
    TooLong,
    arrays,
    encode_each,
    trained_end,
)
from kllm.data.formats import PreferenceRecord, RatedRecord
from kllm.data.messages import BadRow, Message
from kllm.tokenizer.chat import Encoded
from kllm.tokenizer.tokenizer import Tokenizer

Section = tuple[str, NDArray[np.uint32], NDArray[np.uint8]]


def encoder_for(kind: str, tokenizer: Tokenizer, options: EncodeOptions | None) -> Encoder:
    """The encoder of a kind of shard; texts need no options."""
    if kind == "text" or options is None:
        return TextEncoder(tokenizer)
    kinds = {"chat": ChatDocuments, "preference": PairDocuments, "rated": RatedDocuments}
    return kinds[kind](tokenizer, options)


class _AnswerDocuments(ChatDocuments):
    """Answers that must stay whole: only the oldest turns of a prompt may go for lack of room."""

    def _join(self, sides: Sequence[Arrays]) -> Form:
        raise NotImplementedError

    def _forms(self, view: list[Request], results: list[Encoded | BadRow]) -> tuple[Form, Form | None, bool]:
        try:
            return (*self._both(results), False)
        except TooLong:
            return (*self._both(self._without_old_turns(view)), True)

    def _both(self, results: Sequence[Encoded | BadRow]) -> tuple[Form, Form | None]:
        """(as rendered, without empty think blocks or None)."""
        sides = [arrays(result) for result in results]
        keep = self._options.keep_empty_think
        if keep >= 1:
            return self._join(sides), None
        without = [self._without_empty_think(*side) for side in sides]
        if all(len(less[0]) == len(side[0]) for less, side in zip(without, sides, strict=True)):
            return self._join(sides), None
        thoughtless = self._join(without)
        return (self._join(sides) if keep > 0 else thoughtless), thoughtless

    def _without_old_turns(self, view: list[Request]) -> Sequence[Encoded | BadRow]:
        """Encoded anew with as many of the oldest turns left out as it takes; system messages stay.

        Raises:
            TooLong: the last question and the answers alone are too long.
        """
        sides = [messages for messages, _ in view]
        lead, starts = _starts(sides)

        def encoded(start: int) -> Sequence[Encoded | BadRow]:
            return encode_each(self._encoder, [([*m[:lead], *m[start:]], tools) for m, tools in view])

        def fits(start: int) -> bool:
            try:
                self._both(encoded(start))
            except TooLong:
                return False
            return True

        at = bisect_left(starts, True, key=fits)
        if at == len(starts):
            raise TooLong(f"longer than seq_len ({self._options.seq_len}) even without earlier turns")
        return encoded(starts[at])


class PairDocuments(_AnswerDocuments):
    """Preference pairs; `seq_len` bounds each of the two conversations."""

    def _sides(self, record: PreferenceRecord) -> list[list[Message]]:
        return [[*record.prompt, *record.chosen], [*record.prompt, *record.rejected]]

    def _join(self, sides: Sequence[Arrays]) -> Form:
        (chosen, chosen_mask), (rejected, rejected_mask) = (
            (ids[: trained_end(mask)], mask[: trained_end(mask)]) for ids, mask in sides
        )
        common = _common(chosen, rejected)
        if common == min(len(chosen), len(rejected)):
            if len(chosen) == len(rejected):
                raise BadRow("chosen and rejected have the same tokens")
            raise BadRow("one side of the pair is only the other with more turns: nothing to compare")
        cut = _answer_start(chosen_mask, common)
        if not cut:
            raise BadRow("the pair has no prompt")
        longest = max(len(chosen), len(rejected))
        if longest > self._options.seq_len:
            raise TooLong(f"a side of the pair has {longest} tokens, seq_len is {self._options.seq_len}")
        untrained = np.zeros(cut, np.uint8)
        ids = np.concatenate([chosen, rejected[cut - 1 :]])
        mask = np.concatenate([untrained, chosen_mask[cut:], untrained[:1], rejected_mask[cut:]])
        return Form(ids, mask, (cut - 1, len(chosen) - cut + 1))

    def _labelled(self, document: Document, record: PreferenceRecord, forms: list[Form]) -> Document:
        document.splits = [form.split for form in forms]
        return document


class RatedDocuments(_AnswerDocuments):
    """Single answers with a rating; earlier answers in the prompt are not trained."""

    def _sides(self, record: RatedRecord) -> list[list[Message]]:
        whole = [*record.prompt, *record.completion]
        answered = any(message["role"] == "assistant" for message in record.prompt)
        return [whole, record.prompt] if answered else [whole]

    def _join(self, sides: Sequence[Arrays]) -> Form:
        ids, mask = sides[0]
        end = trained_end(mask)
        if len(sides) > 1:
            start = _answer_start(mask, _common(ids, sides[1][0]))
            mask = np.concatenate([np.zeros(start, np.uint8), mask[start:]])
        if end > self._options.seq_len:
            raise TooLong(f"the answer ends at token {end}, seq_len is {self._options.seq_len}")
        return Form(ids[:end], mask[:end])

    def _labelled(self, document: Document, record: RatedRecord, forms: list[Form]) -> Document:
        document.good = record.good
        return document


def sections(document: Document) -> list[Section]:
    """(name, ids, mask) of a document's first rendering, for display.

    A pair has prompt, chosen and rejected, every token once; other documents have one nameless section.
    """
    ids, mask = document.renderings[0]
    known = np.ones(len(ids), np.uint8) if mask is None else mask
    if document.splits is None:
        return [("", ids, known)]
    shared, chosen = document.splits[0]
    cuts = {
        "prompt": slice(0, shared + 1),
        "chosen": slice(shared + 1, shared + chosen),
        "rejected": slice(shared + chosen + 1, len(ids)),
    }
    return [(name, ids[cut], known[cut]) for name, cut in cuts.items()]


def _common(a: NDArray[np.uint32], b: NDArray[np.uint32]) -> int:
    """Number of tokens that both begin with."""
    shortest = min(len(a), len(b))
    differ = np.flatnonzero(a[:shortest] != b[:shortest])
    return int(differ[0]) if len(differ) else shortest


def _answer_start(mask: NDArray[np.uint8], place: int) -> int:
    """Where the trained run that reaches up to `place` begins; `place` itself if none does."""
    untrained = np.flatnonzero(mask[:place] == 0)
    return int(untrained[-1]) + 1 if len(untrained) else 0


def _starts(sides: Sequence[Sequence[Message]]) -> tuple[int, list[int]]:
    """(leading system messages, user messages of the common prompt at which the rest may begin)."""
    if len(sides) < 2:
        return 0, []
    first, second = sides
    lead = shared = 0
    while lead < len(first) and first[lead]["role"] == "system":
        lead += 1
    while shared < min(len(first), len(second)) and first[shared] == second[shared]:
        shared += 1
    return lead, [at for at in range(lead + 1, shared) if first[at]["role"] == "user"]
