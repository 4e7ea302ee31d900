"""The server's own tools while they run: clients that leave, limits of time, the drain, the queue, sandboxes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from serve_scripted import Server
from serve_support import CountingEngine, runtime, settled
from serve_tool_support import Replies, Slow, call, events_of, sums, tool_server

from kllm.engine.params import SamplingParams
from kllm.serve.runtime import draining_error
from kllm.tools.registry import Toolbox

HI = [{"role": "user", "content": "hi"}]


class Client:
    """One request on the application, whose connection can be cut."""

    def __init__(self, box: Server, **body: Any) -> None:
        self._gone = asyncio.Event()
        self._read = False
        self.status = 0
        self.data = b""
        self._body = json.dumps({"messages": HI, **body}).encode()
        headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": headers}
        scope |= {"query_string": b"", "http_version": "1.1", "scheme": "http", "client": ("127.0.0.1", 9)}
        scope |= {"asgi": {"version": "3.0"}, "server": ("127.0.0.1", 80), "root_path": "", "raw_path": b"/"}
        self.task = asyncio.ensure_future(box.app(scope, self._receive, self._send))

    def leave(self) -> None:
        self._gone.set()

    async def answer(self) -> Any:
        await asyncio.wait_for(self.task, 20)
        return json.loads(self.data)

    async def _receive(self) -> dict[str, Any]:
        if not self._read:
            self._read = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        self.status = message.get("status", self.status)
        self.data += message.get("body", b"")


async def happened(event: Any) -> None:
    """Waits for a thread's event without holding up the loop."""
    assert await asyncio.to_thread(event.wait, 10)


def idle(box: Server) -> Callable[[], bool]:
    return lambda: box.runtime.in_flight == 0 and not box.runtime._stays and not box.runtime._live


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_the_tool(stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kllm.serve.errand._GRACE", 0.05)
    slow = Slow()

    async def work() -> None:
        with tool_server("Wait. " + call("wait"), "never", tools=[slow.tool()]) as box:
            client = Client(box, stream=stream)
            await happened(slow.running)
            assert box.runtime.in_flight == 1 and box.runtime.running == 0
            client.leave()
            await asyncio.wait([client.task], timeout=10)
            await happened(slow.left)
            await settled(idle(box))
            assert len(box.engine.asked) == 1
            assert (b"tool_events" in client.data and b"[DONE]" not in client.data) == stream

    asyncio.run(work())


def test_a_client_that_leaves_between_the_rounds() -> None:
    async def work() -> None:
        with tool_server(sums("1+1"), "the cat " * 3000) as box:
            client = Client(box, stream=True)
            await settled(lambda: len(box.engine.asked) == 2)
            client.leave()
            await asyncio.wait([client.task], timeout=10)
            await settled(idle(box))
            await settled(lambda: box.runtime.running == 0)

    asyncio.run(work())


def reasons(box: Server) -> dict[str, int]:
    """Finished requests by reason, those that there are."""
    return {reason: count for reason, count in box.served.metrics.reasons.items() if count}


def test_a_request_is_counted_once() -> None:
    """However many rounds it took; its tokens are those of all."""

    async def work() -> None:
        with tool_server(sums("1+1"), sums("2+2"), "done") as box:
            usage = (await Client(box).answer())["usage"]
            await asyncio.gather(Client(box).task, Client(box, stream=True).task)
            metrics = box.served.metrics
            assert reasons(box) == {"stop": 3} and len(box.engine.asked) == 9
            for histogram in (metrics.whole, metrics.first_token, metrics.queue):
                assert sum(histogram.counts) == 3
            assert metrics.generation_tokens == 3 * usage["completion_tokens"]
            assert metrics.prompt_tokens == 3 * usage["prompt_tokens"]
            cut = await Client(box, max_tokens=5).answer()
            assert cut["choices"][0]["finish_reason"] == "length" and reasons(box) == {"stop": 3, "length": 1}

    asyncio.run(work())


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_while_a_tool_runs_is_counted(stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And waits for nothing of the engine before: a full queue must not be told to come back the later for it."""
    monkeypatch.setattr("kllm.serve.errand._GRACE", 0.05)
    slow = Slow()

    async def work() -> None:
        with tool_server(call("wait") + sums("1+1"), "never", tools=[slow.tool(), "calculator"]) as box:
            client = Client(box, stream=stream)
            await happened(slow.running)
            assert (box.runtime.in_flight, box.runtime.running, box.runtime.waiting) == (1, 0, 0)
            shown = box.app.state.metrics.render([box.served])
            assert 'kllm:num_requests_in_tools{model_name="tiny"} 1' in shown
            assert 'kllm:num_requests_waiting{model_name="tiny"} 0' in shown
            client.leave()
            await asyncio.wait([client.task], timeout=10)
            await settled(idle(box))
            assert reasons(box) == {"cancelled": 1}
            assert box.served.metrics.tool_calls == {("wait", "abandoned"): 1, ("calculator", "abandoned"): 1}

    asyncio.run(work())


@pytest.mark.parametrize("stream", [False, True])
def test_the_time_for_a_request_covers_its_tools(stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kllm.serve.errand._GRACE", 0.05)
    slow = Slow()

    async def work() -> None:
        with tool_server(call("wait"), "never", tools=[slow.tool()], request_timeout=0.3) as box:
            client = Client(box, stream=stream)
            await asyncio.wait([client.task], timeout=10)
            assert client.status == (200 if stream else 408) and b"request_timeout" in client.data
            await happened(slow.left)
            await settled(idle(box))

    asyncio.run(work())


def test_what_is_admitted_is_finished() -> None:
    """With no queue at all, and while the server drains."""
    slow = Slow()

    async def work() -> None:
        with tool_server(
            call("wait"), "done", tools=[slow.tool()], max_running=1, max_queue=0, queue_timeout=0.05
        ) as box:
            client = Client(box)
            await happened(slow.running)
            refused = await box.apost("/v1/chat/completions", {"messages": HI, "server_tools": False})
            assert refused.status_code == 429
            refused = await box.apost("/v1/chat/completions", {"messages": HI})
            assert refused.status_code == 429
            box.runtime.draining = True
            await asyncio.sleep(0.1)  # the time in the queue is long over
            slow.let_go.set()
            assert (await client.answer())["choices"][0]["message"]["content"] == "done"
            assert idle(box)()
            assert box.served.metrics.rejected == 2

    asyncio.run(work())


def test_only_the_first_round_is_refused_for_waiting() -> None:
    async def work() -> None:
        engine = CountingEngine()
        box = runtime(engine, queue_timeout=0.1)
        stay = box.admit()
        params = [SamplingParams(max_tokens=2)]
        for begun in (False, True):
            engine.gate.clear()  # whoever comes now waits
            ticket = box.submit([[1]], params, stay=stay)
            other = box.submit([[1]], params)
            await asyncio.sleep(0.2)
            assert other.ended and ticket.ended != begun
            engine.gate.set()
            await settled(lambda: box.in_flight == 1)
        assert [[event.token_ids for _, event in batch] async for batch in ticket.batches()] != []
        stay.cancel()
        assert box.in_flight == 0
        box.stop()

    asyncio.run(work())


def test_the_end_of_the_drain_ends_the_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kllm.serve.errand._GRACE", 0.05)
    slow = Slow()

    async def work() -> None:
        with tool_server(call("wait"), "never", tools=[slow.tool()]) as box:
            whole, stream = Client(box), Client(box, stream=True)
            await happened(slow.running)
            await settled(lambda: b"tool_events" in stream.data and box.runtime.in_flight == 2)
            box.runtime.abort(draining_error())
            assert (await whole.answer())["error"]["code"] == "draining" and whole.status == 503
            await asyncio.wait([stream.task], timeout=10)
            assert b'"code":"draining"' in stream.data and stream.data.endswith(b"data: [DONE]\n\n")
            await happened(slow.left)
            await settled(idle(box))

    asyncio.run(work())


def test_a_broken_engine_in_a_later_round() -> None:
    async def work() -> None:
        with tool_server(sums("1+1"), "the cat sat on the mat") as box:
            steps = box.engine.step

            def step() -> Any:
                if len(box.engine.asked) == 2:
                    raise RuntimeError("broken on purpose")
                return steps()

            box.engine.step = step  # type: ignore[method-assign]
            client = Client(box)
            assert (await client.answer())["error"]["code"] == "internal_error"
            await settled(idle(box))
            assert reasons(box) == {"error": 1}

    asyncio.run(work())


def test_every_toolbox_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[Toolbox] = []
    monkeypatch.setattr(Toolbox, "close", lambda self: closed.append(self))

    async def work() -> None:
        with tool_server(sums("1+1"), "done") as box:
            await asyncio.gather(*(Client(box, stream=i % 2 == 1).task for i in range(4)))
            await settled(lambda: len(closed) == 4)
            assert len(set(map(id, closed))) == 4

    asyncio.run(work())


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_that_hangs_keeps_its_thread(stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its client has left; others must not add to it until it really is over."""
    monkeypatch.setattr("kllm.serve.errand._GRACE", 0.02)
    monkeypatch.setattr("kllm.serve.calling._BURST", 0.05)
    running, let_go = threading.Event(), threading.Event()

    def hang() -> str:
        """Cannot be thrown out."""
        running.set()
        let_go.wait(20)
        return "over"

    async def work() -> None:
        with tool_server(call("hang") + sums("1+1"), "done", tools=[hang, "calculator"]) as box:
            box.app.state.tools.threads = asyncio.Semaphore(1)
            client = Client(box, stream=stream)
            await happened(running)
            client.leave()
            await asyncio.wait([client.task], timeout=10)
            await asyncio.sleep(0.2)  # it has been told and thrown at
            message = (await Client(box).answer())["choices"][0]["message"]
            assert [event[2:] for event in events_of(message)[2:]] == [
                ("error: not run: the tools are busy", True)
            ] * 2
            assert message["content"] == "done"
            assert box.served.metrics.tool_calls["hang", "not_run"] == 1
            let_go.set()
            await settled(lambda: box.app.state.tools.threads._value == 1)
            message = (await Client(box).answer())["choices"][0]["message"]
            assert [event[2] for event in events_of(message)[2:]] == ["over", "2"]

    asyncio.run(work())


# ---- python


def test_nobody_waits_for_a_sandbox_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kllm.serve.calling.SECONDS", 0.2)

    async def work() -> None:
        said = [python("1") + sums("1+1"), python("2"), "done"]
        tools = ["python", "calculator"]
        with tool_server(*said, tools=tools, max_sandboxes=1, unsafe_python=True) as box:
            await box.app.state.tools.places.acquire()
            began = time.monotonic()
            message = (await Client(box).answer())["choices"][0]["message"]
            results = [event[2] for event in events_of(message) if event[0] == "result"]
            busy = "error: not run: python is busy"
            assert results == [busy, "2", busy] and message["content"] == "done"
            assert time.monotonic() - began < 5
            assert box.served.metrics.tool_calls["python", "not_run"] == 2
            box.app.state.tools.places.release()

    asyncio.run(work())


@pytest.fixture
def locked() -> None:
    sandbox = pytest.importorskip("kllm.tools.sandbox")
    try:
        sandbox.check_platform()
    except Exception as error:
        pytest.skip(str(error))


def python(code: str) -> str:
    return call("python", code=code)


def workers() -> list[int]:
    """Sandboxes of this process."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int(entry.joinpath("stat").read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid() and b"worker.py" in entry.joinpath("cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            pass
    return found


@pytest.mark.usefixtures("locked")
def test_python_keeps_its_variables_for_one_request() -> None:
    said = [python("x = 6"), python("print(x * 7)"), "It is 42."]

    async def work() -> None:
        with tool_server(*said, tools=["python"]) as box:
            answer = await Client(box).answer()
            results = [event for event in events_of(answer["choices"][0]["message"]) if event[0] == "result"]
            assert [event[2].strip() for event in results] == ["(no output)", "42"]
            box.engine._script = Replies(python("print(x)"), "Gone.")
            message = (await Client(box).answer())["choices"][0]["message"]
            assert events_of(message)[1][3] and "NameError" in events_of(message)[1][2]
            assert message["content"] == "Gone."
            await settled(lambda: not workers())

    asyncio.run(work())


@pytest.mark.usefixtures("locked")
def test_a_client_that_leaves_kills_the_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kllm.serve.errand._GRACE", 30.0)  # it is told, and need not be thrown out

    async def work() -> None:
        with tool_server(python("import time; time.sleep(9)"), "never", tools=["python"]) as box:
            client = Client(box, stream=True)
            await settled(lambda: len(workers()) == 1)
            client.leave()
            left = time.monotonic()
            await settled(lambda: not workers())
            assert time.monotonic() - left < 6  # it would sleep longer
            await settled(idle(box))
            await settled(lambda: box.app.state.tools.places._value == 4)

    asyncio.run(work())


@pytest.mark.usefixtures("locked")
def test_only_so_many_sandboxes() -> None:
    async def work() -> None:
        with tool_server(python("while True: pass"), "done", tools=["python"], max_sandboxes=1) as box:
            clients = [Client(box), Client(box)]
            await settled(lambda: len(workers()) == 1)
            await asyncio.sleep(0.2)
            (first,) = workers()
            os.kill(first, signal.SIGKILL)  # its request goes on, ends, and lets the other have its place
            done, _ = await asyncio.wait([c.task for c in clients], return_when="FIRST_COMPLETED", timeout=20)
            assert len(done) == 1
            await settled(lambda: workers() not in ([], [first]))
            for client in clients:
                client.leave()
            await settled(lambda: not workers())
            await settled(lambda: box.app.state.tools.places._value == 1)

    asyncio.run(work())


@pytest.mark.usefixtures("locked")
def test_who_waits_for_a_sandbox_may_leave() -> None:
    async def work() -> None:
        with tool_server(python("while True: pass"), "never", tools=["python"], max_sandboxes=1) as box:
            first, second = Client(box), Client(box)
            await settled(lambda: len(workers()) == 1 and len(box.engine.asked) == 2)
            await settled(lambda: box.runtime.running == 0)
            second.leave()
            await asyncio.wait([second.task], timeout=10)
            assert len(workers()) == 1
            first.leave()
            await settled(lambda: box.app.state.tools.places._value == 1 and not workers())

    asyncio.run(work())
