"""What a caller asks of an answer (a JSON schema, a regex, choices, tools) as grammar text for llguidance.

Plain functions on strings and JSON data; nothing here knows a tokenizer. Everything comes from strangers,
so sizes and depths are bounded before the compiler sees the text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

from kllm.errors import UserError

MAX_TEXT = 1 << 20
"""Characters of a whole grammar or schema, the strings of its enumerations included."""
MAX_SCHEMA = 64 << 10
"""Characters of a schema without titles, descriptions and enumerations; also of a regex or grammar."""
MAX_DEPTH = 64
_MAX_MULTIPLE = 20_000  # states of the division automata; a million takes seconds
_MAX_INTERSECTED = 12  # patterns that one string must match at once; 30 take minutes
_LITERALS = re.compile(r'"(?:\\.|[^"\\])*"|/(?:\\.|[^/\\\n])+/')

_ONE = ("items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames")
_MANY = ("allOf", "anyOf", "oneOf", "prefixItems")
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_NOTES = frozenset(
    ("title", "description", "examples", "default", "$comment", "deprecated", "readOnly", "writeOnly")
)
_FORMATS = frozenset(
    ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
)
_OBJECT_KEYS = frozenset(("properties", "required", "additionalProperties", "patternProperties"))
_OPEN = frozenset(("additionalProperties", "patternProperties", "minProperties", "$ref", "anyOf", "oneOf"))

_COMPACT = {"whitespace_flexible": False}
_SPACED = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def schema_text(schema: Any, where: str) -> str:
    """A JSON schema as text for the compiler, with exactly one way to write white space.

    Titles and other notes are dropped, as are unknown formats (they assert nothing). An object that lists
    its properties and says nothing of others gets no others: every answer is still valid, and a weak model
    cannot go on inventing keys. Where schemas are intersected (`allOf`, `$ref` with siblings) nothing is
    closed.

    Raises:
        UserError: not a schema, too large, too deep, or False, which allows nothing.
    """
    prepared = _prepared(schema, where)
    return json.dumps({**prepared, "x-guidance": _COMPACT}, ensure_ascii=False)


def choice_pattern(options: Sequence[str], where: str) -> str:
    """A regex that matches exactly one of `options`.

    Raises:
        UserError: no options, an empty one, or too much text.
    """
    if isinstance(options, str) or not options or not all(isinstance(o, str) and o for o in options):
        raise UserError("needs a list of strings that are not empty", where=where)
    checked_text("".join(options), where, MAX_TEXT)
    return "|".join("".join(map(_literal, option)) for option in dict.fromkeys(options))


def ascii_classes(pattern: str) -> str:
    r"""The regex with `\d`, `\w` and `\s` limited to ASCII; their negations stay Unicode's.

    So whatever is generated matches for every reader, be it Python, JavaScript or Rust.
    """
    classes = {"d": "0-9", "w": "0-9A-Za-z_", "s": r" \t\n\r\f\v"}
    out: list[str] = []
    depth = at = 0  # of nested [...]
    while at < len(pattern):
        char = pattern[at]
        if char == "\\":
            inside = classes.get(pattern[at + 1 : at + 2])
            if inside is None:
                out.append(pattern[at : at + 2])
            else:
                out.append(inside if depth else f"[{inside}]")
            at += 2
            continue
        if char == "[":
            depth += 1
            for literal in ("^]", "]"):  # a bracket that comes first is an ordinary character
                if pattern.startswith(literal, at + 1):
                    out.append("[" + literal.replace("]", r"\]"))
                    at += 1 + len(literal)
                    break
            else:
                out.append(char)
                at += 1
            continue
        depth -= char == "]" and depth > 0
        out.append(char)
        at += 1
    return "".join(out)


def lark_text(grammar: str, where: str) -> str:
    """The user's Lark grammar; one in llama.cpp's GBNF (`root ::= ...`) is converted.

    Raises:
        UserError: too large, or a GBNF that cannot be converted.
    """
    checked_text(grammar, where, MAX_SCHEMA)
    if _LITERALS.sub("", grammar).count("&") > _MAX_INTERSECTED:
        raise UserError(f"more than {_MAX_INTERSECTED} intersections (&)", where=where)
    if "::=" not in grammar:
        return grammar
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return any_to_lark(grammar)
    except Exception as e:  # whatever its hand-written parser trips over
        raise UserError(f"not a GBNF grammar: {one_line(str(e))}", where=where) from e


def tools_lark(
    tools: Sequence[Mapping[str, Any]], opener: str, closer: str, *, repeat: bool, where: str
) -> str:
    """Lark text of one call, or one and more, in the form that chat templates train.

    Args:
        tools: {"name": ..., "parameters": JSON schema of an object, or None}.
        opener, closer: the markers as Lark terms.
        repeat: allow further calls, each on a new line.

    Raises:
        UserError: no tools, or a schema as in `schema_text`; its `where` names the tool.
    """
    if not tools:
        raise UserError("there are no tools to call", where=where)
    rules = [
        'start: call ("\\n" call)*' if repeat else "start: call",
        f'call: {opener} "\\n" body "\\n" {closer}',
        "body: " + " | ".join(f"body{i}" for i in range(len(tools))),
    ]
    for i, tool in enumerate(tools):
        head = lark_string(f'{{"name": {json.dumps(tool["name"], ensure_ascii=False)}, "arguments": ')
        parameters = tool.get("parameters")
        if takes_nothing(parameters):
            rules.append(f'body{i}: {head} "{{}}}}"')
            continue
        spot = f"{where}[{i}].function.parameters"
        schema = _prepared(_object_schema(parameters, spot), spot)
        text = json.dumps({**schema, "x-guidance": _SPACED}, ensure_ascii=False)
        rules += [f'body{i}: {head} args{i} "}}"', f"args{i}: %json {text}"]
    return checked_text("\n".join(rules), where, MAX_TEXT)


def takes_nothing(parameters: Any) -> bool:
    """Whether a tool has no parameters, so that its arguments are `{}`."""
    if parameters is None or parameters == {}:
        return True
    return (
        isinstance(parameters, Mapping)
        and parameters.get("type") == "object"
        and not parameters.get("properties")
        and not parameters.get("required")
        and not any(key in parameters for key in _OPEN | {"allOf"})
    )


def lark_string(text: str) -> str:
    """`text` as a Lark literal."""
    return json.dumps(text, ensure_ascii=False)


def checked_text(text: Any, where: str, limit: int) -> str:
    """`text`, if it is a string of Unicode characters and not too long.

    Raises:
        UserError: it is not.
    """
    if not isinstance(text, str) or not text:
        raise UserError("must be a string that is not empty", where=where)
    if len(text) > limit:
        raise UserError(f"has {len(text):,} characters, more than {limit:,}", where=where)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError("holds half a surrogate pair", where=where) from None
    return text


def one_line(message: str, limit: int = 200) -> str:
    """A compiler's message of many lines, with excerpts and markers, as one short line."""
    message = message.split("<state>")[0].split("<non-verbose/>")[0]
    kept = [" ".join(line.split()) for line in message.splitlines()]
    text = "; ".join(line for line in kept if line.strip("^ ") and not _is_excerpt(line)).rstrip(";: ")
    text = text.replace("parse error:; ", "parse error: ").replace("; error:", ": ")
    if "oneOf" in text and "coerce_one_of" in text:
        text = "oneOf needs branches that exclude each other; use anyOf"
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _is_excerpt(line: str) -> bool:
    number, bar, _ = line.partition(" |")
    return bool(bar) and number.strip().isdigit()


def _literal(char: str) -> str:
    return char if char.isalnum() or ord(char) > 0x7F else f"\\x{{{ord(char):X}}}"


def _object_schema(parameters: Any, where: str) -> dict[str, Any]:
    if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
        raise UserError('a tool\'s parameters must be a schema of type "object"', where=where)
    return {"type": "object", **parameters}


# ---- schemas


def _prepared(schema: Any, where: str) -> dict[str, Any]:
    if schema is False:
        raise UserError("the schema allows no value", where=where)
    if schema is True:
        return {}
    if not isinstance(schema, Mapping):
        raise UserError("a JSON schema is an object or true", where=where)
    if _deeper_than(schema, MAX_DEPTH):
        raise UserError(f"nested more than {MAX_DEPTH} levels deep", where=where)
    _check_multiples(schema, where)
    if any(_intersected(node, schema, 0) > _MAX_INTERSECTED for node in _nodes(schema) if "allOf" in node):
        raise UserError(f"allOf of more than {_MAX_INTERSECTED} patterns", where=where)
    closing = all(_closable(node) for node in _nodes(schema))
    prepared = _copy(schema, closing, alone=True)
    try:
        text = json.dumps(prepared, ensure_ascii=False, allow_nan=False)
        listed = sum(len(json.dumps(n["enum"])) for n in _nodes(prepared) if "enum" in n)
    except (ValueError, TypeError):
        raise UserError("not a JSON value", where=where) from None
    checked_text(text, where, MAX_TEXT)
    if len(text) - listed > MAX_SCHEMA:
        raise UserError(f"a schema of more than {MAX_SCHEMA:,} characters", where=where)
    return prepared


def _deeper_than(value: Any, depth: int) -> bool:
    level = [value]
    for _ in range(depth + 1):
        below: list[Any] = []
        for item in level:
            if isinstance(item, Mapping):
                below += [v for v in item.values() if isinstance(v, Mapping | list)]
            elif isinstance(item, list):
                below += [v for v in item if isinstance(v, Mapping | list)]
        if not below:
            return False
        level = below
    return True


def _children(node: Mapping[str, Any]) -> Iterator[Any]:
    for key, value in node.items():
        if key in _NAMED and isinstance(value, Mapping):
            yield from value.values()
        elif key in _ONE and isinstance(value, Mapping):
            yield value
        elif (key in _MANY or key == "items") and isinstance(value, list):
            yield from value


def _nodes(schema: Any) -> Iterator[Mapping[str, Any]]:
    """The schema and all below it, without those that are only true or false."""
    pending = [schema]
    while pending:
        node = pending.pop()
        if isinstance(node, Mapping):
            yield node
            pending += _children(node)


def _closable(node: Mapping[str, Any]) -> bool:
    if "allOf" in node or "dependentSchemas" in node or "unevaluatedProperties" in node:
        return False
    return not ("$ref" in node and _OBJECT_KEYS & node.keys())


def _copy(node: Any, closing: bool, alone: bool) -> Any:
    """The schema without notes, its objects closed; `alone` if nothing above speaks of the same object."""
    if not isinstance(node, Mapping):
        return node
    inner = alone and not _OBJECT_KEYS & node.keys()
    out: dict[str, Any] = {}
    for key, value in node.items():
        if key in _NOTES or key == "x-guidance":
            continue
        if (key == "format" and str(value) not in _FORMATS) or (key == "uniqueItems" and value is False):
            continue
        if key in _NAMED and isinstance(value, Mapping):
            out[key] = {name: _copy(child, closing, True) for name, child in value.items()}
        elif key in _ONE and isinstance(value, Mapping):
            out[key] = _copy(value, closing, True)
        elif (key in _MANY or key == "items") and isinstance(value, list):
            out[key] = [_copy(child, closing, inner or key in ("prefixItems", "items")) for child in value]
        else:
            out[key] = value
    if closing and alone and _lists_all(out):
        out["additionalProperties"] = False
    return out


def _lists_all(node: Mapping[str, Any]) -> bool:
    """Whether the schema of an object names its properties and says nothing of further ones."""
    properties, required = node.get("properties"), node.get("required", [])
    if node.get("type") != "object" or not isinstance(properties, Mapping) or not isinstance(required, list):
        return False
    return not _OPEN & node.keys() and all(isinstance(k, str) and k in properties for k in required)


def _intersected(node: Any, root: Mapping[str, Any], level: int) -> int:
    """How many patterns a string must match at once, references into the definitions followed."""
    if not isinstance(node, Mapping) or level > 8:
        return 0
    count = int("pattern" in node) + int(str(node.get("format")) in _FORMATS)
    match = re.fullmatch(r"#/(\$defs|definitions)/([^/]+)", str(node.get("$ref")))
    if match is not None:
        named = root.get(match[1])
        count += _intersected(named.get(match[2]) if isinstance(named, Mapping) else None, root, level + 1)
    for key in ("allOf", "anyOf", "oneOf"):
        parts = node.get(key)
        counts = [_intersected(c, root, level + 1) for c in parts] if isinstance(parts, list) else []
        count += sum(counts) if key == "allOf" else max(counts, default=0)
    return count


def _check_multiples(schema: Any, where: str) -> None:
    """The compiler's division automata grow with `multipleOf`; together they must stay small."""
    total = 0
    for node in _nodes(schema):
        value = node.get("multipleOf")
        if isinstance(value, int | float) and not isinstance(value, bool):
            try:
                number = Decimal(str(value))
                total += abs(int(number.scaleb(-min(0, int(number.as_tuple().exponent)))))
            except (InvalidOperation, ValueError, OverflowError):
                raise UserError("multipleOf must be a positive number", where=where) from None
    if total > _MAX_MULTIPLE:
        raise UserError(f"multipleOf is supported up to {_MAX_MULTIPLE:,} in all", where=where)
