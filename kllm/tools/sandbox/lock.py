"""The worker locks itself: limits, no capabilities, Landlock, seccomp. For good, before any code runs.

Loaded by path inside the worker (`-I -S`), so it imports nothing of kllm; ctypes and the standard
library are enough and no privilege is needed. Each step either works or raises LockError.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import stat
import struct
from collections.abc import Iterable, Iterator
from typing import Any

# Landlock's rights over files, by bit
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, REMOVE_DIR, REMOVE_FILE = (1 << i for i in range(6))
MAKE_CHAR, MAKE_DIR, MAKE_REG, MAKE_SOCK, MAKE_FIFO, MAKE_BLOCK, MAKE_SYM = (1 << i for i in range(6, 13))
REFER, TRUNCATE, IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
RIGHTS_OF_ABI = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
OF_A_FILE = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV
READ = READ_FILE | READ_DIR
SCRATCH = READ | WRITE_FILE | REMOVE_DIR | REMOVE_FILE | MAKE_DIR | MAKE_REG | MAKE_SYM | REFER | TRUNCATE
NET_BIND_AND_CONNECT, SCOPE_SOCKETS_AND_SIGNALS = 3, 3

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same numbers on every machine
_PDEATHSIG, _DUMPABLE, _SECCOMP, _CAPBSET_DROP, _NO_NEW_PRIVS, _CAP_AMBIENT = 1, 4, 22, 24, 38, 47
_CAPABILITY_VERSION_3 = 0x20080522


class LockError(Exception):
    """The sandbox could not be locked; the text says which step failed and why."""


class _Filters(ctypes.Structure):
    """struct sock_fprog: how many instructions, and where."""

    _fields_ = (("count", ctypes.c_ushort), ("program", ctypes.c_char_p))


_libc = ctypes.CDLL(None, use_errno=True)


def _call(number: int, *arguments: Any) -> int:
    """A system call by number; -1 and ctypes' errno on failure."""
    wide = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return int(_libc.syscall(ctypes.c_long(number), *wide))


def _prctl(option: int, *arguments: Any) -> int:
    wide = [ctypes.c_ulong(a) if isinstance(a, int) else a for a in arguments]
    return int(_libc.prctl(option, *wide, *[ctypes.c_ulong(0)] * (4 - len(wide))))


def _must(step: str, result: int) -> int:
    if result < 0:
        raise LockError(f"{step} failed: {os.strerror(ctypes.get_errno())}")
    return result


def landlock_abi() -> int:
    """The kernel's Landlock version: 0 without Landlock, 1 since Linux 5.13, 4 with TCP, 6 with scopes."""
    return max(0, _call(_CREATE_RULESET, None, 0, 1))


def die_with_parent() -> None:
    """Linux kills this process when the thread that started it ends."""
    _must("prctl(PDEATHSIG)", _prctl(_PDEATHSIG, 9))


def drop_capabilities() -> None:
    """Root without root's powers: raising limits, overriding permissions, killing, mounting are gone."""
    for capability in range(64):  # refused where we have none to drop, or past the last one
        _prctl(_CAPBSET_DROP, capability)
    _prctl(_CAP_AMBIENT, 4)
    header = struct.pack("Ii", _CAPABILITY_VERSION_3, 0)
    _must("capset", int(_libc.capset(header, bytes(24))))


def set_limits(limits: dict[str, list[int]], strict: bool) -> None:
    """Soft and hard rlimits by name ("AS": [soft, hard]); never above the hard ones that already hold.

    Without `strict`, limits this system refuses to set are skipped.
    """
    for name, (soft, hard) in limits.items():
        which = getattr(resource, f"RLIMIT_{name}", None)
        if which is None:
            continue
        now = resource.getrlimit(which)[1]
        top = hard if now == resource.RLIM_INFINITY else min(hard, now)
        try:
            resource.setrlimit(which, (min(soft, top), top))
        except (OSError, ValueError) as e:
            if strict:
                raise LockError(f"setrlimit({name}) failed: {e}") from e


def libraries() -> Iterator[str]:
    """Folders of the shared libraries mapped now: where an import after the lock finds its own."""
    maps = os.open("/proc/self/maps", os.O_RDONLY)
    with os.fdopen(maps, encoding="utf-8", errors="surrogateescape") as lines:
        paths = [line.rstrip("\n").split(maxsplit=5)[-1] for line in lines]
    yield from {p.rpartition("/")[0] for p in paths if p.startswith("/") and ".so" in p}


def _allow(ruleset: int, path: str, rights: int) -> None:
    """Grants `rights` beneath `path` (a file or a folder); a path that does not exist is skipped."""
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            rights &= OF_A_FILE
        rule = struct.pack("=Qi", rights, fd)  # packed, as the kernel has it
        _must(f"Landlock rule for {path}", _call(_ADD_RULE, ruleset, 1, rule, 0))
    finally:
        os.close(fd)


def landlock(readable: Iterable[str], scratch: str) -> None:
    """From here on: files are read beneath `readable`, all but executed beneath `scratch`, nothing else.

    Also no TCP (ABI 4) and no abstract sockets or signals out of the sandbox (ABI 6). Raises LockError
    without Landlock. Not governed by it: stat, readlink and chdir on any path.
    """
    abi = landlock_abi()
    if abi < 1:
        raise LockError("this kernel has no Landlock")
    handled = RIGHTS_OF_ABI[max(a for a in RIGHTS_OF_ABI if a <= abi)]
    attributes = struct.pack("Q", handled)
    attributes += struct.pack("Q", NET_BIND_AND_CONNECT) if abi >= 4 else b""
    attributes += struct.pack("Q", SCOPE_SOCKETS_AND_SIGNALS) if abi >= 6 else b""
    ruleset = _must("Landlock", _call(_CREATE_RULESET, attributes, len(attributes), 0))
    for path in readable:
        _allow(ruleset, path, READ & handled)
    _allow(ruleset, scratch, SCRATCH & handled)
    _must("Landlock", _call(_RESTRICT_SELF, ruleset, 0))
    os.close(ruleset)


def seccomp(program: bytes) -> None:
    """Loads a filter of struct sock_filter."""
    filters = _Filters(len(program) // 8, program)
    _must("seccomp", _prctl(_SECCOMP, 2, ctypes.byref(filters)))


def check() -> None:
    """The lock, tried: neither the root folder nor a socket may be had."""
    try:
        os.scandir("/").close()
    except PermissionError:
        pass
    else:
        raise LockError("Landlock does not hold: the root folder can be read")
    if _libc.socket(2, 1, 0) >= 0 or ctypes.get_errno() != errno.EPERM:
        raise LockError("seccomp does not hold: a socket can be made")


def lock(readable: Iterable[str], scratch: str, program: bytes) -> None:
    """All of it, in the order that works: each step needs what the next one takes away."""
    readable = [*readable, *libraries()]
    drop_capabilities()
    _must("prctl(DUMPABLE)", _prctl(_DUMPABLE, 0))  # no core file, also not by a crash collector's pipe
    _must("no_new_privs", _prctl(_NO_NEW_PRIVS, 1))
    landlock(readable, scratch)
    seccomp(program)
    check()
