"""What collecting came to, while it runs and at the end."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from kllm.observe.reporting import Reporter
from kllm.observe.units import count, duration

_LINE_SECONDS, _BAR_SECONDS = 5.0, 0.5


@dataclass
class CollectReport:
    """Figures of one `collect`.

    Attributes:
        prompts, repeated_prompts, bad_rows: of the sources.
        requests, prompt_tokens, completion_tokens, retries, seconds: of this run; answers that were there
            already cost nothing.
        answers: that were judged, of this run and earlier ones.
        kept: conversations written; `reasoned` of them with reasoning, `plain` further ones without it.
        dropped: reason -> answers.
        spare: good answers beyond those to keep.
        failed: reason -> prompts that got no answer in this run.
    """

    out: Path
    endpoint: str
    model: str = ""
    prompts: int = 0
    repeated_prompts: int = 0
    bad_rows: int = 0
    requests: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    answers: int = 0
    kept: int = 0
    reasoned: int = 0
    plain: int = 0
    spare: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)

    def clear_verdicts(self) -> None:
        """Before all answers are judged."""
        self.answers = self.kept = self.reasoned = self.plain = self.spare = 0
        self.dropped.clear()

    def rate(self, what: int) -> float | None:
        """Per second of asking; None where nothing was asked."""
        return what / self.seconds if self.requests and self.seconds > 0 else None

    def reasons(self) -> str:
        """Why answers were dropped and prompts failed, the most frequent first."""
        both = [*self.dropped.most_common(), *self.failed.most_common()]
        return ", ".join(f"{reason} {n:,}" for reason, n in both) or "nothing came"

    def to_dict(self) -> dict[str, Any]:
        """For --json and a stage's status."""
        return {
            **{name.name: getattr(self, name.name) for name in fields(self)},
            "out": str(self.out),
            "requests_per_second": self.rate(self.requests),
            "tokens_per_second": self.rate(self.completion_tokens),
            "dropped": dict(self.dropped.most_common()),
            "failed": dict(self.failed.most_common()),
        }

    def rows(self) -> list[tuple[str, str]]:
        """As a table of (figure, value)."""
        rows = [("conversations", f"{self.kept:,} of {self.answers:,} answers to {self.prompts:,} prompts")]
        if self.reasoned:
            rows.append(("with reasoning", f"{self.reasoned:,}"))
        if self.plain:
            rows.append(("again without it", f"{self.plain:,}"))
        if self.spare:
            rows.append(("spare", f"{self.spare:,}"))
        rows += [(f"dropped: {reason}", f"{n:,}") for reason, n in self.dropped.most_common()]
        rows += [(f"no answer: {reason}", f"{n:,}") for reason, n in self.failed.most_common()]
        if (speed := self.rate(self.requests)) is not None:
            tokens = count(self.rate(self.completion_tokens) or 0)
            again = f", {self.retries:,} tried again" if self.retries else ""
            rows.append(("requests", f"{self.requests:,} in {duration(self.seconds)}{again}"))
            rows.append(("speed", f"{speed:.3g} requests/s, {tokens} tokens/s"))
        return rows


class Progress:
    """Moves the bar, and writes a line every few seconds.

    Args:
        total: pieces of work; `done` counts them.
        retried: how many tries were not the first.
    """

    def __init__(
        self, reporter: Reporter, report: CollectReport, total: int, retried: Callable[[], int]
    ) -> None:
        self._reporter, self._report, self._total, self._retried = reporter, report, total, retried
        self.done = 0
        self._kept = 0
        self._dropped: Counter[str] = Counter()
        self._told = 0
        self._began = time.monotonic()

    def judged(self, reason: str) -> None:
        """An answer was looked at; `reason` is why it is dropped, "" for a good one."""
        if reason:
            self._dropped[reason] += 1
        else:
            self._kept += 1

    async def run(self) -> None:
        """Until cancelled."""
        line = time.monotonic() + _LINE_SECONDS
        while True:
            await asyncio.sleep(_BAR_SECONDS)
            if time.monotonic() < line:
                self._reporter.progress("collect", self.done, self._total, {})
                continue
            line += _LINE_SECONDS
            self._say()

    def close(self) -> None:
        """The last line."""
        self._say()

    def _say(self) -> None:
        report = self._report
        report.seconds, report.retries = time.monotonic() - self._began, self._retried()
        dropped = sum(self._dropped.values())
        figures: dict[str, Any] = {"collect/kept": self._kept, "collect/dropped": dropped}
        if report.requests:
            figures["perf/tok_s"] = report.rate(report.completion_tokens)
            figures["collect/requests_s"] = report.rate(report.requests)
        if report.failed:
            figures["collect/failed"] = sum(report.failed.values())
        self._reporter.progress("collect", self.done, self._total, figures)
        if dropped > self._told:
            self._told = dropped
            why = ", ".join(f"{reason} {n:,}" for reason, n in self._dropped.most_common())
            self._reporter.message(f"dropped so far: {why}")
