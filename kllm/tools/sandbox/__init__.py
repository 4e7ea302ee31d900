"""Python for models, locked by the kernel: Landlock, seccomp and limits, no privilege, no package.

Holds: no files but the standard library (read) and a scratch folder; no network, no other process, no
signals, no exec, no threads; bounded time, memory, files and output. Leaks: whether a path exists and
its stat, the process's own ids, the kernel's version, the clock.
"""

from kllm.tools.sandbox.box import Sandbox
from kllm.tools.sandbox.process import Limits, check_platform
from kllm.tools.sandbox.run import Ran

__all__ = ["Limits", "Ran", "Sandbox", "check_platform"]
