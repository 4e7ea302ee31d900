"""Each answer of a batch behind the question of another: what KTO measures its reference point on."""

from __future__ import annotations

import numpy as np
import torch

from kllm.data.batch import IGNORE, Batch, Sequences


def mismatched(batch: Batch) -> Batch | None:
    """A batch of the same questions, each with the answer of the sequence before it.

    Of pairs it is the answer two sequences before: the neighbour answers the same question. Sequences
    are laid out whole, with no shared beginnings (Ethayarajh et al. 2024, arXiv 2402.01306, 4.1).

    Args:
        batch: with `sequences`, on any device; the answer of a sequence begins with its first label.

    Returns:
        The batch on the same device, or None if it has only one question.
    """
    sequences = batch.sequences
    assert sequences is not None
    labels = batch.labels.cpu().numpy()
    owner = sequences.index.cpu().numpy()
    scored = np.flatnonzero(owner >= 0)
    present, first = np.unique(owner[scored], return_index=True)
    starts = scored[first]  # the token whose label begins each answer
    borders = batch.cu_seqlens.numpy().astype(np.int64)
    segments = np.searchsorted(borders, starts, side="right") - 1
    ends = borders[segments + 1]
    parents = np.full(len(starts), -1) if batch.parents is None else batch.parents.numpy()[segments]
    shift = 2 if sequences.good is None else 1
    if len(present) <= shift:
        return None
    rows, targets, counts = [], [], []
    for i in range(len(starts)):
        j = i - shift  # of a negative number: from the end
        question = np.arange(borders[segments[i]], starts[i] + 1)
        if parents[i] >= 0:
            question = np.concatenate([np.arange(borders[parents[i]], borders[parents[i] + 1]), question])
        rows.append(np.concatenate([question, np.arange(starts[j] + 1, ends[j])]))
        targets.append(np.concatenate([np.full(len(question) - 1, IGNORE), labels[starts[j] : ends[j]]]))
        counts.append(len(rows[-1]))
    ends_after = np.cumsum(counts)
    number = np.repeat(np.arange(len(counts)), counts)
    new_labels = np.concatenate(targets)
    whole = Batch(
        tokens=batch.tokens[torch.from_numpy(np.concatenate(rows)).to(batch.tokens.device)],
        labels=torch.from_numpy(new_labels),
        positions=torch.from_numpy(np.arange(len(number)) - np.repeat(ends_after - counts, counts)),
        cu_seqlens=torch.from_numpy(np.concatenate([[0], ends_after]).astype(np.int32)),
        sequences=Sequences(torch.from_numpy(np.where(new_labels == IGNORE, -1, number)), len(counts)),
    )
    return whole.to(batch.tokens.device)
