"""YAML text to plain data, with the line of every key.

PyYAML parses the text into nodes; the values are made here, by the YAML 1.2 core rules (`no` is a word,
`1e-5` a number, `010` is ten, a date stays text). Repeated keys, tags, merge keys, aliases that grow
without bound and oversized files are refused, each with its line.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from kllm.errors import UserError

MAX_FILE_BYTES = 1 << 20
MAX_VALUES = 20_000
MAX_DEPTH = 40

KeyPath = tuple[str | int, ...]

_INT = re.compile(r"[-+]?[0-9]{1,30}")
_HEX_OCT = re.compile(r"0x[0-9a-fA-F]{1,16}|0o[0-7]{1,20}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL = {"null": None, "~": None, "": None, "true": True, "false": False}
_STANDARD_TAGS = {"tag:yaml.org,2002:str", "tag:yaml.org,2002:seq", "tag:yaml.org,2002:map"}


@dataclass
class Tree:
    """Plain data (dict, list, str, int, float, bool, None) and where each part of it stands in the text.

    `errors` are the mistakes that still leave data to check: repeated keys, tags, merge keys.
    """

    data: Any
    file: str
    lines: dict[KeyPath, int] = field(default_factory=dict)
    errors: list[UserError] = field(default_factory=list)

    def where(self, path: KeyPath) -> str:
        """`file:line` of the nearest enclosing part that has a line."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.lines:
                return f"{self.file}:{self.lines[path[:length]]}"
        return self.file


class _NodeLoader(yaml.SafeLoader):
    """Only used to compose nodes: with no implicit resolvers every plain scalar stays text."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (PyYAML's own declaration)


def scalar(text: str) -> Any:
    """The value of an unquoted YAML 1.2 scalar."""
    lowered = text.lower()
    if lowered in _SPECIAL and text in (lowered, lowered.capitalize(), lowered.upper()):
        return _SPECIAL[lowered]
    if _INT.fullmatch(text):
        return int(text)
    if _HEX_OCT.fullmatch(text):
        return int(text, 0)
    if _FLOAT.fullmatch(text):
        return float(text)
    if re.fullmatch(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", text):
        return float(text.replace(".", ""))
    return text


class _Builder:
    """Turns composed nodes into a `Tree`, collecting every error."""

    def __init__(self, file: str) -> None:
        self.tree = Tree(None, file)
        self.values = 0
        self.open: set[int] = set()

    def error(self, node: yaml.Node, message: str, hint: str | None = None) -> None:
        line = node.start_mark.line + 1
        self.tree.errors.append(UserError(message, where=f"{self.tree.file}:{line}", hint=hint))

    def build(self, node: yaml.Node, path: KeyPath) -> Any:
        self.values += 1
        self.tree.lines.setdefault(path, node.start_mark.line + 1)
        if id(node) in self.open:
            self.error(node, "an alias contains itself")
            return None
        if len(path) > MAX_DEPTH or self.values > MAX_VALUES:
            if self.values <= MAX_VALUES or self.values == MAX_VALUES + 1:
                self.error(node, f"too large: more than {MAX_VALUES} values or {MAX_DEPTH} levels")
                self.values = max(self.values, MAX_VALUES + 1)
            return None
        if node.tag not in _STANDARD_TAGS:
            self.error(node, f"tags such as {node.tag.replace('tag:yaml.org,2002:', '!!')} are not supported")
            return None
        self.open.add(id(node))
        try:
            return self._value(node, path)
        finally:
            self.open.discard(id(node))

    def _value(self, node: yaml.Node, path: KeyPath) -> Any:
        if isinstance(node, yaml.ScalarNode):
            return scalar(node.value) if node.style is None else node.value
        if isinstance(node, yaml.SequenceNode):
            items: list[Any] = []
            for child in node.value:
                if self.values > MAX_VALUES:
                    break
                items.append(self.build(child, (*path, len(items))))
            return items
        return self._mapping(node, path)

    def _mapping(self, node: yaml.Node, path: KeyPath) -> dict[str, Any]:
        result: dict[str, Any] = {}
        first_line: dict[str, int] = {}
        for key_node, value_node in node.value:
            if self.values > MAX_VALUES:
                break
            if not isinstance(key_node, yaml.ScalarNode):
                self.error(key_node, "a key must be a word, not a list or mapping")
                continue
            key, line = key_node.value, key_node.start_mark.line + 1
            if key == "<<" and key_node.style is None:
                self.error(
                    key_node, "merge keys (<<) are not supported", "use extends: FILE, or repeat the keys"
                )
                continue
            if key in first_line:
                self.error(key_node, f"key {key!r} is given twice, first on line {first_line[key]}")
                continue
            first_line[key] = line
            here: KeyPath = (*path, key)
            self.tree.lines[here] = line
            result[key] = self.build(value_node, here)
        return result


def parse_yaml(text: str, file: str) -> Tree:
    """Parse one YAML document; `file` is what errors call it.

    Raises:
        UserError: the place where the text is not YAML. Milder mistakes are in the tree's `errors`.
    """
    loader = None
    try:
        loader = _NodeLoader(text)
        node = loader.get_single_node()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UserError(f"not a text file: {error.reason}", where=f"{file}:{line}") from None
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(error, text, file) from None
    except RecursionError:
        raise UserError(f"too large: more than {MAX_DEPTH} levels", where=file) from None
    finally:
        if loader is not None:
            loader.dispose()
    builder = _Builder(file)
    if node is not None:
        builder.tree.data = builder.build(node, ())
    return builder.tree


def _syntax_error(error: yaml.MarkedYAMLError, text: str, file: str) -> UserError:
    mark = error.problem_mark or error.context_mark
    line = mark.line + 1 if mark else 1
    lines = text.splitlines()
    shown = lines[line - 1] if line <= len(lines) else ""
    where = f"{file}:{line}"
    if "\t" in shown[: len(shown) - len(shown.lstrip())] or "'\\t'" in (error.problem or ""):
        return UserError("a tab is used as indentation", where=where, hint="YAML wants spaces")
    if "expected a single document" in (error.context or ""):
        return UserError("a recipe is one document; remove the line ---", where=where)
    if "mapping values are not allowed" in (error.problem or ""):
        hint = "wrong indentation, or a value with ': ' in it that needs quotes"
        return UserError("not valid YAML: a key is not expected here", where=where, hint=hint)
    return UserError(f"not valid YAML: {error.problem or error.context}", where=where)


def read_text(path: Path, shown: str) -> str:
    """The text of a small UTF-8 file (a byte-order mark is dropped), or UserError."""
    try:
        if path.is_dir():
            raise UserError("is a folder, not a recipe file", where=shown)
        with path.open("rb") as stream:
            raw = stream.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise UserError("no such file", where=shown, hint="`kllm recipe ls` lists the shipped ones") from None
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=shown) from None
    if len(raw) > MAX_FILE_BYTES:
        raise UserError(f"is larger than {MAX_FILE_BYTES >> 20} MiB, surely not a recipe", where=shown)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError("is not UTF-8 text", where=f"{shown}:{line}") from None
