"""A tool is a typed Python function with a docstring; its JSON schema and its prompt text come from those."""

from __future__ import annotations

import inspect
import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic_core import to_json

from kllm.errors import UserError

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_SECTION = re.compile(r"^[A-Z][A-Za-z ]+:$")
_ENTRY = re.compile(r"^(\w+)(?:\s*\([^)]*\))?:\s*(.*)$")


class ToolError(Exception):
    """A call that went wrong; the message is what the model is told."""


class ToolCrash(ToolError):
    """The function raised what is no ToolError: `__cause__`, whose whole text is in the message.

    That text was written for nobody in particular and may hold paths: show it to the tool's owner only.
    """


@dataclass(frozen=True)
class Tool:
    """A function that a model may call.

    Attributes:
        name: as the model calls it.
        description: what it is for: the docstring without its sections.
        function: does the work; it may raise whatever it likes.
        signature: `name(a: int, b: str = "x") -> str`, for prompts that show Python.
        arguments: checks the arguments and has their JSON schema.
    """

    name: str
    description: str
    function: Callable[..., Any] = field(repr=False)
    signature: str
    arguments: type[BaseModel] = field(repr=False)

    @property
    def parameters(self) -> dict[str, Any]:
        """JSON schema of the arguments."""
        schema = self.arguments.model_json_schema()
        for noise in ("title", "additionalProperties"):  # tokens of every prompt
            schema.pop(noise, None)
        for one in schema.get("properties", {}).values():
            one.pop("title", None)
        return schema

    def schema(self) -> dict[str, Any]:
        """As chat templates and the OpenAI API take it."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}

    def prompt(self) -> str:
        """As a Python definition with its docstring."""
        lines = self.description.splitlines() or [""]
        properties = self.parameters.get("properties", {})
        notes = [f"{name}: {p['description']}" for name, p in properties.items() if p.get("description")]
        body = [*lines, *(["", "Args:", *(f"    {note}" for note in notes)] if notes else [])]
        doc = "\n".join(f"    {line}".rstrip() for line in body)
        return f'def {self.signature}:\n    """{doc.strip()}\n    """'

    def invoke(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The function's result in the terms of JSON, called as Python calls.

        Raises:
            ToolError: arguments that do not fit, or the function raised it.
            ToolCrash: the function raised something else.
        """
        try:
            bound = inspect.signature(self.function).bind(*args, **kwargs)
        except TypeError as error:
            raise ToolError(f"{self.name}: {error}") from None
        return self._run(self._values(bound.arguments))

    def call(self, arguments: str) -> str:
        """The function's result as text, called with a JSON object of arguments.

        Raises:
            ToolError: as `invoke`.
        """
        result = self._run(self.checked(arguments))
        return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)

    def checked(self, arguments: str) -> dict[str, Any]:
        """The arguments out of a JSON object, as the function's types want them.

        Raises:
            ToolError: they do not fit.
        """
        try:
            given = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise ToolError(f"{self.name}: the arguments are no JSON: {error}") from None
        if not isinstance(given, dict):
            raise ToolError(f"{self.name}: the arguments must be a JSON object")
        return self._values(given)

    def _values(self, given: Mapping[str, Any]) -> dict[str, Any]:
        try:
            checked = self.arguments.model_validate(dict(given))
        except ValidationError as failure:
            first = failure.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise ToolError(f"{self.name}: {where}: {first['msg']}") from None
        return {name: getattr(checked, name) for name in type(checked).model_fields}

    def _run(self, values: Mapping[str, Any]) -> Any:
        try:
            return json.loads(to_json(self.function(**values), fallback=str, inf_nan_mode="strings"))
        except ToolError:
            raise
        except (Exception, SystemExit) as error:
            raise ToolCrash(f"{self.name}: {type(error).__name__}: {error}") from error


def tool_of(function: Callable[..., Any], name: str | None = None, *, where: str = "tool") -> Tool:
    """The tool that a function is.

    Args:
        function: has a docstring and a type for every parameter; its Google-style `Args:` describe them.
        name: another name than the function's.
        where: what gave the function, for errors.

    Raises:
        UserError: no docstring, a parameter without a type or with a form that JSON has not.
    """
    if not callable(function):
        raise UserError(f"a {type(function).__name__} is no function", where=where)
    name = name or str(getattr(function, "__name__", ""))
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        raise UserError(f"{name} is async", where=where, hint="a tool is a plain function")
    if not _NAME.fullmatch(name):
        raise UserError(f"{name!r} is no name for a tool", where=where, hint="letters, digits and _")
    doc = inspect.getdoc(function)
    if not doc or inspect.isclass(function):
        raise UserError(f"{name} is no function with a docstring", where=where, hint="say what it does")
    try:
        signature = inspect.signature(function, eval_str=True)
    except (TypeError, ValueError, NameError) as error:
        raise UserError(f"{name}: {error}", where=where) from None
    description, notes = _documented(doc)
    fields: dict[str, Any] = {}
    for parameter in signature.parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise UserError(f"{name}: {parameter} has no name in JSON", where=where, hint="plain parameters")
        if parameter.annotation is parameter.empty or parameter.name.startswith("_"):
            raise UserError(f"{name}: {parameter.name} needs a type", where=where, hint="e.g. x: int")
        default = ... if parameter.default is parameter.empty else parameter.default
        fields[parameter.name] = (
            parameter.annotation,
            Field(default, description=notes.get(parameter.name)),
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a parameter may be called `json` or `copy`
            config = ConfigDict(extra="forbid", protected_namespaces=())
            arguments = create_model(name, __config__=config, **fields)
            arguments.model_json_schema()
    except Exception as error:  # pydantic has several for types that are no JSON
        raise UserError(f"{name}: {str(error).splitlines()[0]}", where=where, hint="types of JSON") from None
    return Tool(name, description, function, name + _written(signature), arguments)


def _written(signature: inspect.Signature) -> str:
    return str(signature).replace("typing.", "").replace("collections.abc.", "")


def _documented(doc: str) -> tuple[str, dict[str, str]]:
    """(the text before the first section, parameter -> its line)."""
    lines = doc.splitlines()
    start = next((i for i, line in enumerate(lines) if _SECTION.match(line)), len(lines))
    notes: dict[str, str] = {}
    inside = name = ""
    for line in lines[start:]:
        if _SECTION.match(line):
            inside, name = line, ""
        elif inside == "Args:" and (entry := _ENTRY.match(line.strip())) and line.startswith("    "):
            if line.startswith("        ") and name:
                notes[name] += f" {line.strip()}"
            else:
                name = entry[1]
                notes[name] = entry[2]
        elif name and line.strip():
            notes[name] += f" {line.strip()}"
    return "\n".join(lines[:start]).strip(), notes
