"""The tools of a request: checked, and what the choice among them means for prompt, grammar and answer."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from kllm.serve.errors import ApiError, shown
from kllm.serve.schemas import check_schema

MAX_TOOLS = 128
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
# Keywords that may declare further properties.
_OPENERS = {
    "additionalProperties",
    "patternProperties",
    "propertyNames",
    "unevaluatedProperties",
    "minProperties",
    "allOf",
    "anyOf",
    "oneOf",
    "if",
    "not",
    "$ref",
    "dependentSchemas",
}

TOOLS_SCHEMA: dict[str, Any] = {
    "type": "array",
    "maxItems": MAX_TOOLS,
    "items": {
        "type": "object",
        "required": ["type", "function"],
        "properties": {
            "type": {"const": "function"},
            "function": {
                "type": "object",
                "required": ["name"],
                "properties": {
                    "name": {"type": "string", "pattern": "^[A-Za-z0-9_.-]{1,64}$"},
                    "description": {"type": ["string", "null"]},
                    "parameters": {"type": ["object", "null"], "description": "A JSON Schema."},
                },
            },
        },
    },
}
CHOICE_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"enum": ["none", "auto", "required"]},
        {
            "type": "object",
            "required": ["type", "function"],
            "properties": {
                "type": {"const": "function"},
                "function": {
                    "type": "object",
                    "required": ["name"],
                    "properties": {"name": {"type": "string"}},
                },
            },
        },
    ]
}


@dataclass(frozen=True)
class ToolPlan:
    """What a request's tools come to.

    Attributes:
        tools: as the template gets them; None without any.
        parsed: calls in the answer are looked for.
        forced: the answer is a call of one of these: {"name", "parameters"}; None if it need not be.
        several: more than one call is allowed.
        banned: the model must not begin a call.
    """

    tools: list[dict[str, Any]] | None = None
    parsed: bool = False
    forced: list[dict[str, Any]] | None = field(default=None)
    several: bool = True
    banned: bool = False


def tool_plan(tools: list[Any] | None, choice: Any, parallel: bool) -> ToolPlan:
    """Checks `tools` and `tool_choice`.

    Args:
        tools: as in the request; an empty list is none.
        choice: "none", "auto", "required", {"type": "function", "function": {"name"}}, or None for the
            default: auto.
        parallel: several calls in one answer are allowed.

    Raises:
        ApiError: 400.
    """
    functions = {function["name"]: function for function in checked_tools(tools)}
    name = chosen_name(choice)
    if not functions:
        if choice not in (None, "none", "auto"):
            raise ApiError(400, "tool_choice needs tools to choose from", param="tool_choice")
        return ToolPlan()
    if name is not None and name not in functions:
        raise ApiError(400, f"tool_choice names no tool: {shown(name)}", param="tool_choice.function.name")
    if choice == "none":
        return ToolPlan(tools, banned=True)
    if choice in (None, "auto"):
        return ToolPlan(tools, parsed=True, several=parallel)
    wanted = functions.values() if name is None else [functions[name]]
    forced = [{"name": one["name"], "parameters": _object_schema(one.get("parameters"))} for one in wanted]
    return ToolPlan(tools, parsed=True, forced=forced, several=parallel and name is None)


def checked_tools(tools: list[Any] | None, param: str = "tools") -> list[dict[str, Any]]:
    """The functions of `tools`.

    Raises:
        ApiError: 400 with the path of what is wrong.
    """
    if len(tools or ()) > MAX_TOOLS:
        raise ApiError(400, f"{len(tools or ())} tools; at most {MAX_TOOLS} are allowed", param=param)
    functions: list[dict[str, Any]] = []
    names: set[str] = set()
    for i, tool in enumerate(tools or ()):
        function = _function(tool, f"{param}[{i}]")
        if function["name"] in names:
            message = f"two tools are named {shown(function['name'])}"
            raise ApiError(400, message, param=f"{param}[{i}].function.name")
        names.add(function["name"])
        functions.append(function)
    return functions


def _function(tool: Any, at: str) -> dict[str, Any]:
    if not isinstance(tool, dict):
        raise ApiError(400, f"a tool must be an object, not {shown(tool)}", param=at)
    if tool.get("type") != "function":
        raise ApiError(
            400, f'the type of a tool must be "function", not {shown(tool.get("type"))}', param=f"{at}.type"
        )
    function = tool.get("function")
    if not isinstance(function, dict):
        raise ApiError(400, "a tool needs a function: an object with a name", param=f"{at}.function")
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        message = f"a function's name must match {_NAME.pattern}, not {shown(name)}"
        raise ApiError(400, message, param=f"{at}.function.name")
    if not isinstance(function.get("description"), (str, type(None))):
        raise ApiError(400, "description must be a string", param=f"{at}.function.description")
    parameters = function.get("parameters")
    if parameters is not None:
        at = f"{at}.function.parameters"
        if not isinstance(parameters, dict):
            raise ApiError(400, f"parameters must be a JSON schema, not {shown(parameters)}", param=at)
        check_schema(parameters, at)
        if parameters.get("type", "object") != "object":
            raise ApiError(400, "parameters must be a schema of an object", param=f"{at}.type")
    return function


def _object_schema(parameters: dict[str, Any] | None) -> dict[str, Any]:
    """The schema of a function's arguments.

    Nothing is passed that the function does not declare, unless its schema says that it may: a weak model
    would invent arguments without end.
    """
    schema = {"type": "object", **(parameters or {"properties": {}})}
    declared = schema.get("properties")
    if (
        declared is not None
        and not _OPENERS & schema.keys()
        and set(schema.get("required", ())) <= set(declared)
    ):
        schema["additionalProperties"] = False
    return schema


def chosen_name(choice: Any) -> str | None:
    """The name in a tool_choice, None for one of its words.

    Raises:
        ApiError: 400, it is neither.
    """
    if choice in (None, "none", "auto", "required"):
        return None
    if not isinstance(choice, dict):
        message = f"tool_choice must be none, auto, required or a function, not {shown(choice)}"
        raise ApiError(400, message, param="tool_choice")
    if choice.get("type", "function") != "function":
        raise ApiError(400, 'the type of tool_choice must be "function"', param="tool_choice.type")
    function = choice.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise ApiError(400, "tool_choice needs a function's name", param="tool_choice.function.name")
    return name
