"""Collecting a teacher's answers over HTTP: what is asked, what is tried again, what ends the run."""

from __future__ import annotations

import datetime
import email.utils
import json
import shutil
import socket
import ssl
import subprocess
from pathlib import Path
from typing import Any

import pytest
from collect_fake_server import FakeTeacher, question, said
from collect_support import CITIES, answers_of, ask_of, job_of, prompts_file, rows_of, run, tell
from data_tools import write_jsonl

from kllm.data.formats import normalise
from kllm.data.sources import iter_records
from kllm.errors import KllmError, UserError
from kllm.http_client import Target
from kllm.observe.console import JsonReporter, QuietReporter
from kllm.run import collect_client
from kllm.run.collect import collect
from kllm.run.collect_client import Sampling, _retry_after
from kllm.run.collect_filter import Rules


def test_answers_become_a_conversation_file_in_the_order_of_the_prompts(tmp_path: Path) -> None:
    prompts_file(tmp_path)
    with FakeTeacher(tell, delay=0.02, key="s3cret").listening() as server:
        job = job_of(
            tmp_path, server.url + "/v1/", api_key="s3cret", system="Be brief.",
            sampling=Sampling(max_tokens=77, temperature=0.5, top_p=0.9, enable_thinking=True, extra={"top_k": 5}),
        )  # fmt: skip
        report = collect(job, QuietReporter())
    rows = rows_of(job.out)
    assert [row["messages"][0]["content"] for row in rows] == [ask_of(city) for city in CITIES[:6]]
    assert answers_of(job.out) == [tell({"messages": [{"content": ask_of(c)}]})["choices"][0]["message"]["content"] for c in CITIES[:6]]  # fmt: skip
    asked = server.asked[0]
    assert asked["messages"][0] == {"role": "system", "content": "Be brief."}
    assert asked["model"] == "fake-0" and "stream" not in asked
    assert (asked["max_tokens"], asked["temperature"], asked["top_p"], asked["top_k"]) == (77, 0.5, 0.9, 5)
    assert asked["chat_template_kwargs"] == {"enable_thinking": True}
    assert len({body["seed"] for body in server.asked}) == 6 and all(
        0 <= b["seed"] < 2**31 for b in server.asked
    )
    assert 1 < server.most <= 4, "requests go out side by side, no more than asked for"
    assert report.kept == report.requests == 6 and report.completion_tokens > 100 and not report.dropped
    assert "s3cret" not in repr(job) + job.answers.read_text() + json.dumps(report.to_dict())
    for _, row in iter_records(job.out):
        normalise(row, "chat")


def test_a_second_run_asks_nothing_and_other_rules_need_no_new_answer(tmp_path: Path) -> None:
    prompts_file(tmp_path)
    with FakeTeacher(tell).listening() as server:
        run(tmp_path, server.url, model="m")
        first, asked = (tmp_path / "out.jsonl").read_bytes(), len(server.asked)
        assert run(tmp_path, server.url, model="m").requests == 0
        assert (tmp_path / "out.jsonl").read_bytes() == first and len(server.asked) == asked
    stricter = run(tmp_path, server.url, model="m", rules=Rules(require=("Rome",)))
    assert stricter.kept == 1 and stricter.dropped == {"lacks a required text": 5}, "without any server"
    with pytest.raises(KllmError, match="connection refused"):
        run(tmp_path, server.url, model="m", sampling=Sampling(temperature=0.1))  # another question


def test_what_may_pass_is_tried_again(tmp_path: Path) -> None:
    """429, 5xx, broken JSON, a cut connection, an error instead of an answer: the second try succeeds."""
    prompts_file(tmp_path)
    troubles: list[Any] = [
        (429, {"error": {"message": "slow down"}}, "Retry-After: 0.05\r\n"), (500, "oh"), "{no json", "cut",
        {"error": {"message": "overloaded"}}, {"choices": []},
    ]  # fmt: skip

    def answer(body: dict[str, Any], before: int) -> Any:
        return tell(body) if before else troubles[CITIES.index(question(body).split()[2])]

    with FakeTeacher(answer).listening() as server:
        report = run(tmp_path, server.url)
    assert report.kept == 6 and report.retries == 6 and not report.failed
    assert len(server.asked) == 12


def test_the_time_the_server_names_is_kept_by_all(tmp_path: Path) -> None:
    prompts_file(tmp_path, 4)
    moments: list[float] = []

    def answer(body: dict[str, Any], before: int) -> Any:
        import time

        moments.append(time.monotonic())
        return (429, {}, "Retry-After: 0.4\r\n") if len(moments) == 1 else tell(body)

    with FakeTeacher(answer).listening() as server:
        report = run(tmp_path, server.url, parallel=1)
    assert report.kept == 4 and moments[1] - moments[0] >= 0.4


def test_a_date_is_a_time_to_wait_too() -> None:
    soon = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=100)
    waits = _retry_after({"retry-after": email.utils.format_datetime(soon, usegmt=True)})
    assert waits is not None and 95 < waits <= 100
    assert _retry_after({"retry-after-ms": "1500"}) == 1.5 and _retry_after({"retry-after": "7"}) == 7
    for nothing in ("", "soon", "nan"):
        assert _retry_after({"retry-after": nothing}) is None


def test_a_server_that_wants_too_much_patience_ends_the_run(tmp_path: Path) -> None:
    prompts_file(tmp_path)
    with (
        FakeTeacher(lambda body, before: (429, {}, "Retry-After: 86400\r\n")).listening() as server,
        pytest.raises(KllmError, match="asks to wait 86,400 s"),
    ):
        run(tmp_path, server.url)


def test_an_answer_that_never_comes_counts_and_is_asked_again_next_time(tmp_path: Path) -> None:
    prompts_file(tmp_path, 3)
    silent = True

    def answer(body: dict[str, Any], before: int) -> Any:
        return "silence" if silent and "Rome" in question(body) else tell(body)

    with FakeTeacher(answer).listening() as server:
        report = run(tmp_path, server.url, timeout=0.2, retries=1)
        assert report.kept == 2 and report.failed == {"no answer in time": 1} and report.retries == 1
        silent = False
        report = run(tmp_path, server.url)
        assert report.kept == 3 and report.requests == 1
    assert [row["messages"][0]["content"] for row in rows_of(tmp_path / "out.jsonl")] == [
        ask_of(c) for c in CITIES[:3]
    ]


@pytest.mark.parametrize(
    ("status", "body", "match"),
    [
        (401, {"error": {"message": "bad key"}}, r"wants a key \(http 401: bad key\).*set \$OPENAI_API_KEY"),
        (403, {}, "wants a key"),
        (402, {"error": {"message": "no money"}}, "account is spent .*no money"),
        (429, {"error": {"message": "quota", "code": "insufficient_quota"}}, "account is spent"),
        (404, {"detail": "no model m"}, "no such model or address .*no model m"),
        (301, "", "has moved"),
        (400, {"error": {"message": "max_tokens is unknown"}}, "last 8 questions got no answer: http 400: max_tokens is unknown"),
        (503, {"error": "down"}, "last 8 questions got no answer: http 503: down"),
    ],
)  # fmt: skip
def test_what_cannot_pass_ends_the_run_with_one_line(
    tmp_path: Path, status: int, body: Any, match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    prompts_file(tmp_path, 12)
    with (
        FakeTeacher(lambda asked, before: (status, body)).listening() as server,
        pytest.raises(KllmError, match=match) as error,
    ):
        run(tmp_path, server.url, retries=0, parallel=2)
    assert "\n" not in str(error.value) and not (tmp_path / "out.jsonl").exists()
    assert len(server.asked) <= 10, "nobody goes on asking"


def test_a_wrong_key_is_said_before_any_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts_file(tmp_path)
    monkeypatch.setenv("MY_KEY", "wrong")
    with (
        FakeTeacher(tell, key="right").listening() as server,
        pytest.raises(UserError, match=r"wrong key \(http 401: Incorrect API key\) \(set \$MY_KEY\)"),
    ):
        run(tmp_path, server.url, api_key_env="MY_KEY", model="m")
    assert not server.asked


def test_a_question_at_fault_costs_only_itself(tmp_path: Path) -> None:
    prompts_file(tmp_path, 12)

    def answer(body: dict[str, Any], before: int) -> Any:
        return (400, {"error": {"message": "too long"}}) if question(body) > "What is L" else tell(body)

    with FakeTeacher(answer).listening() as server:
        report = run(tmp_path, server.url, parallel=1)
    assert report.failed == {"http 400": 8} and report.kept == 4 and report.retries == 0


@pytest.mark.parametrize("url", ["http://127.0.0.1:{port}/v1", "http://no-such-host.invalid"])
def test_a_dead_address_is_said_at_once(tmp_path: Path, url: str) -> None:
    prompts_file(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = url.format(port=free.getsockname()[1])
    with pytest.raises(KllmError, match="connection refused|unknown host|no answer"):
        run(tmp_path, url)


def test_a_server_that_goes_away_ends_the_run_and_keeps_what_came(tmp_path: Path) -> None:
    prompts_file(tmp_path, 12)

    def answer(body: dict[str, Any], before: int) -> Any:
        return tell(body) if len(server.asked) <= 3 else "cut"

    with (
        FakeTeacher(answer).listening() as server,
        pytest.raises(KllmError, match="last 8 questions got no answer: no connection.*goes on"),
    ):
        run(tmp_path, server.url, retries=0, parallel=1)
    assert len(rows_of(tmp_path / "out.jsonl.answers")) == 3


def test_several_models_must_be_chosen_from(tmp_path: Path) -> None:
    prompts_file(tmp_path)
    with FakeTeacher(tell, models=2).listening() as server:
        with pytest.raises(UserError, match="which of its models\\? it lists fake-0, fake-1"):
            run(tmp_path, server.url)
        assert run(tmp_path, server.url, model="fake-1").model == "fake-1"
    assert {body["model"] for body in server.asked} == {"fake-1"}


def test_every_kind_of_data_gives_prompts(tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("第一个问题？\n\n  第二个问题？  \n", encoding="utf-8")
    talk = [
        {"role": "user", "content": "a?"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c?"},
    ]
    rows: list[Any] = [
        "bare text?", {"question": "2+2?", "answer": "4"}, {"messages": [*talk, {"role": "assistant", "content": "old"}]},
        {"instruction": "Say", "input": "this", "output": "old"}, {"prompt": "p?", "chosen": "x", "rejected": "y"},
        {"conversations": [{"from": "human", "value": "h?"}, {"from": "gpt", "value": "old"}]}, {"text": "2+2?"},
    ]  # fmt: skip
    write_jsonl(tmp_path / "prompts.jsonl", rows)

    def answer(body: dict[str, Any], before: int) -> Any:
        return said("".join(m["content"][:3] for m in body["messages"]))

    with FakeTeacher(answer).listening() as server:
        files = [str(tmp_path / "lines.txt"), str(tmp_path / "prompts.jsonl")]
        report = run(tmp_path, server.url, prompts=files, rules=Rules(language="any"), parallel=1)
    assert server.questions == [
        "第一个问题？",
        "第二个问题？",
        "bare text?",
        "2+2?",
        "c?",
        "Say\nthis",
        "p?",
        "h?",
    ]
    assert report.repeated_prompts == 1 and report.kept == 8
    assert rows_of(tmp_path / "out.jsonl")[4]["messages"][:3] == talk


def test_bad_rows_are_said_with_their_place_before_anything_is_asked(tmp_path: Path) -> None:
    file = write_jsonl(
        tmp_path / "prompts.jsonl", [{"prompt": "a?"}, {"messages": [{"role": "system", "content": "x"}]}]
    )
    with FakeTeacher(tell).listening() as server:
        with pytest.raises(UserError, match=rf"{file}:2: there is no question"):
            run(tmp_path, server.url)
        assert not server.heads
        with pytest.raises(UserError, match="no such file"):
            run(tmp_path, server.url, prompts=[str(tmp_path / "missing.jsonl")])
    file.write_text("\n")
    with pytest.raises(UserError, match="no prompts"):
        run(tmp_path, "http://127.0.0.1:9")


def test_figures_and_reasons_are_shown_while_it_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kllm.run.collect_report._LINE_SECONDS", 0.1)
    monkeypatch.setattr("kllm.run.collect_report._BAR_SECONDS", 0.02)
    prompts_file(tmp_path, 8)

    def answer(body: dict[str, Any], before: int) -> Any:
        return said("I'm sorry, I cannot help.") if "Rome" in question(body) else tell(body)

    with FakeTeacher(answer, delay=0.1).listening() as server:
        report = collect(job_of(tmp_path, server.url, parallel=2), JsonReporter())
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    lines = [e for e in events if e["event"] == "progress"]
    assert len(lines) > 2 and lines[-1]["step"] == lines[-1]["total"] == 8
    assert lines[-1]["collect/kept"] == 7 and lines[-1]["collect/dropped"] == 1
    assert lines[-1]["collect/requests_s"] > 1 and lines[-1]["perf/tok_s"] > 10
    assert any(e["event"] == "message" and e["text"] == "dropped so far: refusal 1" for e in events)
    rows = dict(report.rows())
    assert rows["conversations"] == "7 of 8 answers to 8 prompts" and rows["dropped: refusal"] == "1"
    assert rows["requests"].startswith("8 in ") and "tokens/s" in rows["speed"]
    found = json.loads(json.dumps(report.to_dict()))
    assert found["dropped"] == {"refusal": 1} and found["kept"] == 7 and found["requests_per_second"] > 1


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"parallel": 0}, "parallel"), ({"samples": 0}, "samples"), ({"duplicates": 1.5}, "duplicates"),
        ({"best": "random"}, "known: first shortest"), ({"endpoint": "http://"}, "no http address"),
        ({"samples": 2, "sampling": Sampling(temperature=0)}, "same answer"), ({"api_key": "a\nb"}, "the key has a character"),
    ],
)  # fmt: skip
def test_wrong_options_are_said_in_one_line(tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    prompts_file(tmp_path)
    with pytest.raises(UserError, match=match):
        run(
            tmp_path,
            **{
                "url": "http://127.0.0.1:9",
                **({"url": changes.pop("endpoint")} if "endpoint" in changes else {}),
            },
            **changes,
        )


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("http://h", "/v1"), ("http://h:1/v1", "/v1"), ("https://h/api/v1/", "/api/v1"), ("https://h/api/paas/v4", "/api/paas/v4"),
        ("https://h/v1beta/openai", "/v1beta/openai"), ("https://h/v1/chat/completions", "/v1"), ("https://h/compatible", "/compatible/v1"),
    ],
)  # fmt: skip
def test_addresses_as_servers_document_them(url: str, path: str) -> None:
    assert Target.parse(url).versioned().base == path


def test_over_tls_with_the_certificate_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not shutil.which("openssl"):
        pytest.skip("no openssl to make a certificate")
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", key,
         "-out", cert, "-days", "2", "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    prompts_file(tmp_path)
    server = FakeTeacher(tell)
    server.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.tls.load_cert_chain(cert, key)
    client = collect_client.request.__globals__["_tls"]
    with server.listening():
        client.cache_clear()
        with pytest.raises(KllmError, match="no secure connection: self.signed certificate"):
            run(tmp_path, server.url)
        client.cache_clear()
        monkeypatch.setenv("SSL_CERT_FILE", str(cert))
        assert run(tmp_path, server.url).kept == 6
    client.cache_clear()


def test_a_key_that_the_server_says_again_is_hidden(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts_file(tmp_path, 2)
    again = {"error": {"message": "Incorrect API key: Bearer sk-s3/cret"}}
    for status in (401, 400, 200):
        teacher = FakeTeacher(lambda body, before, s=status: (s, again))
        with teacher.listening() as server, pytest.raises(KllmError) as error:
            run(tmp_path, server.url, api_key="sk-s3/cret", model="m", retries=0, parallel=1)
        shown = str(error.value) + capsys.readouterr().err
        assert "Bearer ***" in shown and "sk-s3" not in shown
