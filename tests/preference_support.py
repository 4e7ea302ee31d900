"""Preference batches made by hand, and the same answers as plain sequences."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from kllm.data.batch import IGNORE, Batch, Sequences
from kllm.model.presets import PRESETS

TINY = PRESETS["k-tiny"].with_(
    vocab_size=101, hidden_size=32, intermediate_size=48, head_dim=8, num_hidden_layers=2
)
MOE = TINY.with_(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, router_aux_loss_coef=0.01)


@dataclass
class Answer:
    """A prompt and one answer, token ids."""

    prompt: list[int]
    answer: list[int]
    good: bool

    @property
    def tokens(self) -> Tensor:
        return torch.tensor([*self.prompt, *self.answer])


def random_answers(pairs: int, seed: int = 0, vocab: int = 101, longest: int = 9) -> list[Answer]:
    """chosen, rejected, chosen, ...; both of a pair have one prompt. No token is 0, the pad of others."""
    rng = np.random.default_rng(seed)
    answers = []
    for _ in range(pairs):
        prompt = rng.integers(1, vocab, rng.integers(2, longest)).tolist()
        lengths = rng.integers(1, longest, 2)
        chosen, rejected = (rng.integers(1, vocab, n).tolist() for n in lengths)
        answers += [Answer(prompt, chosen, True), Answer(prompt, rejected, False)]
    return answers


def _flat(segments: list[tuple[list[int], int, int, int]]) -> Batch:
    """Segments are (tokens, first labelled place or -1, parent, sequence)."""
    tokens, labels, positions, index, lengths = [], [], [], [], []
    sizes = [len(s[0]) for s in segments]
    for ids, first, parent, sequence in segments:
        after = [*ids[1:], IGNORE]
        labelled = [y if 0 <= first <= i else IGNORE for i, y in enumerate(after)]
        before = sizes[parent] if parent >= 0 else 0
        tokens += ids
        labels += labelled
        positions += range(before, before + len(ids))
        index += [-1 if y == IGNORE else sequence for y in labelled]
        lengths.append(len(ids))
    return Batch(
        tokens=torch.tensor(tokens),
        labels=torch.tensor(labels),
        positions=torch.tensor(positions),
        cu_seqlens=torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
        parents=torch.tensor([s[2] for s in segments], dtype=torch.int32),
        sequences=Sequences(torch.tensor(index), 1 + max(s[3] for s in segments)),
    )


def pair_batch(answers: list[Answer]) -> Batch:
    """prompt without its last token | that token + chosen | that token + rejected, for each pair."""
    segments: list[tuple[list[int], int, int, int]] = []
    for i in range(0, len(answers), 2):
        chosen, rejected = answers[i], answers[i + 1]
        parent = len(segments)
        segments.append((chosen.prompt[:-1], -1, -1, -1))
        segments.append(([chosen.prompt[-1], *chosen.answer], 0, parent, i))
        segments.append(([rejected.prompt[-1], *rejected.answer], 0, parent, i + 1))
    return _flat(segments)


def whole_batch(answers: list[Answer], rated: bool) -> Batch:
    """Each answer behind its own copy of the prompt; rated data, or pairs laid out apart."""
    batch = _flat([([*a.prompt, *a.answer], len(a.prompt) - 1, -1, i) for i, a in enumerate(answers)])
    assert batch.sequences is not None
    good = torch.tensor([a.good for a in answers]) if rated else None
    return replace(batch, parents=None, sequences=replace(batch.sequences, good=good))
