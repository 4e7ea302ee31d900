"""One record of a stage's data as the model will see it, with the trained part known. No torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from kllm.config.stages import TrainingStage
from kllm.data.encode import EncodeOptions
from kllm.data.encode_pairs import encoder_for, sections
from kllm.data.formats import TextRecord, records
from kllm.data.messages import BadRow
from kllm.data.sources import iter_records
from kllm.errors import UserError
from kllm.export.tokenizers import load_tokenizer
from kllm.tokenizer.tokenizer import Tokenizer

LOOK_AT = 20
MAX_TOKENS = 400


@dataclass(frozen=True)
class Sample:
    """spans: (text, trained) in order; tokens, trained: counts; stand_in: not the real tokenizer."""

    where: str
    spans: list[tuple[str, bool]]
    tokens: int
    trained: int
    stand_in: bool


def first_sample(stage: TrainingStage, tokenizer_dir: Path | None) -> Sample | None:
    """The first good record of the stage's first source; None if the first few are all bad.

    Args:
        tokenizer_dir: None while the tokenizer is not trained; a small stand-in is used then.

    Raises:
        UserError: the data cannot be read or is of another kind.
    """
    source, kind = stage.data[0].path, stage.data_kind
    template = stage.tokenizer.chat_template
    for where, raw in islice(iter_records(source), LOOK_AT):
        try:
            record = records(raw, kind)[0]
        except BadRow as bad:
            if type(bad) is not BadRow:  # the whole file is of another kind
                raise UserError(str(bad), where=where) from None
            continue
        tokenizer = _load(tokenizer_dir, template) if tokenizer_dir else _stand_in(record, template)
        options = None if kind == "text" else EncodeOptions(stage.dataset.seq_len)
        document = next(encoder_for(kind, tokenizer, options)([record]))
        if isinstance(document, BadRow):
            continue
        parts = sections(document)
        spans: list[tuple[str, bool]] = []
        for name, ids, mask in parts:
            if name and spans:
                spans.append((f"\n[{name}] ", False))
            spans += _spans(tokenizer, ids, mask.astype(bool))
        tokens = sum(len(ids) for _, ids, _ in parts)
        trained = sum(int(mask.sum()) for _, _, mask in parts)
        return Sample(where, spans, tokens, trained, tokenizer_dir is None)
    return None


def _spans(tokenizer: Tokenizer, ids: Any, trained: Any) -> list[tuple[str, bool]]:
    """Runs of equal mask as text; a long record is cut."""
    pairs = list(zip(ids.tolist(), trained.tolist(), strict=True))
    spans = []
    for flag, run in groupby(pairs[:MAX_TOKENS], key=lambda pair: pair[1]):
        spans.append((tokenizer.decode([i for i, _ in run], skip_special_tokens=False), bool(flag)))
    if len(pairs) > MAX_TOKENS:
        spans.append((f" ... {len(pairs) - MAX_TOKENS} more tokens", False))
    return spans


def _load(directory: Path, template: str | None) -> Tokenizer:
    text = Path(template).read_text(encoding="utf-8") if template else None
    return load_tokenizer(directory, chat_template=text)


def _stand_in(record: Any, template: str | None) -> Tokenizer:
    from kllm.tokenizer.train import train_tokenizer

    text = record.text if isinstance(record, TextRecord) else json.dumps(asdict(record), ensure_ascii=False)
    chat_template = Path(template).read_text(encoding="utf-8") if template else None
    return train_tokenizer([text], 400, chat_template=chat_template)[0]
