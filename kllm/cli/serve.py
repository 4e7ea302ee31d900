"""`kllm serve`: the flags of the server."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from kllm.cli.options import EVERYDAY, extra_parameter, with_signature
from kllm.errors import UserError

_ACCESS, _LIMITS, _MODEL = "Access", "Limits", "Model and memory"
_Texts = list[str] | None

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
    **limits: Any,
) -> tuple[str, Any, Any]:
    """A parameter: the flag --name, with choices and default on the help page."""
    if get_origin(kind) is Literal:
        metavar = "|".join(get_args(kind))
    if shown is None and default not in (None, False):
        shown = str(default)
    flag = "--" + name.replace("_", "-")
    option = typer.Option(
        flag, metavar=metavar, help=help, rich_help_panel=panel, show_default=shown or False, **limits
    )
    optional = kind if kind is bool or default is not None else kind | None
    return name, Annotated[optional, option], default


_PARAMETERS: tuple[tuple[str, Any, Any], ...] = (
    ("models", _MODELS, inspect.Parameter.empty),
    _row("host", str, "127.0.0.1", EVERYDAY, "Where to listen.", "ADDRESS"),
    _row("port", int, 8000, EVERYDAY, "0 takes a free one.", "N", min=0, max=65535),
    _row(
        "adapter", _Texts, None, EVERYDAY, "The first model with this LoRA, under a name; repeat.", "NAME=DIR"
    ),
    _row("device", str, "auto", EVERYDAY, "auto, cpu, cuda, cuda:1, mps.", "NAME"),
    _row("quant", Literal["none", "int8", "int4"], "none", EVERYDAY, "Weights in fewer bits."),
    _row("api_key", _Texts, None, _ACCESS, "Ask for this key; repeat. Others see it in `ps`.", "KEY"),
    _row("api_key_file", Path, None, _ACCESS, "Keys, one a line. KLLM_API_KEY holds them too.", "FILE"),
    _row("cors", _Texts, None, _ACCESS, "Web pages that may call; repeat. * is all.", "ORIGIN"),
    _row("allowed_hosts", _Texts, None, _ACCESS, "Names this server goes by; repeat.", "NAME"),
    _row("metrics_public", bool, False, _ACCESS, "/metrics needs no key."),
    _row("log_requests", bool, False, _ACCESS, "Prompts go to the log."),
    _row("allow_request_template", bool, False, _ACCESS, "A request may bring its chat template."),
    _row("max_running", int, 64, _LIMITS, "Answers at once.", "N", min=1),
    _row("max_queue", int, 256, _LIMITS, "Waiting ones; beyond it 429.", "N", min=0),
    _row("max_n", int, 16, _LIMITS, "Choices of one request.", "N", min=1),
    _row("max_body", str, "2MiB", _LIMITS, "Largest request.", "SIZE"),
    _row("request_timeout", str, None, _LIMITS, "For a whole answer.", "TIME", "none"),
    _row("queue_timeout", str, None, _LIMITS, "For waiting.", "TIME", "none"),
    _row("drain", str, "30s", _LIMITS, "For what runs, after SIGTERM.", "TIME"),
    _row("exit_on_error", bool, False, _LIMITS, "Exit 1 when the engine is dead."),
    _row("dtype", Literal["auto", "float32", "bfloat16"], "auto", _MODEL, "Numbers to compute with."),
    _row("max_context", int, None, _MODEL, "Tokens of a request.", "N", "the model's", min=2),
    _row("kv_memory", str, "512MiB", _MODEL, "For keys and values.", "SIZE"),
    _row("kv_dtype", Literal["auto", "int8", "int4"], "auto", _MODEL, "Of keys and values."),
    _row("prefill_chunk", int, None, _MODEL, "Prompt tokens per step.", "N", "fits", min=16),
    _row("no_prefix_cache", bool, False, _MODEL, "Compute every prompt anew."),
    _row("rope_scaling", Literal["yarn", "linear"], None, _MODEL, "Stretch the positions by --factor."),
    _row("factor", float, None, _MODEL, "How far to stretch.", "X", min=1),
    _row("speculate", int, 0, _MODEL, "Tokens to guess ahead; 0 is off.", "N", min=0, max=32),
    _row("draft", str, None, _MODEL, "A smaller model that guesses.", "MODEL"),
    _row(
        "reasoning_field",
        Literal["reasoning_content", "reasoning", "none"],
        "reasoning_content",
        _MODEL,
        "Where thinking goes; none leaves it in the text.",
    ),
    _row("pooling", Literal["mean", "last"], "mean", _MODEL, "Of embeddings."),
)
_LOADING = (
    "device", "dtype", "quant", "max_context", "kv_dtype", "prefill_chunk", "rope_scaling", "factor",
    "speculate", "draft",
)  # fmt: skip
_SERVING = (
    "host", "port", "max_queue", "max_running", "max_n", "reasoning_field", "pooling", "metrics_public",
    "log_requests", "allow_request_template", "exit_on_error",
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
        keys = api_keys(values["api_key"] or [], values["api_key_file"], os.environ.get("KLLM_API_KEY"))
        sizes = {name: _bytes(name, values[name]) for name in ("max_body", "kv_memory")}
        from kllm.serve.loading import LoadOptions, sources_of
        from kllm.serve.main import serve
        from kllm.serve.middleware import digests
        from kllm.serve.settings import Settings

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
    where = f"flag --{name.replace('_', '-')}"
    try:
        value = parse(text)
    except ValueError as error:
        raise UserError(str(error), where=where) from None
    if value < 0:
        raise UserError(f"must not be negative, is {text}", where=where)
    return value
