"""Black-box distillation: a teacher's answers to prompts become a conversation file for `sft`.

Every answer goes into a journal beside the file as it comes (`OUT.answers`); the file itself is written at
the end, in the order of the prompts, from the journal alone. So its content does not depend on the order in
which answers came or on how often the work was interrupted, and other rules can be applied to the answers
without asking again. Sequence-level distillation: Kim and Rush 2016; keeping only answers that are right is
rejection sampling (Yuan et al. 2023).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import tempfile
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from kllm.data.reasoning import draw
from kllm.errors import KllmError, UserError
from kllm.export.resolve import resolve
from kllm.files import new_file
from kllm.observe.reporting import Reporter
from kllm.run.collect_client import Refused, RemoteTeacher
from kllm.run.collect_duplicates import Duplicates
from kllm.run.collect_filter import choose, conversation, judge, plain_twin, with_system
from kllm.run.collect_job import CollectJob
from kllm.run.collect_journal import Journal, Reply
from kllm.run.collect_prompts import Prompt, PromptList
from kllm.run.collect_report import CollectReport, Progress
from kllm.run.fingerprint import hash_directory
from kllm.run.stoppable import run_stoppable

__all__ = ["CollectJob", "collect"]

_SEEDS = 2**31  # every server takes a seed of so many bits
_BREATH = 64  # prompts between two looks at the event loop
_PATIENCE = 8  # failures one after another that end the run


class Teacher(Protocol):
    """Who is asked. A context: it can be asked inside."""

    model: str
    retried: int

    async def ask(self, messages: Sequence[Any], tools: Sequence[Any] | None, seed: int | None) -> Reply:
        """Raises Refused: not this question. KllmError: no question."""


def collect(job: CollectJob, reporter: Reporter) -> CollectReport:
    """Asks for what is not there yet, then writes `job.out`.

    The same call goes on after an interruption, and asks again for what failed.

    Raises:
        UserError: no prompts, a wrong key, address, model or option.
        KllmError: the server is gone, the disk is full, or no answer passed.
        Interrupted: SIGINT or SIGTERM; what came is kept.
    """
    hint = "what came is kept: the same command goes on"
    return run_stoppable(_Collector(job, reporter).run(), "collecting was interrupted", hint)


class _Collector:
    def __init__(self, job: CollectJob, reporter: Reporter) -> None:
        self.job, self.reporter = job, reporter
        self.prompts = PromptList(job.prompts, job.limit, job.max_bad_rows)
        self.journal = Journal(job.answers)
        self.report = CollectReport(out=job.out, endpoint=job.endpoint)
        self.row = 0  # failures since the last answer

    async def run(self) -> CollectReport:
        job, report = self.job, self.report
        async for _ in self._each():  # every source is read before anything is asked
            report.prompts += 1
        report.repeated_prompts, report.bad_rows = self.prompts.repeated, self.prompts.bad_count
        if not report.prompts:
            raise UserError("there are no prompts", where=", ".join(job.prompts))
        for where, reason in self.prompts.bad:
            self.reporter.warn(f"{where}: {reason}")
        with self.journal:
            identity = await asyncio.to_thread(self._identity)
            if identity is not None:
                self.settings = self._settings(identity)
            if identity is None or not await self._complete():
                async with self._open() as teacher:
                    self.teacher, report.model = teacher, teacher.model
                    self.settings = self._settings(identity or teacher.model)
                    self._header()
                    await self._ask_all()
            await self._write()
        if failed := sum(report.failed.values()):
            self.reporter.warn(f"{failed:,} prompts got no answer; {self.job.out.name} does without them")
        return report

    @contextlib.asynccontextmanager
    async def _open(self) -> AsyncIterator[Teacher]:
        job = self.job
        if job.remote:
            async with RemoteTeacher(
                job.endpoint,
                key=job.key,
                key_name=f"${job.api_key_env}",
                model=job.model,
                sampling=job.sampling,
                retries=job.retries,
                backoff=job.backoff,
                timeout=job.timeout,
                say=self.reporter.message,
            ) as remote:
                yield remote
            return
        from kllm.run.collect_local import LocalTeacher

        async with LocalTeacher(
            job.endpoint,
            sampling=job.sampling,
            parallel=job.parallel,
            device=job.device,
            say=self.reporter.message,
        ) as local:
            yield local

    def _identity(self) -> str | None:
        """Who answers: a server's model by name, one of ours by its content; None: the server has to say."""
        if self.job.remote:
            self.report.model = self.job.model or ""
            return self.job.model
        place = resolve(self.job.endpoint)
        self.report.model = place.name
        with tempfile.TemporaryDirectory() as scratch:
            return hash_directory(place, Path(scratch) / "hashes.json")

    def _settings(self, identity: str) -> str:
        """A hash of what an answer depends on besides its prompt and its number."""
        parts = [identity, self.job.system, self.job.seed, self.job.sampling.fields()]
        return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=12).hexdigest()

    async def _each(self) -> AsyncIterator[Prompt]:
        """The prompts, with pauses in which a signal can end it."""
        for number, prompt in enumerate(self.prompts):
            if number % _BREATH == 0:
                await asyncio.sleep(0)
            yield prompt

    async def _complete(self) -> bool:
        """Whether nothing is left to ask."""
        async for prompt in self._each():
            if not self._answered(prompt):
                return False
        return True

    def _answered(self, prompt: Prompt) -> bool:
        request, good = self._request(prompt), 0
        for sample in range(self.job.samples):
            reply = self.journal.get(request, sample)
            if reply is None:
                return False
            good += judge(self.job.rules, prompt, reply)[0] is not None
            if self.job.best == "first" and good == self.job.keep:
                return True
        return True

    def _request(self, prompt: Prompt) -> str:
        return hashlib.blake2b(f"{self.settings}/{prompt.id}".encode(), digest_size=12).hexdigest()

    def _seed(self, prompt: Prompt, sample: int) -> int | None:
        if self.job.seed is None:
            return None
        mixed = hashlib.blake2b(f"{self.job.seed}/{prompt.id}/{sample}".encode(), digest_size=8).digest()
        return int.from_bytes(mixed, "little") % _SEEDS

    def _header(self) -> None:
        job = self.job
        rows = {
            "teacher": f"{self.teacher.model} ({job.endpoint})",
            "prompts": f"{self.report.prompts:,}, up to {job.samples} answers each, {job.parallel} at a time",
            "answers": f"{job.answers} ({len(self.journal):,} there)",
            "file": str(job.out),
        }
        if self.report.repeated_prompts:
            rows["prompts"] += f", {self.report.repeated_prompts:,} repeated ones left out"
        self.reporter.header("collect", rows)

    # -- asking ---------------------------------------------------------------------------------------

    def _units(self) -> Iterator[tuple[Prompt, Sequence[int]]]:
        """Pieces of work: a prompt and which answers to it, one after another."""
        samples = range(self.job.samples)
        for prompt in self.prompts:
            if self.job.best == "first":
                yield prompt, samples  # may end before the last
            else:
                yield from ((prompt, (sample,)) for sample in samples)

    async def _ask_all(self) -> None:
        total = self.report.prompts * (1 if self.job.best == "first" else self.job.samples)
        self.progress = Progress(self.reporter, self.report, total, lambda: self.teacher.retried)
        units = self._units()
        tasks = [asyncio.create_task(self._work(units)) for _ in range(self.job.parallel)]
        ticker = asyncio.create_task(self.progress.run())
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in (*tasks, ticker):
                task.cancel()
            await asyncio.gather(*tasks, ticker, return_exceptions=True)
            self.progress.close()

    async def _work(self, units: Iterable[tuple[Prompt, Sequence[int]]]) -> None:
        for prompt, samples in units:  # all workers take from the one iterator
            await self._answer(prompt, samples)
            self.progress.done += 1
            await asyncio.sleep(0)  # a prompt that was answered before must not hold up the others

    async def _answer(self, prompt: Prompt, samples: Sequence[int]) -> None:
        """Has a prompt answered; stops early once enough answers are good and the first ones are wanted."""
        request, good = self._request(prompt), 0
        for sample in samples:
            reply = self.journal.get(request, sample)
            if reply is None:
                reply = await self._ask(prompt, request, sample)
                if reply is None:
                    return
            message, reason = judge(self.job.rules, prompt, reply)
            self.progress.judged(reason)
            good += message is not None
            if self.job.best == "first" and good == self.job.keep:
                return

    async def _ask(self, prompt: Prompt, request: str, sample: int) -> Reply | None:
        messages = with_system(prompt.messages, self.job.system)
        try:
            reply = await self.teacher.ask(messages, prompt.tools, self._seed(prompt, sample))
        except Refused as refused:
            self._failed(prompt, refused)
            return None
        self.row = 0
        self.journal.add(request, sample, reply)
        self.report.requests += 1
        self.report.prompt_tokens += reply.prompt_tokens
        self.report.completion_tokens += reply.completion_tokens
        return reply

    def _failed(self, prompt: Prompt, refused: Refused) -> None:
        """Counts a question without an answer; many in a row end the run."""
        report = self.report
        if not report.failed:
            self.reporter.warn(f"{prompt.where}: {refused.reason}: {refused.detail}".rstrip(": "))
        report.failed[refused.reason] += 1
        self.row += 1
        # questions that are at fault themselves end nothing once others were answered
        most = max(_PATIENCE, self.job.parallel)
        if self.row >= most and not (refused.ours and report.requests):
            raise KllmError(
                f"the last {self.row} questions got no answer: {refused.reason}: {refused.detail}".rstrip(
                    ": "
                ),
                where=self.job.endpoint,
                hint="what came is kept: the same command goes on",
            )

    # -- writing --------------------------------------------------------------------------------------

    async def _write(self) -> None:
        """The conversation file from the journal, in the order of the prompts."""
        report = self.report
        report.clear_verdicts()
        known = Duplicates(self.job.duplicates)
        with new_file(self.job.out) as aside, aside.open("w", encoding="utf-8") as file:
            async for prompt in self._each():
                for row in self._rows(prompt, known):
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
            if not report.kept:
                raise KllmError(
                    f"no answer passed: {report.reasons()}",
                    where=self.job.endpoint,
                    hint=f"see {self.job.answers}",
                )

    def _rows(self, prompt: Prompt, known: Duplicates) -> Iterator[dict[str, Any]]:
        job, report = self.job, self.report
        request, passed = self._request(prompt), []
        for sample in range(job.samples):
            reply = self.journal.get(request, sample)
            if reply is None:
                continue
            report.answers += 1
            message, reason = judge(job.rules, prompt, reply)
            if message is None:
                report.dropped[reason] += 1
            else:
                passed.append(message)
            if job.best == "first" and len(passed) == job.keep:
                break
        chosen = choose(job.best, passed, job.keep)
        report.spare += len(passed) - len(chosen)
        for message in chosen:
            row = conversation(prompt, job.system if job.keep_system else None, message)
            said = "\n".join(m["content"] for m in prompt.messages if m["role"] != "system")
            if found := known.find(f"{said}\n{message['content']}\n{message.get('tool_calls', '')}"):
                report.dropped[found] += 1
                continue
            report.kept += 1
            yield row
            thinks = "reasoning_content" in message
            report.reasoned += thinks
            if thinks and draw(row["messages"], job.seed or 0, "plain") < job.plain_ratio:
                report.plain += 1
                yield plain_twin(row)
