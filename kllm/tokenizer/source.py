"""Finding and reading the files of a tokenizer directory, each fault as one line.

Understood: `tokenizer.json` with or without `tokenizer_config.json`, `special_tokens_map.json`,
`chat_template.jinja` and `generation_config.json`; GPT-2's `vocab.json` + `merges.txt`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kllm.errors import UserError

TOKENIZER_FILES = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
]


@dataclass
class Source:
    """A tokenizer as it lies on disk.

    Attributes:
        where: the directory, for messages.
        spec: the text of tokenizer.json (built from vocab.json + merges.txt if need be).
        config: tokenizer_config.json, {} if there is none.
        chat_template: its text, None if there is none.
        stop_ids: `eos_token_id` of generation_config.json as a list.
    """

    where: str
    spec: str
    config: dict[str, Any] = field(default_factory=dict)
    chat_template: str | None = None
    stop_ids: list[int] = field(default_factory=list)


def read_source(path: str | Path) -> Source:
    """Reads a tokenizer directory or its tokenizer.json; `kllm.export.tokenizers` takes more.

    Raises:
        UserError: nothing there, or a file that cannot be read.
    """
    directory = _locate(path)
    if (directory / "tokenizer.json").is_file():
        file = directory / "tokenizer.json"
        if not isinstance(read_json(file).get("model"), dict):
            raise UserError("no 'model' in it", where=str(file), hint="is it a tokenizer's file?")
        spec = file.read_text(encoding="utf-8-sig")
    elif (directory / "vocab.json").is_file() and (directory / "merges.txt").is_file():
        spec = json.dumps(_gpt2_spec(directory))
    else:
        hint = "a tokenizer directory holds tokenizer.json, or vocab.json and merges.txt"
        if (directory / "tokenizer.model").is_file():
            hint = "convert tokenizer.model to tokenizer.json first (transformers' save_pretrained does it)"
        raise UserError("no tokenizer.json in it", where=str(directory), hint=hint)
    source = Source(str(directory), spec)
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (directory / name).is_file():
            source.config.update(read_json(directory / name))
    source.chat_template = _template(directory, source.config)
    if (directory / "generation_config.json").is_file():
        stop = read_json(directory / "generation_config.json").get("eos_token_id")
        stop = stop if isinstance(stop, list) else [stop]
        source.stop_ids = [i for i in stop if isinstance(i, int)]
    return source


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; faults name the file and the line."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as e:
        where = f"{path}:{e.lineno}"
        raise UserError(f"broken JSON: {e.msg}", where=where, hint="copy the file again") from e
    except UnicodeDecodeError as e:
        raise UserError("not UTF-8 text", where=str(path), hint="copy the file again") from e
    except OSError as e:
        raise UserError(f"cannot be read: {e.strerror}", where=str(path)) from e
    if not isinstance(value, dict):
        raise UserError("not a JSON object", where=str(path))
    return value


def template_text(chat_template: str) -> tuple[str, str]:
    """(text, where) of a template given as text or as the path of a .jinja file."""
    if "{" in chat_template or "\n" in chat_template:
        return chat_template, "chat template"
    try:
        return Path(chat_template).read_text(encoding="utf-8-sig"), chat_template
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(
            "the chat template cannot be read", where=chat_template, hint="give the path of a Jinja file"
        ) from e


def token_name(value: Any) -> str | None:
    """The text of a token as the configuration files write it: a string or {"content": ...}."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _locate(path: str | Path) -> Path:
    given = Path(path).expanduser()
    if given.is_file() and given.name in ("tokenizer.json", "vocab.json"):
        return given.parent
    if given.is_dir():
        inner = given / "final"  # a stage's directory
        own = (given / "tokenizer.json").is_file()
        return inner if not own and (inner / "tokenizer.json").is_file() else given
    if given.exists():
        raise UserError("not a tokenizer", where=str(path), hint="give the directory of tokenizer.json")
    raise UserError("no such tokenizer directory", where=str(path), hint="check the path")


def _template(directory: Path, config: dict[str, Any]) -> str | None:
    file = directory / "chat_template.jinja"
    if file.is_file():
        return template_text(str(file))[0]
    given = config.get("chat_template")
    if isinstance(given, list):
        named = {t.get("name"): t.get("template") for t in given if isinstance(t, dict)}
        given = named.get("default") or next(iter(named.values()), None)
    return given if isinstance(given, str) and given else None


def _gpt2_spec(directory: Path) -> dict[str, Any]:
    """tokenizer.json of GPT-2's two files."""
    vocab = read_json(directory / "vocab.json")
    try:
        lines = (directory / "merges.txt").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError("cannot be read", where=str(directory / "merges.txt")) from e
    merges = [line.split(" ") for line in lines if line.strip() and not line.startswith("#version")]
    added = [
        (index, token, True)
        for token, index in sorted(vocab.items(), key=lambda item: item[1])
        if token.startswith("<|") and token.endswith("|>")
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return bpe_spec(vocab, merges, added, level, level)


def bpe_spec(
    vocab: dict[str, int],
    merges: list[list[str]],
    added: list[tuple[int, str, bool]],
    pre_tokenizer: dict[str, Any],
    decoder: dict[str, Any],
) -> dict[str, Any]:
    """tokenizer.json of a byte-level BPE; `added` holds (id, token, special)."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": t, **flags, "special": special} for i, t, special in added],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges,
        },
    }
