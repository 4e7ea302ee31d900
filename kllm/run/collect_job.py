"""What to collect: whom to ask, what, how many answers, and which of them to keep."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kllm.errors import UserError
from kllm.run.collect_client import Sampling
from kllm.run.collect_filter import BEST, Best, Rules


@dataclass(frozen=True)
class CollectJob:
    """What to ask, whom, and what to keep; see `Rules` for `rules` and `Sampling` for `sampling`.

    Attributes:
        prompts: sources of prompts: whatever `kllm.data` reads, a text file has one on each line.
        endpoint: base URL of an OpenAI-compatible server, or a model that kllm loads.
        out: the conversation file; `OUT.answers` beside it holds every answer that came.
        model: its name at the server; None takes the only one there.
        api_key: the server's key; None takes it from the environment variable `api_key_env`.
        system: said to the teacher before the prompt's own system message.
        keep_system: whether `system` stands in the conversations too; if not, the student learns to answer
            so without being told.
        parallel: questions under way at once.
        samples: most answers to each prompt.
        keep: most of them that are kept, chosen by `best`. With "first" no more answers are asked for than
            it takes to have `keep` good ones.
        seed: with the prompt and the number of the answer it gives each request's seed; None sends none.
        duplicates: similarity at which two conversations are near duplicates; 1 = equal ones only.
        plain_ratio: share of the kept answers with reasoning that are written a second time without it,
            behind an empty think block: teaches `enable_thinking=False`.
        limit: at most so many prompts.
        max_bad_rows: rows of the sources that are no prompts and are tolerated.
        retries, backoff, timeout: see `RemoteTeacher`.
        device: for a model on this machine.
    """

    prompts: Sequence[str]
    endpoint: str
    out: Path
    model: str | None = None
    api_key: str | None = field(default=None, repr=False)
    api_key_env: str = "OPENAI_API_KEY"
    system: str | None = None
    keep_system: bool = False
    parallel: int = 8
    samples: int = 1
    keep: int = 1
    best: Best = "first"
    seed: int | None = 0
    sampling: Sampling = Sampling()  # noqa: RUF009  (frozen)
    rules: Rules = Rules()  # noqa: RUF009
    duplicates: float = 0.9
    plain_ratio: float = 0.0
    limit: int | None = None
    max_bad_rows: int = 0
    retries: int = 6
    backoff: float = 1.0
    timeout: float = 600.0
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in ("parallel", "samples", "keep"):
            if getattr(self, name) < 1:
                raise UserError(f"must be at least 1, not {getattr(self, name)}", where=name)
        for name in ("duplicates", "plain_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"must be between 0 and 1, not {getattr(self, name)}", where=name)
        if self.best not in BEST:
            raise UserError(f"unknown: {self.best!r}", where="best", hint=f"known: {' '.join(BEST)}")
        if self.retries < 0:
            raise UserError(f"must be 0 or more, not {self.retries}", where="retries")
        if self.samples > 1 and self.sampling.temperature == 0:
            raise UserError("temperature 0 gives the same answer again", where="samples")

    @property
    def remote(self) -> bool:
        """Whether the teacher is behind an address."""
        return self.endpoint.startswith(("http://", "https://"))

    @property
    def key(self) -> str | None:
        """The server's key."""
        return (self.api_key or os.environ.get(self.api_key_env) or "").strip() or None

    @property
    def answers(self) -> Path:
        """Where the answers are kept."""
        return self.out.with_name(self.out.name + ".answers")
