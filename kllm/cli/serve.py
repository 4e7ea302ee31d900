"""`kllm serve`: the flags of the server."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from kllm.cli.options import EVERYDAY, extra_parameter, with_signature
from kllm.errors import UserError

_ACCESS, _LIMITS, _MODEL, _TOOLS = "Access", "Limits", "Model and memory", "Tools"
_Texts = list[str] | None
_CHECKS: dict[str, Callable[[str], Any]] = {}
_LEAST_BODY = 1 << 10

_MODELS = Annotated[
    list[str],
    typer.Argument(
        metavar="MODEL...", help="Run, folder, file or hub id, or NAME=PATH; the first is the default."
    ),
]


def _row(
    name: str,
    kind: Any,
    default: Any,
    panel: str,
    help: str,
    metavar: str | None = None,
    shown: str | None = None,
    least: float | None = None,
    most: float | None = None,
) -> tuple[str, Any, Any]:
    """A parameter: the flag --name, with choices and default on the help page.

    Numbers and choices arrive as text and are read by `_checked`, whose refusals are like the schema's.
    """
    if get_origin(kind) is Literal:
        metavar = "|".join(get_args(kind))
        _CHECKS[name] = partial(_choice, name, known=get_args(kind))
    elif kind in (int, float):
        _CHECKS[name] = partial(_number, name, kind=kind, least=least, most=most)
    if shown is None and default not in (None, False):
        shown = str(default)
    flag = "--" + name.replace("_", "-")
    option = typer.Option(
        flag, metavar=metavar, help=help, rich_help_panel=panel, show_default=shown or False
    )
    if name in _CHECKS:
        kind, default = str, None if default is None else str(default)
    optional = kind if kind is bool or default is not None else kind | None
    return name, Annotated[optional, option], default


def _checked(values: dict[str, Any]) -> dict[str, Any]:
    """The values with numbers for texts of numbers.

    Raises:
        UserError: no number, out of its range, an unknown choice.
    """
    return {
        name: _CHECKS[name](value) if name in _CHECKS and isinstance(value, str) else value
        for name, value in values.items()
    }


def _choice(name: str, text: str, known: tuple[str, ...]) -> str:
    if text not in known:
        raise UserError(f"must be one of {', '.join(known)}, got {text!r}", where=_named(name))
    return text


def _number(
    name: str, text: str, kind: type[int] | type[float], least: float | None, most: float | None
) -> int | float:
    try:
        number = kind(text)
    except ValueError:
        number = math.nan
    if kind is float:
        if not (least or 0) <= number <= (most or math.inf):
            raise UserError(f"must be a number from {least:g} to {most:g}, got {text}", where=_named(name))
    elif math.isnan(number):
        raise UserError(f"expected a whole number, got {text!r}", where=_named(name))
    elif least is not None and number < least:
        raise UserError(f"must be at least {least}, got {text!r}", where=_named(name))
    elif most is not None and number > most:
        raise UserError(f"must be at most {most}, got {text!r}", where=_named(name))
    return number


def _named(name: str) -> str:
    return f"flag --{name.replace('_', '-')}"


_PARAMETERS: tuple[tuple[str, Any, Any], ...] = (
    ("models", _MODELS, inspect.Parameter.empty),
    _row("host", str, "127.0.0.1", EVERYDAY, "Where to listen.", "ADDRESS"),
    _row("port", int, 8000, EVERYDAY, "Port to listen on; 0 takes a free one.", "N", least=0, most=65535),
    _row(
        "adapter",
        _Texts,
        None,
        EVERYDAY,
        "A LoRA on the first model (PEFT folder, run or hub id), asked for as NAME; may be repeated.",
        "NAME=DIR",
    ),
    _row("device", str, "auto", EVERYDAY, "Where to compute: auto, cpu, cuda, cuda:1, mps.", "NAME"),
    _row("quant", Literal["none", "int8", "int4"], "none", EVERYDAY, "Weights in fewer bits."),
    _row(
        "tools",
        _Texts,
        None,
        _TOOLS,
        "What models may call and the server runs: calculator, clock, python, or one's own as "
        "module:function or file.py:function; commas between. For chat requests without tools of their "
        "own; n above 1, a tool_choice other than auto, a format for the answer or continue_final_message "
        "switch them off, and /v1/responses never has them.",
        "NAME",
    ),
    _row(
        "unsafe_python",
        bool,
        False,
        _TOOLS,
        "Run the model's python without the sandbox: it can then do all that you can. Like the sandboxed "
        "one, only on loopback or with a key.",
    ),
    _row("max_sandboxes", int, 4, _TOOLS, "Requests that may run python at once.", "N", least=1),
    _row(
        "api_key",
        _Texts,
        None,
        _ACCESS,
        "A key that requests need; may be repeated. Visible in ps; prefer --api-key-file.",
        "KEY",
    ),
    _row(
        "api_key_file", Path, None, _ACCESS, "File of keys, one a line. KLLM_API_KEY holds them too.", "FILE"
    ),
    _row("cors", _Texts, None, _ACCESS, "Web pages that may call; may be repeated. * is all.", "ORIGIN"),
    _row("allowed_hosts", _Texts, None, _ACCESS, "Names this server goes by; may be repeated.", "NAME"),
    _row("metrics_public", bool, False, _ACCESS, "/metrics needs no key."),
    _row("log_requests", bool, False, _ACCESS, "Write prompts to the log."),
    _row("allow_request_template", bool, False, _ACCESS, "A request may bring its chat template."),
    _row("max_running", int, 64, _LIMITS, "Answers computed at once.", "N", least=1),
    _row("max_queue", int, 256, _LIMITS, "Requests that may wait; beyond it 429.", "N", least=0),
    _row("max_n", int, 16, _LIMITS, "Largest n (choices) of a request.", "N", least=1),
    _row("max_body", str, "2MiB", _LIMITS, "Largest body of a request, e.g. 8MiB.", "SIZE"),
    _row("request_timeout", str, None, _LIMITS, "Time for a whole answer, e.g. 10m.", "TIME", "none"),
    _row("queue_timeout", str, None, _LIMITS, "Time in the queue, e.g. 30s.", "TIME", "none"),
    _row("drain", str, "30s", _LIMITS, "Time for running answers after SIGTERM or Ctrl-C.", "TIME"),
    _row("exit_on_error", bool, False, _LIMITS, "Exit 1 when the engine is dead."),
    _row("dtype", Literal["auto", "float32", "bfloat16"], "auto", _MODEL, "Numbers to compute with."),
    _row(
        "max_context",
        int,
        None,
        _MODEL,
        "Most tokens of a prompt and its answer.",
        "N",
        "the model's",
        least=2,
    ),
    _row("kv_memory", str, "512MiB", _MODEL, "Memory for keys and values, e.g. 4GiB.", "SIZE"),
    _row("kv_dtype", Literal["auto", "int8", "int4"], "auto", _MODEL, "Numbers of keys and values."),
    _row("prefill_chunk", int, None, _MODEL, "Prompt tokens per step.", "N", "fits", least=16),
    _row("no_prefix_cache", bool, False, _MODEL, "Compute every prompt anew."),
    _row("rope_scaling", Literal["yarn", "linear"], None, _MODEL, "Stretch the positions by --factor."),
    _row(
        "factor", float, None, _MODEL, "How many times to stretch them, 1 to 1024.", "X", least=1, most=1024
    ),
    _row(
        "speculate", int, 0, _MODEL, "Tokens to guess ahead; 0 is off, 4 with --draft.", "N", least=0, most=32
    ),
    _row("draft", str, None, _MODEL, "A smaller model with the same tokenizer that guesses.", "MODEL"),
    _row(
        "reasoning_field",
        Literal["reasoning_content", "reasoning", "none"],
        "reasoning_content",
        _MODEL,
        "Where thinking goes; none leaves it in the text.",
    ),
    _row("pooling", Literal["mean", "last"], "mean", _MODEL, "How embeddings are pooled."),
)
_LOADING = (
    "device", "dtype", "quant", "max_context", "kv_dtype", "prefill_chunk", "rope_scaling", "factor",
    "speculate", "draft",
)  # fmt: skip
_SERVING = (
    "host", "port", "max_queue", "max_running", "max_n", "reasoning_field", "pooling", "metrics_public",
    "log_requests", "allow_request_template", "exit_on_error", "unsafe_python", "max_sandboxes",
)  # fmt: skip


def build_serve() -> Callable[..., Any]:
    """The callback of `kllm serve`."""

    def command(**values: Any) -> int:
        """Serve models over HTTP: OpenAI's API, and a page to chat.

        Example: kllm serve runs/quickstart --port 8000
        """
        if (values["rope_scaling"] is None) != (values["factor"] is None):
            raise UserError(
                "--rope-scaling and --factor belong together", hint="--rope-scaling yarn --factor 4"
            )
        values = _checked(values)
        keys = api_keys(values["api_key"] or [], values["api_key_file"], os.environ.get("KLLM_API_KEY"))
        sizes = {name: _bytes(name, values[name]) for name in ("max_body", "kv_memory")}
        if sizes["max_body"] < _LEAST_BODY:
            raise UserError(f"must be at least 1KiB, got {values['max_body']!r}", where="flag --max-body")
        from kllm.serve.loading import LoadOptions
        from kllm.serve.main import serve
        from kllm.serve.middleware import digests
        from kllm.serve.settings import Settings
        from kllm.serve.sources import sources_of
        from kllm.serve.toolflags import open_tools

        options = LoadOptions(
            kv_memory=sizes["kv_memory"],
            prefix_cache=not values["no_prefix_cache"],
            **{name: values[name] for name in _LOADING},
        )
        settings = Settings(
            keys=digests(keys),
            cors=_words(values["cors"]),
            allowed_hosts=_words(values["allowed_hosts"]),
            max_body=sizes["max_body"],
            request_timeout=_seconds("request_timeout", values["request_timeout"]),
            queue_timeout=_seconds("queue_timeout", values["queue_timeout"]),
            drain=_seconds("drain", values["drain"]) or 0.0,
            tools=open_tools(values["tools"] or (), values["unsafe_python"]),
            **{name: values[name] for name in _SERVING},
        )
        return serve(
            sources_of(values["models"], values["adapter"] or ()),
            options,
            settings,
            say=lambda line: typer.echo(line, err=True),
            ready=lambda url: typer.echo(f"kllm serves on {url}"),
        )

    return with_signature(command, [extra_parameter(parameter) for parameter in _PARAMETERS])


def api_keys(given: Iterable[str], file: Path | None, environment: str | None) -> list[str]:
    """All keys; in the environment they stand apart by white space, in a file one a line.

    Raises:
        UserError: an unreadable or empty file, a key that no header can carry. No key is in the message.
    """
    keys = [("flag --api-key", key) for key in given]
    if file is not None:
        try:
            lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not a text file"
            raise UserError(f"cannot read it: {reason}", where=f"flag --api-key-file {file}") from None
        found = [line for line in lines if line and not line.startswith("#")]
        if not found:
            raise UserError("holds no key", where=f"flag --api-key-file {file}", hint="one key a line")
        keys += [(f"flag --api-key-file {file}", key) for key in found]
    keys += [("KLLM_API_KEY", key) for key in (environment or "").split()]
    for where, key in keys:
        if not key or not all("!" <= letter <= "~" for letter in key):
            raise UserError("a key is printable ASCII without spaces", where=where)
    return [key for _, key in keys]


def _words(values: list[str] | None) -> tuple[str, ...]:
    """`--cors a --cors b` and `--cors a,b` alike; a slash at the end is no part of an origin."""
    words = [word.strip().rstrip("/") for value in values or () for word in value.split(",")]
    return tuple(word for word in words if word)


def _bytes(name: str, text: str) -> int:
    from kllm.config.base import parse_bytes

    return int(_parsed(name, text, parse_bytes))


def _seconds(name: str, text: str | None) -> float | None:
    from kllm.config.base import parse_duration

    return None if text is None else float(_parsed(name, text, parse_duration))


def _parsed(name: str, text: str, parse: Callable[[Any], Any]) -> Any:
    where = _named(name)
    try:
        value = parse(text)
    except ValueError as error:
        raise UserError(str(error), where=where) from None
    if value < 0:
        raise UserError(f"must not be negative, is {text}", where=where)
    return value
