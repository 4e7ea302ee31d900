"""The sandbox as its users see it: a REPL's manners, limits, function calls, and how a run may end."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kllm.tools.sandbox import Limits, Sandbox, process, run

# Without the lock where there is no Landlock: this file is about behaviour, the escape tests about the lock.
UNSAFE = process.landlock_abi() < 1
QUICK = Limits(seconds=0.4)


def add(args: list[Any], kwargs: dict[str, Any]) -> Any:
    return sum(args) + kwargs.get("more", 0)


def fail(args: list[Any], kwargs: dict[str, Any]) -> Any:
    raise ValueError("the table has no such row")


def slow(args: list[Any], kwargs: dict[str, Any]) -> Any:
    time.sleep(0.6)
    return "late"


FUNCTIONS = {
    "add": add,
    "fail": fail,
    "slow": slow,
    "odd": lambda a, k: {1, 2},
    "big": lambda a, k: "x" * 10**6,
}


@pytest.fixture(scope="module")
def box() -> Iterator[Sandbox]:
    """For runs that leave the worker alive."""
    with Sandbox(FUNCTIONS, unsafe=UNSAFE) as shared:
        yield shared


@pytest.fixture(scope="module")
def quick() -> Iterator[Sandbox]:
    """Little time; every test may kill its worker."""
    with Sandbox(FUNCTIONS, limits=QUICK, unsafe=UNSAFE) as shared:
        yield shared


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def gone(pid: int) -> bool:
    """Whether the process ends within 5 s; a signal takes its time."""
    end = time.monotonic() + 5
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.01)
    return not alive(pid)


def pid_of(box: Sandbox) -> int:
    return int(box.run("import os; os.getpid()").output)


# -- a REPL's manners


@pytest.mark.parametrize(
    ("code", "output"),
    [
        ("1 + 1", "2\n"),
        ("print('a')\n'b'", "a\n'b'\n"),
        ("None", ""),
        ("x = 5", ""),
        ("", ""),
        ("# nothing", ""),
        ("3; 4", "4\n"),
        ("import sys\nprint('out'); print('err', file=sys.stderr); print('out')", "out\nerr\nout\n"),
        ("print('你好, ', end='')\n'é'", "你好, 'é'\n"),
        ("print('\\ud800!')", "?!\n"),
        ("'\\ud800'", "'\\ud800'\n"),
        ("import sys; sys.stdout.buffer.write(b'raw\\n'); sys.stdout.flush()", "raw\n"),
        ("__name__", "'__main__'\n"),
        ("from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\nP(3)", "P(x=3)\n"),
        ("from __future__ import annotations\ndef f(x: nope): ...\nf.__annotations__", "{'x': 'nope'}\n"),
        ("input()", None),
    ],
)
def test_prints_and_the_last_value_are_shown(box: Sandbox, code: str, output: str | None) -> None:
    ran = box.run(code)
    if output is None:
        assert ran.error is not None and ran.error.startswith("EOFError")
    else:
        assert (ran.output, ran.error, ran.lost) == (output, None, False)
    assert 0 < ran.seconds < 5


def test_variables_and_files_live_on(box: Sandbox) -> None:
    assert box.run("def double(x): return 2 * x\nopen('kept.txt', 'w').write('kept'); y = 20").output == ""
    assert box.run("double(y) + 2").output == "42\n"
    assert box.run("_ + 1").output == "43\n"
    assert box.run("open('kept.txt').read()").output == "'kept'\n"


def test_the_standard_library_is_there(box: Sandbox) -> None:
    names = (
        "math, random, statistics, itertools, functools, collections, re, json, datetime, string, decimal, "
        "fractions, textwrap, heapq, bisect, copy, dataclasses, typing, operator, enum, time, calendar, csv, "
        "unicodedata, hashlib, zlib, tempfile, pathlib, shutil, ctypes, logging, pprint, uuid, base64, struct"
    )
    ran = box.run(
        f"import {names}\nstatistics.mean([1, 2]), 'ä'.encode('cp1252'), time.localtime().tm_year > 2000"
    )
    assert ran.output == "(1.5, b'\\xe4', True)\n", ran


def test_a_traceback_shows_the_codes_own_lines_only(box: Sandbox) -> None:
    box.run("def divide(a):\n    return a / 0")
    ran = box.run("try:\n    divide(1)\nexcept ZeroDivisionError as e:\n    raise KeyError('k') from e")
    assert ran.error == "KeyError: 'k'" and not ran.lost
    assert "worker.py" not in ran.output and "return a / 0" in box.run("divide(1)").output
    assert ran.output.endswith("KeyError: 'k'\n") and "raise KeyError('k') from e" in ran.output
    deep = box.run("def r(): return r()\nr()")
    assert (
        deep.error is not None and deep.error.startswith("RecursionError") and deep.output.count("\n") <= 10
    )


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("1 +", "SyntaxError: invalid syntax"),
        ("x = '\\ud800", "SyntaxError"),
        ("'" + "\ud800" + "'", "UnicodeEncodeError"),
        ("a\0b", "S|V"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("raise SystemExit", "SystemExit"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("raise GeneratorExit('g')", "GeneratorExit: g"),
        ("bytearray(10**10)", "MemoryError"),
        ("x = [0] * 10**9", "MemoryError"),
        ("class E(Exception):\n    def __str__(self): return 1 / 0\nraise E", "E"),
        ("class R:\n    def __repr__(self): raise ValueError('no repr')\nR()", "ValueError: no repr"),
        ("raise ValueError('one\\ntwo')", "ValueError: one"),
        ("(" * 5000, "SyntaxError|MemoryError|RecursionError"),
        ("open('big', 'wb').write(bytes(2 << 20))", "OSError: [Errno 27]"),
    ],
)
def test_errors_are_reported_and_the_worker_lives_on(box: Sandbox, code: str, error: str) -> None:
    box.run("here = 'still'")
    ran = box.run(code)
    assert ran.error is not None and ran.error.startswith(tuple(error.split("|"))), ran
    assert not ran.lost and ran.output.endswith("\n") and len(ran.output.splitlines()) <= 10
    assert box.run("here").output == "'still'\n"


def test_code_that_is_too_long_is_refused(box: Sandbox) -> None:
    ran = box.run("#" * (64 << 10) + "\n")
    assert ran.error == "the code is too long: over 64 kB" and ran.error in ran.output and not ran.lost
    assert box.run("#" * ((64 << 10) - 2) + "\n1").error is None


def test_the_environment_is_clean(box: Sandbox) -> None:
    seen = box.run(
        "import os, sys\nset(os.environ) - {'LC_CTYPE', 'LD_LIBRARY_PATH'}, os.getcwd(), sys.argv"
    ).output
    assert seen.startswith("(set(), ") and "kllm-python-" in seen and "['']" in seen


# -- limits


def test_output_is_cut_in_the_middle() -> None:
    short = Sandbox(limits=Limits(output=400), unsafe=UNSAFE)
    ran = short.run("print('start')\nfor i in range(20000): print('é' * 20)\nprint('end')\n'value'")
    assert ran.output.startswith("start\n") and ran.output.endswith("end\n'value'\n")
    assert "bytes cut ...]" in ran.output and "\ufffd" not in ran.output
    assert len(ran.output.encode()) < 500 and ran.error is None
    assert short.run("'x' * 10**7").output.count("x") < 400
    short.close()


def test_a_time_out_kills_says_so_and_the_next_run_starts_anew(quick: Sandbox) -> None:
    quick.run("x = 1; open('f', 'w').close()")
    folder = quick._worker.scratch  # type: ignore[union-attr]
    ran = quick.run("print('before')\nwhile True: pass")
    assert ran.lost and ran.error == "time-out after 0.4 s" and 0.4 <= ran.seconds < 5
    assert (
        ran.output == "before\n[time-out after 0.4 s: the worker is gone, its variables and files are lost]\n"
    )
    assert not folder.exists()
    assert quick.run("x").error == "NameError: name 'x' is not defined"
    assert quick.run("import os; os.listdir()").output == "[]\n"


def test_processor_time_is_limited_run_by_run() -> None:
    limits = Limits(seconds=30, cpu_seconds=1)
    spin = "import time\nend = time.process_time() + 0.6\nwhile time.process_time() < end: pass"
    with Sandbox(limits=limits, unsafe=UNSAFE) as box:
        assert [box.run(spin).error for _ in range(3)] == [None] * 3
        ran = box.run("while True: pass")
    assert ran.lost and ran.error == "time-out: 1 s of processor time used up" and ran.seconds < 30


def test_interruption(box: Sandbox) -> None:
    asked: list[float] = []

    def interrupted() -> bool:
        asked.append(time.monotonic())
        return len(asked) > 2

    with Sandbox(unsafe=UNSAFE) as own:
        ran = own.run("import time\nprint('so far')\ntime.sleep(60)", interrupted)
        assert ran.lost and ran.error == "interrupted" and ran.seconds < 3
        assert ran.output.startswith("so far\n[interrupted: ")
        assert own.run("1", lambda: False).output == "1\n"


def test_ctrl_c_in_the_parent_kills_the_worker() -> None:
    def interrupted() -> bool:
        raise KeyboardInterrupt

    with Sandbox(unsafe=UNSAFE) as own:
        pid = pid_of(own)
        with pytest.raises(KeyboardInterrupt):
            own.run("while True: pass", interrupted)
        assert not alive(pid) and own.run("1").output == "1\n"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import os; print('last words'); os._exit(7)", "the code ended the worker (exit code 7)"),
        ("import os; os.close(3); os._exit(0)", "the code ended the worker (exit code 0)"),
        ("import ctypes; ctypes.string_at(0)", "the worker crashed (SIGSEGV)"),
        ("import os; os.abort()", "the worker crashed (SIG"),
        ("import os, time; os.closerange(3, 100); time.sleep(9)", "the code closed the worker's pipes"),
    ],
)
def test_a_workers_end_in_words(box: Sandbox, code: str, words: str) -> None:
    with Sandbox(unsafe=UNSAFE) as own:
        own.start()
        if "os.abort" in code or "string_at" in code:
            own.run("import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0))")
        ran = own.run(code)
        assert ran.lost and ran.error is not None and ran.error.startswith(words), ran
        assert "variables and files are lost" in ran.output and ran.seconds < 8
        assert own.run("2").output == "2\n"
    if "last words" in code:
        assert ran.output.startswith("last words\n")


def test_return_codes_in_words() -> None:
    ends = {
        -6: "SIGABRT",
        -9: "the system killed",
        -31: "forbidden",
        -24: "5 s of processor",
        1: "exit code 1",
        None: "closed",
        -11: "SIGSEGV",
        -99: "signal 99",
    }
    for code, words in ends.items():
        assert words.lower() in run.how_it_ended(code, Limits()).lower(), code


def test_kept_bytes() -> None:
    kept = run.Kept(10)
    for i in range(100):
        kept.add(b"%02d" % i)
    assert kept.text() == "00010\n[... 190 bytes cut ...]\n79899" and len(kept.tail) == 5
    whole = run.Kept(10)
    whole.add(b"123456")
    assert whole.text() == "123456"


# -- functions


def test_functions_run_in_the_parent(box: Sandbox) -> None:
    assert box.run("add(1, 2, more=0.5)").output == "3.5\n"
    assert box.run("[add(i) for i in range(50)][-1]").output == "49\n"
    ran = box.run("fail()")
    assert ran.error == "ToolError: the table has no such row" and "worker.py" not in ran.output
    assert (
        box.run("try:\n    fail()\nexcept RuntimeError as e:\n    print('caught', e)").output
        == "caught the table has no such row\n"
    )
    assert box.run("add(1j)").error == "TypeError: Object of type complex is not JSON serializable"
    assert "cannot be sent" in (box.run("odd()").error or "")
    assert "too long" in (box.run("big()").error or "")
    assert box.run("add").output.startswith("<function add")


def test_calls_are_counted(box: Sandbox) -> None:
    ran = box.run("n = 0\nwhile True:\n    n = add(n, 1)")
    assert ran.error == "ToolError: no more than 100 function calls in one run"
    assert box.run("n").output == "100\n" and box.run("add(1)").output == "1\n"


def test_a_functions_time_counts(quick: Sandbox) -> None:
    ran = quick.run("slow()")
    assert ran.lost and ran.error == "time-out after 0.4 s" and ran.seconds < 5


def test_names_that_are_none() -> None:
    for name in ("a b", "class", ""):
        with pytest.raises(ValueError, match="name"):
            Sandbox({name: add})


HOSTILE = {
    "not json": "b'hello\\n'",
    "pickle": "__import__('pickle').dumps(print) + b'\\n'",
    "not an object": "b'[1, 2]\\n'",
    "deep": "b'[' * 100000 + b'\\n'",
    "huge number": "b'{\"done\": ' + b'9' * 100000 + b'}\\n'",
    "no end": "b'x' * 10**6",
    "not utf-8": "b'\\xff\\xfe\\n'",
    "flood": "b'{}\\n' * 5000",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_nonsense_in_the_pipe_ends_the_run_only(box: Sandbox, name: str) -> None:
    ran = box.run(
        f"import os, sys, time\nwrite = lambda data: os.write(REPLIES, data)\nREPLIES = {replies(box)}\nwrite({HOSTILE[name]})\ntime.sleep(5)"
    )
    assert ran.lost and ran.error is not None and "into the worker's pipe" in ran.error, ran
    assert ran.seconds < 3 and box.run("add(2, 3)").output == "5\n"


ODD_CALLS = {
    "unknown function": {"call": "__import__", "args": [], "kwargs": {}, "id": 1},
    "unhashable function": {"call": ["add"], "args": [], "kwargs": {}},
    "unhashable id": {"call": "add", "args": [], "kwargs": {}, "id": [{}]},
    "args of a wrong type": {"call": "add", "args": "abc", "kwargs": {}},
    "kwargs of a wrong type": {"call": "add", "args": [], "kwargs": [1]},
    "no args": {"call": "add"},
    "somebody else's done": {"done": [1]},
    "an earlier done": {"done": 1, "error": "forged"},
}


@pytest.mark.parametrize("name", ODD_CALLS)
def test_odd_messages_are_answered_or_ignored(box: Sandbox, name: str) -> None:
    box.run("1")
    line = json.dumps(ODD_CALLS[name])
    ran = box.run(f"import os\nos.write({replies(box)}, {line!r}.encode() + b'\\n')\nadd(1, 1)")
    assert (ran.output, ran.error, ran.lost) == ("2\n", None, False)
    assert box.run("add(2, 2)").output == "4\n"


def replies(box: Sandbox) -> int:
    """The number of the worker's reply pipe, found as hostile code would."""
    code = "import gc\nnext(o.replies for o in gc.get_objects() if type(o).__name__ == 'Pipes')"
    return int(box.run(code).output)


def test_a_forged_end_stops_the_code_and_spoils_no_later_run() -> None:
    with Sandbox(FUNCTIONS, unsafe=UNSAFE) as box:
        number = box._runs + 2
        forged = f'{{"done": {number}, "error": null}}\\n{{"done": {number + 1}, "error": "forged"}}\\n'
        ran = box.run(
            f"import os, time\nos.write({replies(box)}, b'{forged}')\nend = time.time() + 0.5\n"
            "while time.time() < end: pass\nprint('leftover', add(1))"
        )
        assert ran.error is None and not ran.lost and ran.seconds < 0.5
        stat = Path(f"/proc/{box._worker.process.pid}/stat")  # type: ignore[union-attr]
        end = time.monotonic() + 5
        while stat.read_text().split()[2] != "T":  # stopped: nothing of it goes on while nobody looks
            assert time.monotonic() < end
            time.sleep(0.01)
        later = box.run("'mine'")
        assert later.error is None and "'mine'" in later.output and "leftover 1" not in later.output
        assert box.run("add(3, 4)").output == "7\n"


def test_a_flood_of_calls_without_reading_the_answers(box: Sandbox) -> None:
    line = '{"call": "add", "args": [1], "kwargs": {}, "id": 5}\\n'
    ran = box.run(f"import os\nfor i in range(100000): os.write({replies(box)}, b'{line}')")
    assert ran.lost and ran.seconds < 5 and box.run("add(1)").output == "1\n"


def test_a_flood_of_calls_of_a_slow_function(quick: Sandbox) -> None:
    """The wall clock is looked at after each, not after all."""
    line = '{"call": "slow", "args": [], "kwargs": {}, "id": 5}\\n' * 50
    ran = quick.run(f"import os, time\nos.write({replies(quick)}, b'{line}')\ntime.sleep(9)")
    assert ran.lost and ran.error == "time-out after 0.4 s" and ran.seconds < 5


def test_stdout_replaced_with_junk(box: Sandbox) -> None:
    ran = box.run("import sys\nprint('before')\nsys.stdout = sys.stderr = 3\n'value'")
    assert (ran.output, ran.error) == ("before\n'value'\n", None)
    ran = box.run(
        "import sys\nclass J:\n    def __getattr__(self, n): raise SystemExit(9)\nsys.stdout = J()\nprint(1)"
    )
    assert ran.error == "SystemExit: 9" and not ran.lost
    assert box.run("import sys\nsys.stdout.close(); sys.stderr = None\n1").output == "1\n"
    assert box.run("import os\nos.close(1); os.close(2)\nprint('still'); 2").output == "still\n2\n"
    assert box.run("import sys\nsys.displayhook = sys.excepthook = None\n3").lost is False
    assert box.run("print(4)").output == "4\n"


def test_timers_do_not_outlive_their_run(box: Sandbox) -> None:
    ran = box.run(
        "import signal\nsignal.signal(signal.SIGALRM, lambda *a: print('alarm'))\nsignal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)"
    )
    assert ran.error is None
    time.sleep(0.1)
    assert box.run("import time; time.sleep(0.1); 5").output == "5\n"
