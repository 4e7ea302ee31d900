"""One text under two tokenizers: re-encoding, and which places of the two token rows are the same place.

Control tokens are carried over one to one (same text, else same role: end, start, end of document) and
what lies between them is encoded as plain text. Two places are the same when equal bytes of the text
have been read, so that both models are asked for the continuation of the same words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from kllm.errors import UserError
from kllm.tokenizer.pieces import WindowDecoder
from kllm.tokenizer.tokenizer import Tokenizer


@dataclass
class Translated:
    """A document in the other vocabulary.

    tokens: int64 [m]. read: int64 [m], bytes of the text up to and including each token (a control
    token counts as one byte), rising. exact: bool [m], False where the bytes could not be attributed
    to tokens (a tokenizer that changes its text) and `read` is only an estimate in proportion.
    source_read: int64 [n], the same for the tokens that were translated, always exact.
    """

    tokens: np.ndarray
    read: np.ndarray
    exact: np.ndarray
    source_read: np.ndarray


class Translator:
    """Re-encodes documents of one tokenizer for another.

    Args:
        source: whose ids are given.
        target: whose ids are wanted.

    Raises:
        UserError: the source's text is not the concatenation of its tokens (WordPiece).
    """

    def __init__(self, source: Tokenizer, target: Tokenizer) -> None:
        if isinstance(source.stream_decoder(), WindowDecoder):
            raise UserError(
                "the student's tokenizer does not tell which text each token stands for",
                where="distill.divergence",
                hint="give the student a byte-level or SentencePiece tokenizer",
            )
        self.target = target
        self._pieces = [source.bytes_of(i) for i in range(source.vocab_size)]
        self._control = _same_control(source, target)
        self._lengths = np.fromiter((len(p) for p in self._pieces), np.int64, count=len(self._pieces))
        self._is_control = np.zeros(len(self._pieces), dtype=bool)
        self._is_control[list(self._control)] = True
        self._lengths[self._is_control] = 1
        self._start = target.bos_token_id if target.adds_bos else None

    def __call__(self, documents: Sequence[np.ndarray]) -> list[Translated]:
        """Translates documents of ids int64 [n]; ids beyond the vocabulary stand for nothing."""
        runs: list[bytes] = []
        plans: list[list[int]] = []  # of a document: control tokens as ~id, runs as their numbers
        for ids in documents:
            plan: list[int] = []
            known = ids[ids < len(self._pieces)]
            control = np.flatnonzero(self._is_control[known])
            for a, b in pairwise([-1, *control.tolist(), len(known)]):
                if a >= 0:
                    plan.append(~self._control[int(known[a])])
                if b > a + 1:
                    plan.append(len(runs))
                    runs.append(b"".join([self._pieces[i] for i in known[a + 1 : b]]))
            plans.append(plan)
        encoded = self.target.encode_batch([run.decode("utf-8", "replace") for run in runs])
        return [self._assemble(d, p, runs, encoded) for d, p in zip(documents, plans, strict=True)]

    def _assemble(
        self, ids: np.ndarray, plan: list[int], runs: list[bytes], encoded: list[list[int]]
    ) -> Translated:
        tokens: list[int] = []
        read: list[np.ndarray] = []
        exact: list[np.ndarray] = []
        at = 0
        if self._start is not None and plan[:1] != [~self._start]:
            tokens, read, exact = [self._start], [np.zeros(1, dtype=np.int64)], [np.zeros(1, dtype=bool)]
        for step in plan:
            if step < 0:
                tokens.append(~step)
                read.append(np.array([at + 1]))
                exact.append(np.ones(1, dtype=bool))
                at += 1
                continue
            ends, sure = self._ends(encoded[step], runs[step])
            tokens += encoded[step]
            read.append(at + ends)
            exact.append(sure)
            at += len(runs[step])
        return Translated(
            np.array(tokens, dtype=np.int64),
            np.concatenate(read) if read else np.empty(0, dtype=np.int64),
            np.concatenate(exact) if exact else np.empty(0, dtype=bool),
            np.where(ids < len(self._lengths), self._lengths[np.minimum(ids, len(self._lengths) - 1)], 0)
            .cumsum()
            .astype(np.int64),
        )

    def _ends(self, ids: list[int], run: bytes) -> tuple[np.ndarray, np.ndarray]:
        """Bytes of `run` read after each token, and where that is certain."""
        pieces = [self.target.bytes_of(i) for i in ids]
        text = b"".join(pieces)
        if text in (run, b" " + run):  # SentencePiece puts a space before what it encodes
            ends = np.cumsum([len(p) for p in pieces], dtype=np.int64) - (len(text) - len(run))
            return np.maximum(ends, 0), np.ones(len(ids), dtype=bool)
        sure = np.zeros(len(ids), dtype=bool)
        sure[-1:] = True
        return np.arange(1, len(ids) + 1) * len(run) // max(len(ids), 1), sure


def _same_control(source: Tokenizer, target: Tokenizer) -> dict[int, int]:
    """Control tokens of `source` -> those of `target` that mean the same."""
    roles = {source.eos_token_id: target.eos_token_id, source.eot_token_id: target.eot_token_id}
    if source.bos_token_id is not None and target.bos_token_id is not None:
        roles[source.bos_token_id] = target.bos_token_id
    named = {text: index for text, (index, _, _) in target.control_tokens.items()}
    pairs = {
        index: named.get(text, roles.get(index)) for text, (index, _, _) in source.control_tokens.items()
    }
    return {a: b for a, b in pairs.items() if b is not None}


def same_places(labelled: np.ndarray, translated: Translated, by: str = "offsets") -> np.ndarray:
    """Pairs of places [pairs, 2]: (place in the source, place in the translation), rising.

    Args:
        labelled: bool [n], the places of the source that are asked for (whose next token is learned).
        translated: of the same document.
        by: "offsets": the same text has been read at both; "order": the first of each stretch with the
            first, and so on until the shorter ends, as Boizard et al. 2024 (arXiv 2402.12030) pair them.
    """
    asked = np.flatnonzero(labelled)
    if by == "offsets":
        places = np.flatnonzero(translated.exact)
        if not len(asked) or not len(places):
            return np.empty((0, 2), dtype=np.int64)
        read = translated.read[places]
        wanted = translated.source_read[asked]
        found = np.searchsorted(read, wanted, side="right") - 1
        same = (found >= 0) & (read[found] == wanted)
        return np.stack((asked[same], places[found[same]]), axis=1)
    pairs = [np.empty((0, 2), dtype=np.int64)]
    for stretch in np.split(asked, np.flatnonzero(np.diff(asked) != 1) + 1):
        if not len(stretch):
            continue
        first, last = translated.source_read[stretch[[0, -1]]]
        a, b = np.searchsorted(translated.read, first), np.searchsorted(translated.read, last, side="right")
        n = min(len(stretch), int(b - a))
        pairs.append(np.stack((stretch[:n], np.arange(a, a + n)), axis=1))
    return np.concatenate(pairs)
