"""Gives a model another tokenizer: rows of shared tokens are kept, new ones start as what they spell."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from kllm.model.transformer import Transformer
from kllm.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class VocabularyChange:
    """How the rows of the new vocabulary came about."""

    rows: int
    kept: int
    """Tokens that both vocabularies have, by their string."""
    from_pieces: int
    """The mean of the rows that the old tokenizer splits the new token into."""
    from_mean: int
    """Nothing in common: the mean of all old rows."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def change_vocabulary(
    model: Transformer, old: Tokenizer, new: Tokenizer
) -> tuple[Transformer, VocabularyChange]:
    """A model for `new` with everything but the embeddings (and the head) of `model`.

    Rows that stand for the same token string are copied bit for bit. Another one is the mean of the
    rows of its pieces, so that a text means about the same in its new tokens (Hewitt 2021).

    Args:
        model: any device and dtype; unchanged.
        old: its tokenizer.
        new: the tokenizer to have.
    """
    pieces, kept, from_mean = _pieces(model.shape.vocab_size, old, new)
    state = dict(model.state_dict())
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = _rows(state[name], pieces)
    shape = model.shape.with_(vocab_size=new.vocab_size)
    with torch.device("meta"):
        changed = Transformer(shape)
    changed.load_state_dict(state, assign=True)
    if shape.tie_word_embeddings:
        changed.lm_head.weight = changed.model.embed_tokens.weight
    report = VocabularyChange(new.vocab_size, kept, new.vocab_size - kept - from_mean, from_mean)
    return changed.to(model.head_weight.device), report


def _pieces(old_rows: int, old: Tokenizer, new: Tokenizer) -> tuple[list[list[int]], int, int]:
    """Old ids behind every new id (none: the mean of all), how many are the same token, how many none."""
    roles = {text: old.role_tokens[role] for role, text in new.role_tokens.items() if role in old.role_tokens}
    control = set(new.added_tokens)
    single = {old.bytes_of(j): j for j in range(old.vocab_size) if len(old.bytes_of(j)) == 1}
    pieces: list[list[int]] = []
    kept = 0
    for i in range(new.vocab_size):
        token = new.id_to_token(i)
        same = None if token is None else old.token_to_id(token)
        if same is None and token in roles:  # an end token is an end token under any name
            same = old.token_to_id(roles[token])
        if same is not None and same < old_rows:
            pieces.append([same])
            kept += 1
        elif token is None or token in control:
            pieces.append([])
        else:
            pieces.append([p for p in _spelled(new, i, old, single) if p < old_rows])
    return pieces, kept, sum(not p for p in pieces)


def _spelled(new: Tokenizer, token_id: int, old: Tokenizer, single: dict[bytes, int]) -> list[int]:
    """The old tokens of a new one's text; of its bytes where they are only a part of a character."""
    data = new.bytes_of(token_id)
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return [single[data[k : k + 1]] for k in range(len(data)) if data[k : k + 1] in single]
    return old.encode(new.decode([token_id]))


def _rows(weight: Tensor, pieces: list[list[int]]) -> Tensor:
    mean = weight.float().mean(0)
    rows = [
        weight[p[0]] if len(p) == 1 else (weight[p].float().mean(0) if p else mean).to(weight.dtype)
        for p in pieces
    ]
    return torch.stack(rows).contiguous()
