"""Escapes beyond the spec's list: single system calls by number, and the gaps Landlock is known to have."""

from __future__ import annotations

import os
import platform
import resource
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kllm.tools.sandbox import Ran, Sandbox, process, syscalls

pytestmark = pytest.mark.skipif(process.landlock_abi() < 1, reason="this kernel has no Landlock")

COLUMN = {"x86_64": 1, "aarch64": 2}.get(platform.machine(), 1)
DENIED, REFUSED = "PermissionError: [Errno 13]", "PermissionError: [Errno 1]"  # Landlock's and seccomp's

# name, number on x86_64, number on aarch64 (Linux headers 6.1)
CALLS = """
socket 41 198
socketpair 53 199
connect 42 203
bind 49 200
sendto 44 206
sendmsg 46 211
ptrace 101 117
process_vm_readv 310 270
process_vm_writev 311 271
execveat 322 281
clone3 435 435
unshare 272 97
setns 308 268
mount 165 40
umount2 166 39
pivot_root 155 41
chroot 161 51
bpf 321 280
perf_event_open 298 241
io_uring_setup 425 425
io_uring_enter 426 426
io_uring_register 427 427
kill 62 129
tkill 200 130
tgkill 234 131
rt_sigqueueinfo 129 138
rt_tgsigqueueinfo 297 240
pidfd_open 434 434
pidfd_getfd 438 438
pidfd_send_signal 424 424
keyctl 250 219
add_key 248 217
request_key 249 218
userfaultfd 323 282
memfd_create 319 279
memfd_secret 447 447
name_to_handle_at 303 264
open_by_handle_at 304 265
process_madvise 440 440
process_mrelease 448 448
kcmp 312 272
get_robust_list 274 100
move_pages 279 239
migrate_pages 256 238
quotactl 179 60
swapon 167 224
swapoff 168 225
reboot 169 142
settimeofday 164 170
clock_settime 227 112
adjtimex 159 171
clock_adjtime 305 266
syslog 103 116
sched_setaffinity 203 122
sched_setscheduler 144 119
sched_setattr 314 274
sched_setparam 142 118
setpriority 141 140
ioprio_set 251 30
setrlimit 160 164
fchmod 91 52
fchmodat 268 53
fchown 93 55
fchownat 260 54
utimensat 280 88
setxattr 188 5
lsetxattr 189 6
fsetxattr 190 7
removexattr 197 14
truncate 76 45
shmget 29 194
shmat 30 196
msgget 68 186
semget 64 190
mq_open 240 180
mq_unlink 241 181
inotify_init1 294 26
inotify_add_watch 254 27
fanotify_init 300 262
mknodat 259 33
openat2 437 437
open_tree 428 428
move_mount 429 429
fsopen 430 430
fsmount 432 432
mount_setattr 442 442
seccomp 317 277
prctl 157 167
capset 126 91
landlock_create_ruleset 444 444
setsid 112 157
setpgid 109 154
setuid 105 146
setgid 106 144
setgroups 116 159
setresuid 117 147
personality 135 92
acct 163 89
init_module 175 105
finit_module 313 273
delete_module 176 106
kexec_load 246 104
sethostname 170 161
setdomainname 171 162
vhangup 153 58
lookup_dcookie 212 18
remap_file_pages 216 234
timer_create 222 107
timerfd_create 283 85
signalfd4 289 74
eventfd2 290 19
epoll_create1 291 20
splice 275 76
tee 276 77
vmsplice 278 75
sync 162 81
syncfs 306 267
mlock 149 228
mlockall 151 230
membarrier 324 283
rseq 334 293
set_tid_address 218 96
set_robust_list 273 99
"""
FORBIDDEN = {line.split()[0]: int(line.split()[COLUMN]) for line in CALLS.split("\n") if line}

LIBC = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *arguments):
    ctypes.set_errno(0)
    wide = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return libc.syscall(ctypes.c_long(number), *wide), ctypes.get_errno()
"""


@pytest.fixture(scope="module")
def box() -> Iterator[Sandbox]:
    with Sandbox() as locked:
        locked.run(LIBC)
        yield locked


@pytest.fixture(scope="module")
def control() -> Iterator[Sandbox]:
    """The same without the lock."""
    with Sandbox(unsafe=True) as open_:
        open_.run(LIBC)
        yield open_


@pytest.fixture
def heard() -> Iterator[list[int]]:
    """SIGUSR1 that reaches this process, the sandbox's parent."""
    signals: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: signals.append(number))
    yield signals
    signal.signal(signal.SIGUSR1, before)


def refused(ran: Ran, *errors: str) -> bool:
    assert ran.error is not None and not ran.lost, ran
    assert ran.error.startswith(errors), ran
    return True


def went_well(ran: Ran) -> str:
    assert ran.error is None and not ran.lost, ran
    return ran.output


def number(name: str) -> int:
    return FORBIDDEN[name]


@pytest.mark.parametrize("name", FORBIDDEN)
def test_call(box: Sandbox, name: str) -> None:
    assert went_well(box.run(f"call({FORBIDDEN[name]}, 0, 0, 0, 0, 0, 0)")) == "(-1, 1)\n"


def test_calls_that_make_a_process(box: Sandbox) -> None:
    pid = box._worker.process.pid  # type: ignore[union-attr]
    for by_number in (56, 57, 58) if COLUMN == 1 else (220,):  # clone, fork, vfork
        assert went_well(box.run(f"call({by_number}, 17, 0, 0, 0, 0)")) == "(-1, 1)\n"
    assert Path(f"/proc/{pid}/task/{pid}/children").read_text() == ""
    assert len(list(Path(f"/proc/{pid}/task").iterdir())) == 1


def test_calls_made_anew(box: Sandbox) -> None:
    """Numbers newer than the list: as on a kernel that lacks them, so that a C library falls back."""
    for new in (syscalls.NEWEST + 1, 600, 100_000):
        assert went_well(box.run(f"call({new}, 0, 0, 0)")) == "(-1, 38)\n"
    assert went_well(box.run(f"call({syscalls.NEWEST}, 0, 0, 0)")) == "(-1, 1)\n"


def test_no_forbidden_call_is_in_the_list() -> None:
    column = COLUMN - 1
    allowed = {numbers[column] for numbers in syscalls.ALLOWED.values()}
    assert not allowed & set(FORBIDDEN.values())
    for machine, column in (("x86_64", 0), ("aarch64", 1)):
        given = [numbers[column] for numbers in syscalls.ALLOWED.values() if numbers[column] is not None]
        assert len(given) == len(set(given)) and len(syscalls.program(machine)) % 8 == 0
        assert len(syscalls.program(machine)) // 8 < 4096


@pytest.mark.skipif(COLUMN != 1 or platform.machine() != "x86_64", reason="x86_64 only")
def test_x32_and_i386_entries(box: Sandbox) -> None:
    for call in (41, 57, 59, 520, 39):
        assert went_well(box.run(f"call({0x40000000 + call}, 0, 0, 0)")) == "(-1, 1)\n"
    code = (
        "import ctypes, mmap\n"
        "m = mmap.mmap(-1, 4096, prot=7)\n"
        "m.write(bytes.fromhex('b814000000cd80c3'))  # eax = 20 (i386 getpid); int 0x80; ret\n"
        "f = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))\n"
        "f()"
    )
    with Sandbox() as own:
        ran = own.run(code)
    assert ran.lost and ran.error is not None
    assert "forbidden kind of system call" in ran.error or "SIGSEGV" in ran.error


def test_signals_by_way_of_fcntl(box: Sandbox, control: Sandbox, heard: list[int]) -> None:
    """F_SETOWN and F_SETSIG make the kernel send a signal to somebody when a pipe has news."""
    code = (
        "import fcntl, os, signal\n"
        "r, w = os.pipe()\n"
        "fcntl.fcntl(r, 8, os.getppid())\n"
        "fcntl.fcntl(r, 10, signal.SIGUSR1)\n"
        "fcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC)\n"
        "os.write(w, b'x')\n"
        "fcntl.fcntl(r, 8, 0)"  # else the pipe's end would signal once more
    )
    assert refused(box.run(code), REFUSED)
    ex = "import fcntl, os, struct\nfcntl.fcntl(os.pipe()[0], 15, struct.pack('ii', 1, os.getppid()))"
    assert refused(box.run(ex), REFUSED)
    assert refused(box.run("import fcntl, os\nfcntl.fcntl(os.pipe()[0], 10, 10)"), REFUSED)
    time.sleep(0.05)
    assert heard == []
    went_well(control.run(code))
    end = time.monotonic() + 5
    while not heard and time.monotonic() < end:
        time.sleep(0.01)
    assert heard == [signal.SIGUSR1]


def test_ioctl(box: Sandbox) -> None:
    assert went_well(box.run("import os; os.isatty(0), os.isatty(1)")) == "(False, False)\n"
    for request in (
        0x5412,
        0x5452,
        0x8901,
        0x540E,
        0x5422,
        0x541C,
        0x80086601,
    ):  # TIOCSTI, FIOASYNC, FIOSETOWN ...
        assert refused(box.run(f"import fcntl; fcntl.ioctl(0, {request}, b'x' * 8)"), REFUSED)


def test_limits_of_the_parent(box: Sandbox, control: Sandbox) -> None:
    before = {
        name: resource.getrlimit(getattr(resource, name))
        for name in dir(resource)
        if name.startswith("RLIMIT_")
    }
    code = (
        "import os, resource\n"
        "soft, hard = resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE)\n"
        "resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, (soft - 1, hard))"
    )
    assert refused(box.run(code), REFUSED)
    assert before == {name: resource.getrlimit(getattr(resource, name)) for name in before}
    went_well(control.run(code))
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == before["RLIMIT_NOFILE"][0] - 1
    resource.setrlimit(resource.RLIMIT_NOFILE, before["RLIMIT_NOFILE"])


def test_own_limits_do_not_rise(box: Sandbox) -> None:
    for name in ("AS", "CPU", "FSIZE", "NOFILE", "NPROC", "CORE"):
        code = f"import resource\nhard = resource.getrlimit(resource.RLIMIT_{name})[1]\nresource.setrlimit(resource.RLIMIT_{name}, (hard, hard + 1))"
        assert refused(box.run(code), "ValueError: not allowed to raise maximum limit")


def test_affinity_and_priority_of_the_parent(box: Sandbox) -> None:
    before = os.sched_getaffinity(0), os.getpriority(os.PRIO_PROCESS, 0)
    for code in (
        "os.sched_setaffinity(os.getppid(), {0})",
        "os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
        "os.nice(5)",
        "os.sched_setscheduler(os.getppid(), 0, os.sched_param(0))",
    ):
        assert refused(box.run("import os\n" + code), REFUSED)
    assert before == (os.sched_getaffinity(0), os.getpriority(os.PRIO_PROCESS, 0))


METADATA = {
    "chmod": "os.chmod({!r}, 0o777)",
    "fchmod": "os.fchmod(os.open({!r}, os.O_PATH), 0o777)",
    "chown": "os.chown({!r}, os.getuid(), os.getgid())",
    "lchown": "os.lchown({!r}, os.getuid(), os.getgid())",
    "utime": "os.utime({!r}, (1, 1))",
    "setxattr": "os.setxattr({!r}, 'user.x', b'1')",
    "truncate": "os.truncate({!r}, 0)",
    "unlink": "os.unlink({!r})",
    "rename": "os.rename({!r}, 'here')",
    "link": "os.link({!r}, 'here')",
    "rename over": "open('a', 'w').close(); os.rename('a', {!r})",
    "append": "open({!r}, 'a')",
    "truncate on opening": "os.open({!r}, os.O_RDONLY | os.O_TRUNC)",
    "mmap": "import mmap; mmap.mmap(os.open({!r}, os.O_RDWR), 0)",
    "mkfifo": "os.mkfifo({!r} + '.fifo')",
    "mknod": "os.mknod({!r} + '.node')",
    "symlink": "os.symlink('x', {!r} + '.link')",
    "removexattr": "os.removexattr({!r}, 'user.x')",
}


@pytest.mark.parametrize("name", METADATA)
def test_files_outside_keep_their_content_and_metadata(
    box: Sandbox, control: Sandbox, tmp_path: Path, name: str
) -> None:
    """Landlock does not govern chmod, chown, utime and xattr; seccomp does."""
    target = tmp_path / "outside"
    target.write_text("content")
    target.chmod(0o644)

    def state() -> tuple[object, ...]:
        if not target.exists():
            return ()
        s = target.stat()
        return (
            s.st_mode,
            s.st_uid,
            s.st_gid,
            s.st_mtime,
            s.st_ctime,
            s.st_nlink,
            target.read_text(),
            os.listxattr(target),
            sorted(path.name for path in tmp_path.iterdir()),
        )

    before = state()
    ran = box.run("import os\n" + METADATA[name].format(str(target)))
    assert refused(ran, REFUSED, DENIED, "OSError: [Errno 18]") and state() == before
    if name in ("chmod", "utime", "truncate", "unlink", "append", "truncate on opening", "symlink", "link"):
        went_well(control.run("import os\n" + METADATA[name].format(str(target))))
        assert name == "append" or state() != before


def test_the_readable_is_not_writable(box: Sandbox) -> None:
    stdlib = Path(os.__file__)
    before = stdlib.stat()
    for code in (
        "open({!r}, 'a')",
        "import os; os.open({!r}, os.O_RDONLY | os.O_TRUNC)",
        "import os; os.fchmod(os.open({!r}, os.O_RDONLY), 0o777)",
        "import os; os.unlink({!r})",
        "import os; os.link({!r}, 'copy')",
        "import os; os.rename({!r}, 'copy')",
        "import os; os.utime({!r})",
    ):
        assert refused(box.run(code.format(str(stdlib))), REFUSED, DENIED, "OSError: [Errno 18]")
    assert stdlib.stat() == before or stdlib.stat().st_ctime == before.st_ctime


def test_truncation_disguised_as_reading_is_refused_everywhere(box: Sandbox) -> None:
    """Landlock took it for reading before ABI 3, so seccomp refuses it, even in the scratch folder."""
    went_well(box.run("open('whole', 'w').write('whole')"))
    assert refused(box.run("import os; os.open('whole', os.O_RDONLY | os.O_TRUNC)"), REFUSED)
    assert went_well(box.run("open('whole').read()")) == "'whole'\n"
    assert went_well(box.run("open('whole', 'w').write('new')")) == "3\n"


def test_other_files_of_the_interpreters_owner_are_not_readable(box: Sandbox) -> None:
    """Only the standard library and the folders of shared libraries are."""
    import kllm

    for path in (
        kllm.__file__,
        sys.executable,
        "/etc/hostname",
        "/usr/bin/env",
        "/dev/null",
        "/dev/zero",
        "/sys/kernel",
    ):
        ran = box.run(f"import os; os.open({path!r}, os.O_RDONLY)")
        assert refused(ran, DENIED, "FileNotFoundError")


def test_a_second_filter_or_ruleset_cannot_loosen(box: Sandbox) -> None:
    assert (
        went_well(box.run(f"call({number('seccomp')}, 1, 0, 0), call({number('prctl')}, 22, 2, 0)"))
        == "((-1, 1), (-1, 1))\n"
    )
    assert went_well(box.run(f"call({number('capset')}, 0, 0)")) == "(-1, 1)\n"


def test_the_parent_is_unharmed(box: Sandbox) -> None:
    """After all of the above."""
    assert went_well(box.run("1 + 1")) == "2\n"
    assert os.getpgid(0) != os.getpgid(box._worker.process.pid)  # type: ignore[union-attr]
