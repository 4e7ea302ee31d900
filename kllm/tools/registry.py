"""Which tools there are by name, one's own functions, and an open box of them for one conversation."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from kllm.errors import UserError
from kllm.tools.calculator import calculator
from kllm.tools.clock import clock
from kllm.tools.tool import Tool, ToolError, tool_of

if TYPE_CHECKING:
    from kllm.tools.sandbox import Limits, Ran, Sandbox

BUILTIN: dict[str, Callable[..., Any]] = {"calculator": calculator, "clock": clock}
PYTHON = "python"
NAMES = (*BUILTIN, PYTHON)


def python(code: str) -> str:
    """Runs Python code and returns what it prints. Variables are kept from call to call.

    Args:
        code: Python; print what you want to know.
    """
    raise NotImplementedError("a toolbox binds it to its sandbox")


def find_tools(names: Iterable[str], *, where: str = "flag --tools") -> list[Tool]:
    """The tools of these names, each once.

    Args:
        names: of `NAMES`, or `module:function` or `file.py:function` for one's own; each may be several
            with commas between.

    Raises:
        UserError: no such tool, module or function, or a function that is no tool.
    """
    found: dict[str, Tool] = {}
    for name in (part.strip() for given in names for part in given.split(",")):
        if not name:
            continue
        tool = _find(name, where)
        if tool.name in found and found[tool.name].function is not tool.function:
            raise UserError(f"two tools are named {tool.name}", where=where, hint="rename one")
        found[tool.name] = tool
    return list(found.values())


def schemas(names: Iterable[str]) -> list[dict[str, Any]]:
    """The schemas of tools, as `find_tools` finds them."""
    return [tool.schema() for tool in find_tools(names)]


def _find(name: str, where: str) -> Tool:
    if name == PYTHON:
        return tool_of(python, where=where)
    if name in BUILTIN:
        return tool_of(BUILTIN[name], name, where=where)
    module, colon, function = name.rpartition(":")
    if not colon or not module or not function:
        hint = f"known: {', '.join(NAMES)}; one's own: module:function or file.py:function"
        raise UserError(f"no tool named {name!r}", where=where, hint=hint)
    try:
        return tool_of(getattr(_module(module, where), function), where=where)
    except AttributeError:
        raise UserError(f"{module} has no function {function!r}", where=where) from None


def _module(name: str, where: str) -> ModuleType:
    """A module by name, the current folder included, or by path. It is the user's own code: it runs."""
    path = Path(name)
    if name.endswith(".py") and not path.is_file():
        raise UserError("no such file", where=f"{where}, {name}")
    folder = path.resolve().parent if name.endswith(".py") else Path.cwd()
    if str(folder) not in sys.path:
        sys.path.append(str(folder))  # for what lies beside it; last, or a timeit.py there would be torch's
    try:
        return _from_file(path.resolve()) if name.endswith(".py") else importlib.import_module(name)
    except (Exception, SystemExit) as error:
        what = str(error) or type(error).__name__
        raise UserError(f"cannot import {name}: {what}", where=where) from None


def _from_file(path: Path) -> ModuleType:
    """A file's module; a file is run once, however many of its functions are tools."""
    known = [m for m in list(sys.modules.values()) if getattr(m, "__file__", None) == str(path)]
    if known:
        return known[0]
    name = f"{path.stem}_{len(sys.modules)}" if _is_taken(path.stem, path) else path.stem
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # it is a file and ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _is_taken(name: str, path: Path) -> bool:
    """Whether others that import `name` mean another module than this file's."""
    if name in sys.modules:
        return True
    try:
        there = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return False
    return there is not None and there.origin != str(path)


class Toolbox:
    """Tools that are ready to run, for one conversation; a context manager.

    Args:
        tools: as `find_tools` gives them. `python` runs in a sandbox of this box, started when first used.
        code: there is a sandbox for `run` even without `python`; the other tools are functions in it.
        unsafe_python: run it where nothing can be locked, too.
        limits: of the sandbox.
        interrupted: asked while code runs; True ends it.

    Raises:
        UserError: there is `python`, and no sandbox on this system.
    """

    def __init__(
        self,
        tools: Sequence[Tool],
        *,
        code: bool = False,
        unsafe_python: bool = False,
        limits: Limits | None = None,
        interrupted: Callable[[], bool] | None = None,
    ) -> None:
        self.tools = {tool.name: tool for tool in tools}
        self.interrupted = interrupted
        self.sandbox: Sandbox | None = None
        if code or any(tool.function is python for tool in tools):
            from kllm.tools.sandbox import Limits, Sandbox, check_platform

            if not unsafe_python:
                check_platform()
            functions = {tool.name: tool.invoke for tool in self.functions()} if code else {}
            self.sandbox = Sandbox(functions, limits=limits or Limits(), unsafe=unsafe_python)

    def __enter__(self) -> Toolbox:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the sandbox."""
        if self.sandbox is not None:
            self.sandbox.close()

    @property
    def limits(self) -> Limits:
        """Of one run of code."""
        assert self.sandbox is not None
        return self.sandbox.limits

    def reset(self) -> None:
        """Forgets the variables of the code: the next run has a fresh sandbox."""
        if (old := self.sandbox) is not None:
            self.sandbox = type(old)(old.functions, limits=old.limits, unsafe=old.unsafe)
            old.close()

    def functions(self) -> list[Tool]:
        """The tools that code may call: all but `python` itself."""
        return [tool for tool in self.tools.values() if tool.function is not python]

    def run(self, code: str) -> Ran:
        """Runs code in the box's sandbox; variables are kept."""
        assert self.sandbox is not None
        return self.sandbox.run(code, self.interrupted)

    def schemas(self) -> list[dict[str, Any]]:
        """For the model, as chat templates and the OpenAI API take them."""
        return [tool.schema() for tool in self.tools.values()]

    def call(self, name: str, arguments: str) -> str:
        """The result of a call as text.

        Args:
            arguments: a JSON object.

        Raises:
            ToolError: no such tool, wrong arguments, or the tool failed.
        """
        tool = self.tools.get(name)
        if tool is None:
            raise ToolError(f"there is no tool {name!r}; there is {', '.join(self.tools) or 'none'}")
        if tool.function is python:
            return self._python(tool, arguments)
        return tool.call(arguments)

    def _python(self, tool: Tool, arguments: str) -> str:
        """Runs code; its own errors are part of its output, as in a REPL."""
        ran = self.run(tool.checked(arguments)["code"])
        if ran.error is not None:
            raise ToolError(ran.output or ran.error)
        return ran.output or "(no output)"
