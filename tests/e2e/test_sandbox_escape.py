"""The probes and escapes of the serving spec (10.3): each is tried in the sandbox and must come to nothing.

Where that is harmless the same probe is also run without the lock (`unsafe`), where it must succeed: a
probe that cannot succeed proves nothing.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kllm.tools.sandbox import Limits, Ran, Sandbox, process

pytestmark = pytest.mark.skipif(process.landlock_abi() < 1, reason="this kernel has no Landlock")

DENIED, REFUSED = "PermissionError: [Errno 13]", "PermissionError: [Errno 1]"  # Landlock's and seccomp's


@pytest.fixture(scope="module")
def box() -> Iterator[Sandbox]:
    with Sandbox() as locked:
        yield locked


@pytest.fixture(scope="module")
def control() -> Iterator[Sandbox]:
    """The same without the lock."""
    with Sandbox(unsafe=True) as open_:
        yield open_


@pytest.fixture
def heard() -> Iterator[list[int]]:
    """SIGUSR1 that reaches this process, the sandbox's parent."""
    signals: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: signals.append(number))
    yield signals
    signal.signal(signal.SIGUSR1, before)


class Listener:
    """Loopback TCP and UDP sockets, and what arrives there."""

    def __init__(self) -> None:
        self.tcp = socket.create_server(("127.0.0.1", 0))
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.udp.bind(("127.0.0.1", 0))
        self.ports = self.tcp.getsockname()[1], self.udp.getsockname()[1]

    def arrived(self) -> set[str]:
        got = set()
        for name, sock in (("tcp", self.tcp), ("udp", self.udp)):
            sock.settimeout(0.05)
            try:
                if name == "tcp":
                    sock.accept()[0].close()
                else:
                    sock.recv(100)
                got.add(name)
            except TimeoutError:
                pass
        return got


@pytest.fixture
def listener() -> Iterator[Listener]:
    it = Listener()
    yield it
    it.tcp.close()
    it.udp.close()


def refused(ran: Ran, *errors: str) -> bool:
    """It failed with one of `errors`, and the worker is none the worse for it."""
    assert ran.error is not None and not ran.lost, ran
    assert ran.error.startswith(errors), ran
    return True


def went_well(ran: Ran) -> str:
    assert ran.error is None and not ran.lost, ran
    return ran.output


# -- the twelve probes


def test_probe_read_etc_passwd(box: Sandbox, control: Sandbox) -> None:
    code = "open('/etc/passwd').read()"
    assert "root" in went_well(control.run(code))
    ran = box.run(code)
    assert refused(ran, DENIED) and "root:" not in ran.output


def test_probe_read_home(box: Sandbox, control: Sandbox, tmp_path: Path) -> None:
    home = Path.home()
    for code in (f"import os; os.listdir({str(home)!r})", f"import os; os.listdir({str(tmp_path)!r})"):
        went_well(control.run(code))
        assert refused(box.run(code), DENIED)
    secret = tmp_path / "secret.txt"
    secret.write_text("s3cret")
    code = f"open({str(secret)!r}).read()"
    assert "s3cret" in went_well(control.run(code))
    ran = box.run(code)
    assert refused(ran, DENIED) and "s3cret" not in ran.output
    own = Path(process.__file__)
    assert refused(box.run(f"open({str(own)!r}).read()"), DENIED)  # nor kllm's own code


def test_probe_write_tmp(box: Sandbox, control: Sandbox) -> None:
    for number, sandbox in enumerate((box, control)):
        target = Path(tempfile.gettempdir()) / f"kllm-probe-{os.getpid()}-{number}"
        ran = sandbox.run(f"open({str(target)!r}, 'w').write('x')")
        if sandbox is box:
            assert refused(ran, DENIED) and not target.exists()
        else:
            assert went_well(ran) and target.exists()
            target.unlink()


def test_probe_write_scratch_is_the_only_place(box: Sandbox) -> None:
    assert went_well(box.run("open('mine', 'w').write('x'); open('mine').read()")) == "'x'\n"
    for folder in (
        "/",
        "/dev/shm",
        "/var/tmp",
        str(Path(os.__file__).parent),
        str(Path(sys.executable).parent),
    ):
        name = f"{folder}/kllm-probe-{os.getpid()}"
        assert refused(box.run(f"open({name!r}, 'w')"), DENIED, "FileNotFoundError")
        assert refused(box.run(f"import os; os.mkdir({name!r})"), DENIED, "FileNotFoundError")
        assert not Path(name).exists()


TCP = "import socket\ns = socket.create_connection(('127.0.0.1', {}), 2)\ns.sendall(b'x')"
UDP = "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {}))"


def test_probe_tcp(box: Sandbox, control: Sandbox, listener: Listener) -> None:
    assert refused(box.run(TCP.format(listener.ports[0])), REFUSED)
    assert listener.arrived() == set()
    went_well(control.run(TCP.format(listener.ports[0])))
    assert listener.arrived() == {"tcp"}


def test_probe_udp(box: Sandbox, control: Sandbox, listener: Listener) -> None:
    assert refused(box.run(UDP.format(listener.ports[1])), REFUSED)
    assert listener.arrived() == set()
    went_well(control.run(UDP.format(listener.ports[1])))
    assert listener.arrived() == {"udp"}


def test_probe_listen(box: Sandbox, control: Sandbox) -> None:
    for family in (
        "AF_INET, socket.SOCK_STREAM",
        "AF_INET6, socket.SOCK_STREAM",
        "AF_UNIX, socket.SOCK_STREAM",
        "AF_NETLINK, socket.SOCK_RAW",
        "AF_PACKET, socket.SOCK_RAW",
        "AF_VSOCK, socket.SOCK_STREAM",
    ):
        assert refused(box.run(f"import socket; socket.socket(socket.{family})"), REFUSED)
    assert refused(box.run("import socket; socket.socketpair()"), REFUSED)
    went_well(control.run("import socket; socket.create_server(('127.0.0.1', 0)); socket.socketpair()"))


def children_of(sandbox: Sandbox) -> list[str]:
    pid = sandbox._worker.process.pid  # type: ignore[union-attr]
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def test_probe_fork(box: Sandbox, control: Sandbox) -> None:
    code = "import os, time\npid = os.fork()\nif not pid:\n    time.sleep(60)\npid"
    assert refused(box.run(code), REFUSED) and children_of(box) == []
    assert went_well(control.run(code)).strip() in children_of(control)
    for call in ("os.forkpty()", "os.posix_spawn('/bin/true', ['true'], {})", "os.popen('id').read()"):
        assert refused(box.run(f"import os; {call}"), REFUSED, DENIED)
    assert children_of(box) == []
    status = box.run("import os; os.system('exit 0')")
    assert status.error is not None or status.output.strip() in ("-1", "32512", "65280")


def test_probe_exec(box: Sandbox, control: Sandbox, tmp_path: Path) -> None:
    for call in ("os.execv('/bin/sh', ['sh', '-c', 'exit 0'])", "os.execve(3, ['x'], {})"):
        assert refused(box.run(f"import os; {call}"), REFUSED)
    target = tmp_path / "made"
    code = f"import subprocess; subprocess.run(['touch', {str(target)!r}])"
    assert refused(box.run(code), REFUSED) and not target.exists()
    went_well(control.run(code))
    assert target.exists()
    assert refused(
        box.run("import os\nopen('sh', 'w').write('#!/bin/sh\\n')\nos.execv('sh', ['sh'])"), REFUSED
    )


def test_probe_kill_parent(box: Sandbox, control: Sandbox, heard: list[int]) -> None:
    code = "import os, signal\nos.kill(os.getppid(), signal.SIGUSR1)"
    assert refused(box.run(code), REFUSED)
    assert refused(box.run("import os, signal\nos.killpg(0, signal.SIGUSR1)"), REFUSED)
    assert heard == []
    went_well(control.run(code))
    assert heard == [signal.SIGUSR1]


def test_probe_list_processes(box: Sandbox, control: Sandbox) -> None:
    assert int(went_well(control.run("import os; len([n for n in os.listdir('/proc') if n.isdigit()])"))) > 1
    assert refused(box.run("import os; os.listdir('/proc')"), DENIED)
    for name in ("cmdline", "environ", "maps", "status", "fd/0", "root/etc/passwd"):
        assert refused(box.run(f"import os; open(f'/proc/{{os.getppid()}}/{name}').read()"), DENIED)


def test_probe_allocate_1_gb(box: Sandbox) -> None:
    for code in (
        "x = bytearray(1 << 30)",
        "import mmap; mmap.mmap(-1, 1 << 30)",
        "x = []\nwhile True: x.append(bytes(1 << 24))",
    ):
        assert refused(box.run(code), "MemoryError", "OSError: [Errno 12]")
    box.run("x = 0")
    pid = box._worker.process.pid  # type: ignore[union-attr]
    peak = [
        line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmPeak")
    ]
    assert int(peak[0].split()[1]) <= 512 << 10


# -- the escapes


def test_escape_ctypes_libc_socket(box: Sandbox, control: Sandbox) -> None:
    code = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nlibc.socket(2, 1, 0), ctypes.get_errno()"
    assert went_well(box.run(code)) == "(-1, 1)\n"
    assert not went_well(control.run(code)).startswith("(-1")


def test_escape_subclasses_to_popen(box: Sandbox, control: Sandbox, tmp_path: Path) -> None:
    target = tmp_path / "made"
    code = (
        "import subprocess; del subprocess\n"
        "popen = next(c for c in ().__class__.__base__.__subclasses__() if c.__name__ == 'Popen')\n"
        f"popen(['touch', {str(target)!r}]).wait()"
    )
    assert refused(box.run(code), REFUSED) and not target.exists()
    went_well(control.run(code))
    assert target.exists()


def test_escape_proc_self_mem_and_proc_1(box: Sandbox, control: Sandbox) -> None:
    went_well(control.run("open('/proc/self/mem', 'r+b'); open('/proc/1/status')"))
    for name in (
        "self/mem",
        "1/status",
        "self/maps",
        "self/environ",
        "1/root/etc/passwd",
        "self/root/etc/passwd",
        "self/cwd/../x",
        "thread-self/mem",
    ):
        for mode in ("rb", "r+b"):
            assert refused(box.run(f"open('/proc/{name}', {mode!r})"), DENIED, "FileNotFoundError")
    assert refused(box.run("import os; os.open('/proc/self/fd', os.O_RDONLY)"), DENIED)


def test_escape_symlink_to_etc(box: Sandbox, control: Sandbox) -> None:
    code = "import os\nif not os.path.islink('out'): os.symlink('/etc', 'out')\nopen('out/passwd').read()"
    assert "root" in went_well(control.run(code))
    assert refused(box.run(code), DENIED)
    assert refused(box.run("import os; os.listdir('out')"), DENIED)
    assert refused(
        box.run("import os; os.link('/etc/passwd', 'hard')"), DENIED, REFUSED, "OSError: [Errno 18]"
    )
    assert refused(box.run("import os; os.rename('/etc/passwd', 'moved')"), DENIED, "OSError: [Errno 18]")
    assert refused(box.run("import os; os.chdir('/etc'); open('passwd')"), DENIED)
    code = "import os; d = os.open('/etc', os.O_PATH); os.open('passwd', os.O_RDONLY, dir_fd=d)"
    assert refused(box.run(code), DENIED)
    assert Path("/etc/passwd").exists()


def test_escape_symlinks_when_the_scratch_is_removed(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("kept")
    with Sandbox() as own:
        went_well(
            own.run(f"import os\nos.symlink({str(tmp_path)!r}, 'folder'); os.symlink({str(kept)!r}, 'file')")
        )
        went_well(own.run("os.mkdir('a'); os.symlink('/', 'a/root'); os.symlink('nowhere', 'a/broken')"))
        folder = own._worker.scratch  # type: ignore[union-attr]
    assert not folder.exists() and kept.read_text() == "kept"


def test_escape_o_tmpfile_in_tmp(box: Sandbox, control: Sandbox) -> None:
    code = "import os\nos.write(os.open({!r}, os.O_TMPFILE | os.O_RDWR), b'x')"
    try:
        os.close(os.open(tempfile.gettempdir(), os.O_TMPFILE | os.O_RDWR))
        went_well(control.run(code.format(tempfile.gettempdir())))
    except OSError:
        pass  # a file system without O_TMPFILE
    assert refused(box.run(code.format(tempfile.gettempdir())), DENIED)


def test_escape_send_on_an_inherited_descriptor(listener: Listener) -> None:
    """Sockets and files of the parent, even inheritable ones, are not in the worker."""
    secret = tempfile.TemporaryFile()  # noqa: SIM115
    with socket.create_connection(("127.0.0.1", listener.ports[0])) as mine:
        taken, _ = listener.tcp.accept()
        for own in (mine.fileno(), secret.fileno()):
            os.set_inheritable(own, True)
        code = (
            "import os, stat, socket, ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nfound = []\n"
            "for fd in range(1024):\n"
            "    libc.send(fd, b'x', 1, 0)\n"
            "    errno = ctypes.get_errno()\n"
            "    try:\n        mode = os.fstat(fd).st_mode\n    except OSError:\n        continue\n"
            "    found.append((stat.S_ISFIFO(mode) or (fd == 0 and stat.S_ISCHR(mode)), errno))\n"
            "found"
        )
        with Sandbox() as own_box:
            found = eval(went_well(own_box.run(code)))
        taken.settimeout(0.05)
        with pytest.raises(TimeoutError):
            taken.recv(1)
        taken.close()
    secret.close()
    assert 5 <= len(found) <= 8 and set(found) == {(True, 1)}  # pipes and /dev/null; send is refused


def test_escape_ten_million_prints() -> None:
    """Neither memory nor standstill: what is kept is small, the rest is read and forgotten."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with Sandbox(limits=Limits(seconds=1)) as own:
        ran = own.run("for i in range(10**7): print(i)")
        assert ran.output.startswith("0\n1\n2\n") and "bytes cut" in ran.output and len(ran.output) < 4400
        assert ran.seconds < 10
        ran = own.run("import os\nblock = b'x' * 65536\nwhile True: os.write(1, block)")
        assert ran.lost and ran.error == "time-out after 1 s" and len(ran.output) < 4400 and ran.seconds < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 << 10


def test_escape_endless_loop() -> None:
    with Sandbox(limits=Limits(seconds=0.3)) as own:
        for code in (
            "while True: pass",
            "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
            "'a' * 10**6 in 'b' * 10**8\nimport re; re.match('(a+)+$', 'a' * 99 + 'b')",
        ):
            own.start()
            pid = own._worker.process.pid  # type: ignore[union-attr]
            ran = own.run(code)
            assert ran.lost and ran.error == "time-out after 0.3 s" and ran.seconds < 5
            assert not Path(f"/proc/{pid}").exists()


def test_escape_bytearray_of_ten_gigabytes(box: Sandbox) -> None:
    assert refused(box.run("bytearray(10**10)"), "MemoryError")
    assert refused(box.run("import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))"), "ValueError")
    assert refused(box.run("bytearray(10**10)"), "MemoryError")


def test_escape_thread_bomb(box: Sandbox, control: Sandbox) -> None:
    code = "import threading\nt = threading.Thread(target=lambda: None); t.start(); t.join()"
    assert refused(box.run(code), "RuntimeError: can't start new thread")
    went_well(control.run(code))
    ran = box.run(
        "import os\nn = 0\nfor _ in range(10000):\n    try:\n        os.fork(); n += 1\n    except OSError: pass\nn"
    )
    assert went_well(ran) == "0\n"


def test_escape_sigalrm_games() -> None:
    code = (
        "import signal\n"
        "for n in range(1, 65):\n"
        "    try: signal.signal(n, lambda *a: None)\n"
        "    except (OSError, ValueError): pass\n"
        "    try: signal.pthread_sigmask(signal.SIG_BLOCK, {n} - {14})\n"
        "    except ValueError: pass\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)\n"
        "while True: pass"
    )
    with Sandbox(limits=Limits(seconds=0.5)) as own:
        ran = own.run(code)
        assert ran.lost and ran.error == "time-out after 0.5 s" and ran.seconds < 5
        assert own.run("1").output == "1\n"


def test_escape_write_1_gb_to_scratch() -> None:
    with Sandbox() as own:
        ran = own.run(
            "with open('big', 'wb') as f:\n    for _ in range(1024): f.write(bytes(1 << 20)); f.flush()"
        )
        assert refused(ran, "OSError: [Errno 27]")
        folder = own._worker.scratch  # type: ignore[union-attr]
        assert (folder / "big").stat().st_size <= 1 << 20
        peak = [0]
        watch = threading.Event()

        def look() -> None:
            while not watch.wait(0.005):
                peak[0] = max(peak[0], sum(f.stat().st_blocks * 512 for f in folder.glob("*") if f.exists()))

        thread = threading.Thread(target=look)
        thread.start()
        ran = own.run("for i in range(1024):\n    with open(str(i), 'wb') as f: f.write(bytes(1 << 20))")
        watch.set()
        thread.join()
        assert (
            ran.lost and ran.error == "too many files, over 16,777,216 bytes of them, or over 50 folders deep"
        )
        assert not folder.exists()
    print(f"peak of the scratch folder: {peak[0] >> 20} MB")
    assert peak[0] < 1 << 30


def test_escape_stdout_replaced_with_junk(box: Sandbox) -> None:
    ran = box.run("import sys\nsys.stdout = sys.stderr = sys.__stdout__ = object()\n1 + 1")
    assert (ran.output, ran.error) == ("2\n", None)
    ran = box.run(
        "import sys\nclass Junk:\n    def __getattribute__(self, name): raise BaseException('junk')\nsys.stdout = Junk()\nprint(1)"
    )
    assert ran.error == "BaseException: junk" and not ran.lost
    assert went_well(box.run("print('sane')")) == "sane\n"


def test_escape_pickle_towards_the_parent(tmp_path: Path) -> None:
    """An object that would run code when unpickled is, to the parent, a line that is no JSON."""
    target = tmp_path / "made"
    code = (
        "import os, pickle\n"
        f"class Bomb:\n    def __reduce__(self): return (os.mkdir, ({str(target)!r},))\n"
        "data = pickle.dumps(Bomb(), protocol={})\n"
        "for fd in range(3, 1024):\n"
        "    try: os.write(fd, data + b'\\n')\n"
        "    except OSError: pass\n"
        "import time; time.sleep(5)"
    )
    with Sandbox({"f": lambda args, kwargs: 1}) as own:
        for protocol in (0, 2, 5):
            ran = own.run(code.replace("{}", str(protocol)))
            assert ran.lost and ran.error == "the code wrote nonsense into the worker's pipe"
        assert own.run("f()").output == "1\n"
    assert not target.exists()
    sources = "".join(path.read_text() for path in Path(process.__file__).parent.glob("*.py"))
    assert "import pickle" not in sources and "import marshal" not in sources


# -- the lock itself


def test_the_worker_is_locked_before_it_runs_anything(box: Sandbox) -> None:
    box.start()
    pid = box._worker.process.pid  # type: ignore[union-attr]
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line
    )
    assert status["NoNewPrivs"] == "1" and status["Seccomp"] == "2"
    for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
        assert int(status[name], 16) == 0, name
    if os.geteuid() == 0:
        assert int(status["CapBnd"], 16) == 0
    limits = Path(f"/proc/{pid}/limits").read_text()
    for words in (
        "Max file size 1048576 1048576",
        "Max core file size 0 0",
        "Max processes 0 0",
        "Max open files 32 32",
        "Max address space 536870912 536870912",
    ):
        assert words in " ".join(limits.split()), words
    assert os.getpgid(pid) == pid and os.getsid(pid) == pid


def test_the_lock_costs_little() -> None:
    """Bare interpreter, sandbox and lock: medians of a few, with room for a busy machine."""

    def median(measure: Callable[[], float]) -> float:
        return sorted(measure() for _ in range(5))[2]

    def bare() -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-I", "-S", "-c", "pass"], check=True)
        return time.perf_counter() - start

    def lock() -> float:
        with Sandbox() as own:
            own.start()
            return own.lock_seconds or 0.0

    def one_run() -> float:
        start = time.perf_counter()
        assert shared.run("1").error is None
        return time.perf_counter() - start

    with Sandbox() as shared:
        shared.start()
        print(
            f"bare {median(bare) * 1e3:.1f} ms, start {(shared.startup_seconds or 0) * 1e3:.1f} ms, ", end=""
        )
        cost, run = median(lock), median(one_run)
    print(f"lock {cost * 1e3:.2f} ms, one run {run * 1e3:.2f} ms")
    assert cost < 0.05 and run < 0.05
