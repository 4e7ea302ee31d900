"""`kllm bench serve`: many ragged streams at a server at once, every one compared with what it says alone.

First each case is asked alone (the table of expected texts), then alone again for the speed of one stream,
then by N readers at once, of whom some leave in the middle and some do not read for a while.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import Any

from kllm.errors import KllmError, UserError
from kllm.http_client import Target
from kllm.run import bench
from kllm.run.bench_client import Manners, Outcome, read_stream
from kllm.run.bench_server import OwnServer, first_model, settled, work_done

Say = Callable[[str], None]
ENDPOINTS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
_ALONE_SHARE, _ALONE_MOST = 0.25, 15.0  # of the load's seconds; seconds
_WINDOW_GAPS = 25


@dataclass(frozen=True)
class ServeBench:
    """What is asked for; see `kllm bench serve --help`. `url` of a server, or `model` to start one."""

    model: str | None = None
    url: str | None = None
    key: str | None = None
    name: str | None = None
    """The model's name at the server; its first one without."""
    endpoint: str = "completions"
    streams: int = 16
    seconds: float = 30.0
    cases: int = 24
    min_tokens: int = 4
    max_tokens: int = 160
    disconnect: float = 0.1
    stall: float = 0.05
    stall_seconds: float = 3.0
    patience: float = 60.0
    ignore_eos: bool = False
    seed: int = 0
    options: tuple[str, ...] = ()
    """Further words for `kllm serve`."""
    pid: int | None = None
    """The process of the server at `url`, for its processor seconds."""


@dataclass(frozen=True)
class Case:
    """One request: a prompt and how long its answer may be."""

    prompt: str
    max_tokens: int


@dataclass
class Read:
    """One stream under load: whose, how it was read, what came."""

    reader: int
    case: int
    manners: Manners
    out: Outcome
    verdict: str
    """complete, wrong, incomplete, starved, left, refused."""


@dataclass
class Session:
    """A server under test: where, what to ask, what it must say."""

    target: Target
    job: ServeBench
    model: str
    cases: list[Case]
    expected: list[tuple[str, str | None]] = field(default_factory=list)

    def body(self, case: Case) -> dict[str, Any]:
        """The request: greedy, streaming, with a count of the tokens."""
        asked: dict[str, Any] = {"model": self.model, "max_tokens": case.max_tokens, "temperature": 0}
        asked |= {"stream": True, "stream_options": {"include_usage": True}}
        if self.job.ignore_eos:
            asked["ignore_eos"] = True
        if self.job.endpoint == "chat":
            return asked | {"messages": [{"role": "user", "content": case.prompt}]}
        return asked | {"prompt": case.prompt}

    async def ask(self, case: Case, manners: Manners) -> Outcome:
        """One stream."""
        return await read_stream(self.target, ENDPOINTS[self.job.endpoint], self.body(case), manners)


def bench_serve(job: ServeBench, say: Say = lambda line: None) -> dict[str, Any]:
    """Puts the load on and returns the report; `ok` says whether every stream was whole and right.

    Raises:
        UserError, KllmError: bad values, no server, or one that cannot answer the cases alone.
    """
    _check(job)
    with contextlib.ExitStack() as stack:
        url = job.url
        if url is None:
            say(f"starting kllm serve {job.model}")
            server = stack.enter_context(OwnServer(job.model or "", job.options))
            url, job = server.url, replace(job, pid=server.pid)
        return asyncio.run(_bench(Target.parse(url, job.key), url, job, say))


def _check(job: ServeBench) -> None:
    if job.model is not None and job.url is not None:
        raise UserError("MODEL and --url exclude each other")
    if job.model is None and job.url is None:
        raise UserError("name a model to serve, or --url of a server")
    if job.endpoint not in ENDPOINTS:
        raise UserError(f"unknown: {job.endpoint!r}", "flag --endpoint", f"known: {', '.join(ENDPOINTS)}")
    for name in ("streams", "seconds", "cases", "min_tokens", "patience"):
        if getattr(job, name) < (0.1 if name == "seconds" else 1):
            raise UserError(f"too small: {getattr(job, name)}", where=f"flag --{name.replace('_', '-')}")
    if job.max_tokens < job.min_tokens:
        raise UserError(f"less than --min-tokens {job.min_tokens}", where="flag --max-tokens")
    for name in ("disconnect", "stall"):
        if not 0 <= getattr(job, name) <= 1:
            raise UserError(f"must be between 0 and 1, got {getattr(job, name)}", where=f"flag --{name}")


async def _bench(target: Target, url: str, job: ServeBench, say: Say) -> dict[str, Any]:
    session = Session(target, job, job.name or await first_model(target), make_cases(job))
    say(f"{len(session.cases)} cases alone, for their expected texts")
    await _expect(session)
    work = [await work_done(target, job.pid)]
    alone = await _alone(session)
    work.append(await work_done(target, job.pid))
    say(f"{job.streams} streams for {job.seconds:g} s")
    cpu, began = time.process_time(), time.perf_counter()
    reads = await _load(session, began + job.seconds)
    client = (time.process_time() - cpu) / (time.perf_counter() - began)
    work.append(await work_done(target, job.pid))
    report: dict[str, Any] = {
        "bench": "serve",
        "url": url,
        "model": session.model,
        "machine": bench.machine(),
        "settings": {k: v for k, v in asdict(job).items() if k not in ("model", "url", "key", "pid")},
        "alone": _figures(alone, None) | {"server_cpu_ms_per_token": _cpu_per_token(*work[:2])},
        "load": _figures(reads, (began, began + job.seconds))
        | {"server_cpu_ms_per_token": _cpu_per_token(*work[1:]), "client_cpu_share": client},
        "gauges": await settled(target),
        "failures": _failures(reads + alone, session)[:10],
    }
    one, many = report["alone"]["tokens_s"], report["load"]["tokens_s"]
    report["ratio"] = many / one if one and many else None
    one, many = (report[part]["server_cpu_ms_per_token"] for part in ("alone", "load"))
    report["ratio_cpu"] = one / many if one and many else None
    report["ok"] = is_right(report)
    return report


def is_right(report: dict[str, Any]) -> bool:
    """No stream wrong, cut or starved, no error but refusals, and the server idle afterwards."""
    bad = ("wrong", "incomplete", "starved")
    counts = [report[part]["streams"] for part in ("alone", "load")]
    return (
        not any(count[kind] for count in counts for kind in bad)
        and report["load"]["streams"]["complete"] > 0
        and report["gauges"]["idle"]
    )


def make_cases(job: ServeBench) -> list[Case]:
    """Prompts of ragged length in two languages, answers of ragged length; the same for a seed."""
    dice = random.Random(job.seed)
    texts = list(islice(bench.texts_of(bench.TEXTS), 8 * job.cases))
    low, high = math.log(job.min_tokens), math.log(job.max_tokens)
    cases = []
    for _ in range(job.cases):
        text = dice.choice(texts)
        length = round(math.exp(dice.uniform(0, math.log(400))))
        tokens = round(math.exp(dice.uniform(low, high)))
        cases.append(Case(text[:length], min(max(tokens, job.min_tokens), job.max_tokens)))
    return cases


async def _expect(session: Session) -> None:
    for case in session.cases:
        out = await session.ask(case, Manners(patience=session.job.patience))
        if out.error:
            why = f": {out.text}" if out.error.startswith("http") and out.text else ""
            raise KllmError(f"it cannot answer a case alone: {out.error}{why}", where=session.model)
        session.expected.append((out.text, out.finish_reason))


async def _alone(session: Session) -> list[Read]:
    """The cases one after another, for a share of the load's time."""
    until = time.perf_counter() + min(session.job.seconds * _ALONE_SHARE, _ALONE_MOST)
    reads: list[Read] = []
    while time.perf_counter() < until:
        case = len(reads) % len(session.cases)
        manners = Manners(patience=session.job.patience)
        reads.append(_judged(session, 0, case, manners, await session.ask(session.cases[case], manners)))
    return reads


async def _load(session: Session, until: float) -> list[Read]:
    """All readers until the time is over; streams in flight are read to their end."""
    reads: list[Read] = []
    await asyncio.gather(*(_reader(session, k, until, reads) for k in range(session.job.streams)))
    return reads


async def _reader(session: Session, number: int, until: float, reads: list[Read]) -> None:
    job = session.job
    dice = random.Random(f"{job.seed}/{number}")
    while time.perf_counter() < until:
        case = dice.randrange(len(session.cases))
        manners = _manners(job, dice)
        read = _judged(session, number, case, manners, await session.ask(session.cases[case], manners))
        reads.append(read)
        if read.verdict == "refused":
            await asyncio.sleep(min(read.out.retry_after or 1.0, 5.0))
        elif read.out.error:
            await asyncio.sleep(0.2)  # a server that is gone is not asked a thousand times


def _manners(job: ServeBench, dice: random.Random) -> Manners:
    fate, when = dice.random(), dice.randrange(0, 12)
    if fate < job.disconnect:
        return Manners(leave_after=when, patience=job.patience)
    if fate < job.disconnect + job.stall:
        return Manners(stall_after=when, stall=job.stall_seconds, patience=job.patience)
    return Manners(patience=job.patience)


def _judged(session: Session, reader: int, case: int, manners: Manners, out: Outcome) -> Read:
    """A stream with its verdict: the text (its beginning, where the reader left) is the one said alone."""
    text, reason = session.expected[case]
    if out.error:
        verdict = {"starved": "starved", "http 429": "refused"}.get(out.error[:8].strip(), "incomplete")
    elif out.left:
        verdict = "left" if text.startswith(out.text) else "wrong"
    else:
        verdict = "complete" if (out.text, out.finish_reason) == (text, reason) else "wrong"
    return Read(reader, case, manners, out, verdict)


def _failures(reads: Sequence[Read], session: Session) -> list[str]:
    """One line for each stream that is not as it should be."""
    lines = []
    for read in reads:
        if read.verdict in ("complete", "left", "refused"):
            continue
        text, reason = session.expected[read.case]
        got = read.out.text
        pairs = enumerate(zip(got, text, strict=False))
        at = next((i for i, (a, b) in pairs if a != b), min(len(got), len(text)))
        differs = f"{got[at : at + 20]!r} for {text[at : at + 20]!r}"
        why = read.out.error or f"finish {read.out.finish_reason} for {reason}, {differs}"
        lines.append(f"case {read.case}, reader {read.reader}: {read.verdict} after {at} characters: {why}")
    return lines


def _figures(reads: Sequence[Read], span: tuple[float, float] | None) -> dict[str, Any]:
    """Counts, times and rates of some streams.

    Args:
        span: moments between which tokens count for the rate; None: while any stream was read.
    """
    verdicts = Counter(read.verdict for read in reads)
    steady = [r.out for r in reads if r.manners.stall_after is None and not r.out.error]
    first = [t for r in reads if (t := r.out.first) is not None and not r.out.error]
    gaps = [gap for out in steady for gap in out.gaps]
    rates = [_rate(out) for out in steady if len(out.times) >= 8]
    median, p99 = bench.quantile(gaps, 0.5), bench.quantile(gaps, 0.99)
    names = ("complete", "wrong", "incomplete", "starved", "left", "refused")
    return {
        "streams": {"all": len(reads), **{name: verdicts[name] for name in names}},
        "stalled_readers": sum(r.manners.stall_after is not None for r in reads),
        "errors": dict(Counter(r.out.error for r in reads if r.out.error)),
        "ttft_s": {"p50": bench.quantile(first, 0.5), "p99": bench.quantile(first, 0.99)},
        "gap_s": {
            "p50": median,
            "p99": p99,
            "max": max(gaps, default=None),
            "p99_over_median": p99 / median if p99 and median else None,
        },
        "tokens": round(sum(_tokens(r.out) for r in reads)),
        "tokens_s": _total_rate(reads, span),
        "tokens_s_per_stream": {"p50": bench.quantile(rates, 0.5), "min": min(rates, default=None)},
        "jain": _fairness(steady, median, span),
    }


def _cpu_per_token(
    before: tuple[float | None, float | None], after: tuple[float | None, float | None]
) -> float | None:
    """Milliseconds of the server's processors for each token between two readings of `work_done`."""
    if None in (*before, *after) or after[0] == before[0]:
        return None
    (tokens, cpu), (more_tokens, more_cpu) = before, after
    return 1e3 * (more_cpu - cpu) / (more_tokens - tokens)  # type: ignore[operator]


def _tokens(out: Outcome) -> float:
    """The server's count; of a stream that was left, the texts that came."""
    return float(out.tokens if out.tokens is not None else len(out.times))


def _rate(out: Outcome) -> float:
    """Tokens per second after the first."""
    return (_tokens(out) - 1) / max(out.times[-1] - out.times[0], 1e-9)


def _total_rate(reads: Sequence[Read], span: tuple[float, float] | None) -> float | None:
    if not reads:
        return None
    if span is None:
        seconds = sum(r.out.ended - r.out.started for r in reads)
        return sum(_tokens(r.out) for r in reads) / seconds if seconds else None
    total = 0.0
    for read in reads:
        inside = sum(span[0] <= t <= span[1] for t in read.out.times)
        total += _tokens(read.out) * inside / max(len(read.out.times), 1)
    return total / (span[1] - span[0])


def _fairness(
    outs: Sequence[Outcome], gap: float | None, span: tuple[float, float] | None
) -> dict[str, float | None]:
    """Jain's index of the tokens that streams got in a window through all of which they ran.

    Windows hold some tokens each, so that whole numbers do not look unfair; mean and least of all windows
    with two streams or more.
    """
    found: list[float] = []
    if gap and span:
        width = min(max(_WINDOW_GAPS * gap, 0.1), 5.0)
        for k in range(int((span[1] - span[0]) / width)):
            low, high = span[0] + k * width, span[0] + (k + 1) * width
            running = [o for o in outs if o.times and o.times[0] <= low and o.times[-1] >= high]
            shares = [sum(low <= t < high for t in o.times) * _tokens(o) / len(o.times) for o in running]
            if len(shares) > 1 and (index := bench.jain(shares)) is not None:
                found.append(index)
    return {"mean": sum(found) / len(found) if found else None, "min": min(found, default=None)}
