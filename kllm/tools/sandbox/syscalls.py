"""Which system calls sandboxed code may make, as a seccomp-BPF program.

A list of what is allowed, not of what is forbidden: everything else, known or not yet invented, is
refused (EPERM; ENOSYS for numbers newer than this list, so that a C library falls back to an older
call). Missing on purpose: sockets, new processes and threads, exec, signals to anybody, other
processes' memory, limits or priorities, namespaces, mounts, keys, bpf, io_uring, shared memory, and
chmod, chown, utime, xattr and truncate by path, which Landlock does not (always) govern.

The parent builds the program; the worker only loads it. Nothing here needs Linux to run.
"""

from __future__ import annotations

import errno
import struct

# name: (x86_64, aarch64); None where the machine has no such call
ALLOWED: dict[str, tuple[int, int | None]] = {
    # files by descriptor
    "read": (0, 63),
    "write": (1, 64),
    "readv": (19, 65),
    "writev": (20, 66),
    "pread64": (17, 67),
    "pwrite64": (18, 68),
    "preadv": (295, 69),
    "pwritev": (296, 70),
    "lseek": (8, 62),
    "close": (3, 57),
    "close_range": (436, 436),
    "fstat": (5, 80),
    "fstatfs": (138, 44),
    "ftruncate": (77, 46),
    "fallocate": (285, 47),
    "fsync": (74, 82),
    "fdatasync": (75, 83),
    "fadvise64": (221, 223),
    "flock": (73, 32),
    "sendfile": (40, 71),
    "copy_file_range": (326, 285),
    "dup": (32, 23),
    "dup2": (33, None),
    "dup3": (292, 24),
    "pipe": (22, None),
    "pipe2": (293, 59),
    "getdents": (78, None),
    "getdents64": (217, 61),
    # files by path: what Landlock governs, or what only tells that a path exists
    "stat": (4, None),
    "lstat": (6, None),
    "newfstatat": (262, 79),
    "statx": (332, 291),
    "statfs": (137, 43),
    "access": (21, None),
    "faccessat": (269, 48),
    "faccessat2": (439, 439),
    "readlink": (89, None),
    "readlinkat": (267, 78),
    "getcwd": (79, 17),
    "chdir": (80, 49),
    "fchdir": (81, 50),
    "mkdir": (83, None),
    "mkdirat": (258, 34),
    "rmdir": (84, None),
    "unlink": (87, None),
    "unlinkat": (263, 35),
    "rename": (82, None),
    "renameat": (264, 38),
    "renameat2": (316, 276),
    "link": (86, None),
    "linkat": (265, 37),
    "symlink": (88, None),
    "symlinkat": (266, 36),
    "umask": (95, 166),
    # memory
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "mremap": (25, 216),
    "msync": (26, 227),
    "madvise": (28, 233),
    "brk": (12, 214),
    # own signals and timers, waiting
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "rt_sigpending": (127, 136),
    "rt_sigsuspend": (130, 133),
    "rt_sigtimedwait": (128, 137),
    "sigaltstack": (131, 132),
    "restart_syscall": (219, 128),
    "alarm": (37, None),
    "setitimer": (38, 103),
    "getitimer": (36, 102),
    "pause": (34, None),
    "nanosleep": (35, 101),
    "clock_nanosleep": (230, 115),
    "select": (23, None),
    "pselect6": (270, 72),
    "poll": (7, None),
    "ppoll": (271, 73),
    "futex": (202, 98),
    "sched_yield": (24, 124),
    # time, random numbers, facts about itself
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "gettimeofday": (96, 169),
    "time": (201, None),
    "times": (100, 153),
    "getrusage": (98, 165),
    "getrandom": (318, 278),
    "getpid": (39, 172),
    "getppid": (110, 173),
    "gettid": (186, 178),
    "getuid": (102, 174),
    "geteuid": (107, 175),
    "getgid": (104, 176),
    "getegid": (108, 177),
    "getgroups": (115, 158),
    "getresuid": (118, 148),
    "getresgid": (120, 150),
    "getrlimit": (97, 163),
    "sched_getaffinity": (204, 123),
    "getcpu": (309, 168),
    "uname": (63, 160),
    "sysinfo": (99, 179),
    # the end
    "exit": (60, 93),
    "exit_group": (231, 94),
}

# Allowed with some values of one argument only.
FCNTL = (72, 25)
IOCTL = (16, 29)
PRLIMIT64 = (302, 261)
OPEN = (2, None)
OPENAT = (257, 56)

# duplicate, get/set flags, locks; not F_SETOWN, F_SETSIG: they make the kernel signal another process
FCNTL_COMMANDS = (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030)
# terminal questions (isatty), close-on-exec, bytes waiting, non-blocking; not TIOCSTI, FIOASYNC
IOCTL_REQUESTS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)

MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, AUDIT_ARCH
NEWEST = 469  # the highest number looked at when this list was made (Linux 6.18)

_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_LOAD, _AND, _EQUAL, _ABOVE, _RETURN = 0x20, 0x54, 0x15, 0x25, 0x06
_NUMBER, _ARCH = 0, 4  # offsets in struct seccomp_data
_O_ACCMODE_TRUNC = 0o1003


def _argument(i: int) -> int:
    """Offset of argument i's low half (little endian, as both machines are)."""
    return 16 + 8 * i


def _op(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
    """One struct sock_filter: operation, jumps (instructions to skip) if true and if false, operand."""
    return struct.pack("<HBBI", code, yes, no, value)


def _only(number: int, argument: int, values: tuple[int, ...]) -> bytes:
    """`number` is allowed if the low half of `argument` is one of `values`, else EPERM."""
    tests = b"".join(_op(_EQUAL, value, yes=len(values) - i) for i, value in enumerate(values))
    body = _op(_LOAD, _argument(argument)) + tests + _op(_RETURN, _ERRNO | errno.EPERM) + _op(_RETURN, _ALLOW)
    return _op(_EQUAL, number, no=len(body) // 8) + body


def _open_without_hidden_truncation(number: int, argument: int) -> bytes:
    """Opening is allowed but for O_RDONLY|O_TRUNC, which Landlock before ABI 3 takes for reading."""
    body = _op(_LOAD, _argument(argument)) + _op(_AND, _O_ACCMODE_TRUNC)
    body += _op(_EQUAL, 0o1000, no=1) + _op(_RETURN, _ERRNO | errno.EPERM) + _op(_RETURN, _ALLOW)
    return _op(_EQUAL, number, no=len(body) // 8) + body


def program(machine: str) -> bytes:
    """The filter for `machine` (a key of MACHINES) as an array of struct sock_filter.

    A call made through another machine's entry (int 0x80) kills; x32 numbers get EPERM.
    """
    column, arch = MACHINES[machine]
    parts = [_op(_LOAD, _ARCH), _op(_EQUAL, arch, yes=1), _op(_RETURN, _KILL), _op(_LOAD, _NUMBER)]
    parts += [_op(_ABOVE, 0x3FFFFFFF, no=1), _op(_RETURN, _ERRNO | errno.EPERM)]
    for call, argument in ((OPEN, 1), (OPENAT, 2)):
        number = call[column]
        if number is not None:
            parts.append(_open_without_hidden_truncation(number, argument))
    parts.append(_only(FCNTL[column], 1, FCNTL_COMMANDS))
    parts.append(_only(IOCTL[column], 1, IOCTL_REQUESTS))
    parts.append(_only(PRLIMIT64[column], 0, (0,)))  # 0 is oneself; the parent has the same user
    for numbers in ALLOWED.values():
        number = numbers[column]
        if number is not None:
            parts += [_op(_EQUAL, number, no=1), _op(_RETURN, _ALLOW)]
    parts += [_op(_ABOVE, NEWEST, no=1), _op(_RETURN, _ERRNO | errno.ENOSYS)]
    parts.append(_op(_RETURN, _ERRNO | errno.EPERM))
    return b"".join(parts)
