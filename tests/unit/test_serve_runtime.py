"""The engine thread: what callers get, what they can stop, and what happens when the engine breaks."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from serve_support import CountingEngine, run, runtime, settled

from kllm.engine.params import Event, SamplingParams
from kllm.serve.errors import ApiError, ClientGone
from kllm.serve.runtime import EngineRuntime, until_disconnect
from kllm.serve.ticket import Ticket, merged


def tokens(count: int) -> SamplingParams:
    return SamplingParams(max_tokens=count)


async def whole(ticket: Ticket) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    async for batch in ticket.batches():
        for index, event in batch:
            found.setdefault(index, []).extend(event.token_ids)
    return found


async def failure(work: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        await work
    return caught.value


def test_every_prompt_gets_its_answer() -> None:
    async def work() -> None:
        box = runtime()
        tickets = [box.submit([[1], [2]], [tokens(3), tokens(5)]) for _ in range(6)]
        for found in await asyncio.gather(*map(whole, tickets)):
            assert found == {0: [0, 1, 2], 1: [0, 1, 2, 3, 4]}
        await settled(lambda: box.in_flight == 0 and box.running == 0 and box.waiting == 0)
        assert box.metrics.reasons["length"] == 12
        assert box.stop()

    run(work)


def test_a_slow_reader_finds_one_event() -> None:
    async def work() -> None:
        box = runtime()
        ticket = box.submit([[1]], [tokens(50)])
        await settled(lambda: ticket.ended)
        batches = [batch async for batch in ticket.batches()]
        assert len(batches) == 1 and len(batches[0]) == 1
        index, event = batches[0][0]
        assert (index, event.token_ids, event.finish_reason) == (0, tuple(range(50)), "length")
        assert event.text == "".join(f"{i} " for i in range(50))

    run(work)


def test_merging_keeps_order_and_what_comes_first_or_last() -> None:
    batch = [
        (1, Event(7, (1,), "a", prompt_logprobs=(None,), cached_tokens=4)),
        (0, Event(6, (5,), "x")),
        *[(1, Event(7, (2,), "b"))] * 40,
        (1, Event(7, (2, 3), "c", "stop", message="m")),
    ]
    assert merged(batch) == [
        (1, Event(7, (1, *[2] * 40, 2, 3), "a" + "b" * 40 + "c", "stop", (), (None,), 4, "m")),
        (0, Event(6, (5,), "x")),
    ]
    assert merged(batch[:20]) == batch[:20], "a reader that keeps up gets every step"


def test_cancelling_frees_the_row_within_a_step() -> None:
    async def work() -> None:
        engine = CountingEngine(rows=1)
        box = runtime(engine)
        engine.gate.clear()
        first, second = box.submit([[1]], [tokens(10_000)]), box.submit([[1]], [tokens(2)])
        await settled(lambda: engine.has_work)
        first.cancel()
        steps = engine.steps
        engine.gate.set()
        assert await whole(second) == {0: [0, 1]}
        assert engine.cancelled == [1] and engine.steps - steps <= 5
        assert await whole(first) == {}
        await settled(lambda: box.in_flight == 0 and box.running == 0)
        first.cancel()

    run(work)


def test_leaving_the_loop_cancels() -> None:
    async def work() -> None:
        engine = CountingEngine()
        box = runtime(engine)
        ticket = box.submit([[1]], [tokens(10**9)])
        batches = ticket.batches()
        await batches.__anext__()
        await batches.aclose()  # type: ignore[attr-defined]
        await settled(lambda: engine.cancelled == [1] and box.in_flight == 0)

    run(work)


def test_a_full_queue_is_429_and_n_counts_n() -> None:
    async def work() -> None:
        engine = CountingEngine(rows=2)
        engine.gate.clear()
        box = runtime(engine, max_running=2, max_queue=4)
        kept = [box.submit([[1]] * 2, [tokens(1)] * 2) for _ in range(3)]
        with pytest.raises(ApiError) as caught:
            box.submit([[1]], [tokens(1)])
        error = caught.value
        assert (error.status, error.code, error.type) == (429, "queue_full", "rate_limit_error")
        assert 1 <= int(error.headers["Retry-After"]) <= 60
        assert box.metrics.rejected == 1
        with pytest.raises(ApiError) as caught:  # would never fit: not worth another try
            box.submit([[1]] * 7, [tokens(1)] * 7)
        assert caught.value.status == 400
        engine.gate.set()
        await asyncio.gather(*map(whole, kept))
        await settled(lambda: box.in_flight == 0)
        assert await whole(box.submit([[1]] * 6, [tokens(1)] * 6)) == {i: [0] for i in range(6)}

    run(work)


def test_retry_after_grows_with_the_queue() -> None:
    async def work() -> None:
        engine = CountingEngine(rows=2)
        engine.gate.clear()
        box = runtime(engine)
        kept = box.submit([[1]] * 20, [tokens(1)] * 20)
        box._service = 3.0
        assert box.retry_after() == 60  # 20 x 3 s, nothing running yet, and the most there is
        box._service = 0.01
        assert box.retry_after() == 1
        engine.gate.set()
        await whole(kept)

    run(work)


def test_bad_prompts_are_400() -> None:
    async def work() -> None:
        box = runtime()
        for prompt, code in (
            ([], None),
            ([1] * 101, "context_length_exceeded"),
            ([1] * 100, "context_length_exceeded"),
        ):
            with pytest.raises(ApiError) as caught:
                box.submit([prompt], [tokens(1)])
            assert (caught.value.status, caught.value.code) == (400, code)
        assert box.in_flight == 0
        assert await whole(box.submit([[1] * 99], [tokens(1)])) == {0: [0]}
        box.submit([[1] * 100], [tokens(0)]).cancel()  # scoring a prompt that fills the context

    run(work)


def test_what_the_engine_refuses_late_fails_alone() -> None:
    async def work() -> None:
        box = runtime()
        good = box.submit([[1]], [tokens(3)])
        error = await failure(whole(box.submit([[1], [666], [2]], [tokens(3)] * 3)))
        assert error.status == 500
        assert await whole(good) == {0: [0, 1, 2]}
        await settled(lambda: box.in_flight == 0)

    run(work)


def test_timeouts() -> None:
    async def work() -> None:
        engine = CountingEngine(rows=1)
        box = runtime(engine, request_timeout=0.2)
        error = await failure(whole(box.submit([[1]], [tokens(10**9)])))
        assert (error.status, error.code, error.type) == (408, "request_timeout", "timeout_error")
        assert await whole(box.submit([[1]], [tokens(2)], timeout=30)) == {0: [0, 1]}
        await settled(lambda: box.in_flight == 0)

    run(work)


def test_waiting_too_long_is_503_but_running_long_is_not() -> None:
    async def work() -> None:
        engine = CountingEngine(rows=1)
        box = runtime(engine, queue_timeout=0.2)
        first = box.submit([[1]], [tokens(10**9)])
        second = box.submit([[1]], [tokens(1)])
        error = await failure(whole(second))
        assert (error.status, error.code) == (503, "queue_timeout") and "Retry-After" in error.headers
        assert not first.ended
        first.cancel()

    run(work)


def test_a_broken_step_fails_its_requests_and_the_engine_goes_on() -> None:
    async def work() -> None:
        engine = CountingEngine()
        box = runtime(engine)
        for _ in range(3):  # one broken step at a time, with tokens between: never dead
            engine.broken = 1
            error = await failure(whole(box.submit([[1], [2]], [tokens(5)] * 2)))
            assert (error.status, error.code) == (500, "internal_error")
            assert error.headers["x-should-retry"] == "false" and "boom" not in error.message
            assert await whole(box.submit([[1]], [tokens(2)])) == {0: [0, 1]}
        await settled(lambda: box.in_flight == 0)
        assert not box.dead

    run(work)


@pytest.mark.parametrize("wreck", [False, True])
def test_two_in_a_row_are_the_end(wreck: bool) -> None:
    async def work() -> None:
        deaths: list[int] = []
        engine = CountingEngine()
        box = EngineRuntime(engine, on_dead=lambda: deaths.append(1))  # type: ignore[arg-type]
        engine.broken, engine.wreck = 100, wreck
        error = await failure(whole(box.submit([[1]], [tokens(5)])))
        assert error.status in (500, 503)
        if not wreck:
            assert not box.dead
            await failure(whole(box.submit([[1]], [tokens(5)])))
        await settled(lambda: box.dead)
        with pytest.raises(ApiError) as caught:
            box.submit([[1]], [tokens(1)])
        assert (caught.value.status, caught.value.code) == (503, "engine_dead")
        assert (await failure(box.embed([1], "mean"))).code == "engine_dead"
        await settled(lambda: box.in_flight == 0)
        await settled(lambda: deaths == [1])
        assert box.stop()

    run(work)


def test_death_reaches_everybody_who_waits() -> None:
    async def work() -> None:
        engine = CountingEngine()
        box = runtime(engine)
        engine.gate.clear()
        ticket = box.submit([[1]], [tokens(5)])
        await settled(lambda: engine.has_work)
        vector = asyncio.ensure_future(box.embed([1], "mean"))
        await asyncio.sleep(0.02)
        engine.broken, engine.wreck = 100, True
        engine.gate.set()
        assert (await failure(whole(ticket))).code == "engine_dead"
        assert (await failure(vector)).code == "engine_dead"

    run(work)


def test_draining_lets_the_running_ones_finish() -> None:
    async def work() -> None:
        engine = CountingEngine()
        engine.gate.clear()
        box = runtime(engine)
        ticket = box.submit([[1]], [tokens(5)])
        box.draining = True
        with pytest.raises(ApiError) as caught:
            box.submit([[1]], [tokens(1)])
        assert caught.value.code == "draining" and caught.value.headers["Connection"] == "close"
        engine.gate.set()
        assert await whole(ticket) == {0: [0, 1, 2, 3, 4]}

    run(work)


def test_abort_gives_what_came_and_then_the_error() -> None:
    async def work() -> None:
        box = runtime()
        ticket = box.submit([[1]], [tokens(10**9)])
        got: list[int] = []
        with pytest.raises(ApiError) as caught:
            async for batch in ticket.batches():
                got += [token for _, event in batch for token in event.token_ids]
                box.abort(ApiError(503, "bye", code="draining"))
        assert got[0] == 0 and caught.value.code == "draining"
        await settled(lambda: box.in_flight == 0)

    run(work)


def test_embeddings_run_between_steps() -> None:
    async def work() -> None:
        engine = CountingEngine()
        box = runtime(engine)
        ticket = box.submit([[1]], [tokens(10**9)])
        assert await box.embed([1, 2, 3], "last") == [3.0, 1.0]
        assert not ticket.ended
        assert (await failure(box.embed([666], "mean"))).status == 500
        assert (await failure(box.embed([1] * 101, "mean"))).code == "context_length_exceeded"
        ticket.cancel()
        await settled(lambda: box.in_flight == 0)

    run(work)


class Connection:
    """`receive` of a request whose client leaves after `seconds`."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    async def receive(self) -> dict[str, str]:
        await asyncio.sleep(self.seconds)
        return {"type": "http.disconnect"}


def test_until_disconnect() -> None:
    async def work() -> None:
        engine = CountingEngine()
        box = runtime(engine)
        ticket = box.submit([[1]], [tokens(3)])
        assert await until_disconnect(Connection(30), whole(ticket), ticket) == {0: [0, 1, 2]}  # type: ignore[arg-type]
        ticket = box.submit([[1]], [tokens(10**9)])
        began = time.monotonic()
        with pytest.raises(ClientGone):
            await until_disconnect(Connection(0.05), whole(ticket), ticket)  # type: ignore[arg-type]
        assert time.monotonic() - began < 5
        await settled(lambda: engine.cancelled == [2] and box.in_flight == 0)

    run(work)


def test_times_are_measured() -> None:
    async def work() -> None:
        box = runtime()
        await whole(box.submit([[1]], [tokens(11)]))
        await settled(lambda: box.in_flight == 0)
        metrics = box.metrics
        assert [sum(h.counts) for h in (metrics.first_token, metrics.queue, metrics.whole)] == [1, 1, 1]
        assert sum(metrics.between_tokens.counts) == 10

    run(work)


def test_many_at_once() -> None:
    async def work() -> None:
        box = runtime(CountingEngine(rows=8))
        tickets = [box.submit([[1]], [tokens(1 + i % 7)]) for i in range(300)]
        for i, ticket in enumerate(tickets):
            if i % 5 == 0:
                ticket.cancel()
        answers = await asyncio.gather(*map(whole, tickets))
        assert all(a == {0: list(range(1 + i % 7))} for i, a in enumerate(answers) if i % 5)
        await settled(lambda: box.in_flight == 0 and box.running == 0)

    run(work)
