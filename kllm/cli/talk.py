"""`kllm chat`: its sampling flags are the schema's `SamplingSection`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from kllm.cli import options
from kllm.errors import UserError

_TOOLS, _WHERE, _LOOK = "Tools and code", "Where the model is", "Conversation and terminal"


def _row(
    name: str, kind: Any, panel: str, text: str, metavar: str | None = None, *flags: str
) -> options.Extra:
    """An option; its name gives the flag where none is given."""
    names = flags or ("--" + name.replace("_", "-"),)
    option = typer.Option(*names, metavar=metavar, help=text, rich_help_panel=panel)
    default = {bool: False, str: "auto"}.get(kind)
    return name, Annotated[kind, option], default


_MODEL = typer.Argument(
    help="Run, stage, checkpoint, Hugging Face folder, GGUF or hub id; or a server's URL; with --base-url "
    "the model's name there.",
    metavar="MODEL|URL",
    show_default=False,
)
_TEXT = str | None
_EXTRAS: list[options.Extra] = [
    ("model", Annotated[_TEXT, _MODEL], None),
    _row("base_url", _TEXT, _WHERE, "An OpenAI-compatible server.", "URL"),
    _row(
        "api_key_file",
        Path | None,
        _WHERE,
        "File with the server's key; else KLLM_API_KEY, or for https OPENAI_API_KEY.",
        "FILE",
    ),
    _row("adapter", _TEXT, _WHERE, "A LoRA on it: PEFT folder, LoRA run or hub id.", "DIR"),
    _row("device", str, _WHERE, "auto, cpu, cuda, cuda:1, mps.", "NAME"),
    _row("raw", bool, _WHERE, "No chat turns: the model goes on with the text."),
    _row(
        "tools",
        list[str] | None,
        _TOOLS,
        "What it may call: calculator, clock, python, module:function, file.py:function.",
        "A,B",
    ),
    _row("codeact", bool, _TOOLS, "It acts by writing Python, run in a sandbox; tools are functions there."),
    _row(
        "unsafe_python",
        bool,
        _TOOLS,
        "Run its Python WITHOUT a sandbox: it may do whatever you may. Where none can be had.",
    ),
    _row("system", _TEXT, _LOOK, "System prompt.", "TEXT"),
    _row(
        "thinking",
        bool | None,
        _LOOK,
        "Think first, where its template knows the switch.",
        None,
        "--think/--no-think",
    ),
    _row(
        "prompt",
        _TEXT,
        _LOOK,
        "Answer this and leave. Text on stdin is added to it (< /dev/null adds none), or is the question.",
        "TEXT",
        "--prompt",
        "-p",
    ),
    _row("json", bool, _LOOK, "The answer to --prompt as JSON, with calls, usage and timings."),
    _row("load", _TEXT, _LOOK, "Go on with a conversation of /save.", "FILE"),
    _row("context_shift", bool, _LOOK, "When the context is full, forget the oldest turns and say so."),
    _row("plain", bool, _LOOK, "No markdown, no colours."),
    _row("no_history", bool, _LOOK, "Keep nothing of what is typed."),
]


def build_chat() -> Callable[..., Any]:
    """The callback of `kllm chat`."""
    flags = options.section_flags("SamplingSection", "Sampling")

    def command(**values: Any) -> int:
        return _chat(flags, values)

    parameters = [options.extra_parameter(extra) for extra in _EXTRAS]
    parameters += options.flag_parameters(flags)
    command.__doc__ = (
        "Talk to a model, here or at an OpenAI-compatible address. It remembers the conversation; Ctrl-C "
        "stops an answer, /help lists commands. In a pipe: one answer, plain. What is not given "
        "below, the model's generation_config.json or the server decides.\n\n"
        "Example: kllm chat runs/quickstart --tools calculator"
    )
    return options.with_signature(command, parameters)


def sampling_of(flags: list[options.Flag], values: dict[str, Any]) -> dict[str, Any]:
    """The sampling options that were given, checked.

    Raises:
        UserErrors: values outside their ranges, each with its flag.
    """
    from pydantic import ValidationError

    from kllm.config.explain import message_of
    from kllm.config.parts import SamplingSection
    from kllm.errors import UserErrors

    given = {override.key: override.value for override in options.overrides_of(flags, values)}
    try:
        return SamplingSection.model_validate(given).model_dump(include=set(given))
    except ValidationError as failure:
        names = {flag.key: flag.name for flag in flags}
        raise UserErrors(
            [
                UserError(message_of(error, error["loc"], given), where=f"flag {names[str(error['loc'][0])]}")
                for error in failure.errors()
            ]
        ) from None


def key_of(file: Path | None, url: str | None) -> str | None:
    """The key for a server: the file's first word, or the environment's.

    Raises:
        UserError: the file cannot be read, or is empty.
    """
    if file is None:
        # OpenAI's key is not for whoever stands at an address without TLS
        openai = os.environ.get("OPENAI_API_KEY") if (url or "").lower().startswith("https://") else None
        words = (os.environ.get("KLLM_API_KEY") or openai or "").split()
        return words[0] if words else None
    where = f"flag --api-key-file {file}"
    try:
        words = file.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read it: {getattr(error, 'strerror', error)}", where=where) from None
    if not words:
        raise UserError("holds no key", where=where)
    return words[0]


def _chat(flags: list[options.Flag], values: dict[str, Any]) -> int:
    sampling = sampling_of(flags, values)
    from kllm.chat.start import ChatOptions, run_chat

    own = ("model", "base_url", "adapter", "device", "raw", "codeact", "unsafe_python", "system", "thinking")
    return run_chat(
        ChatOptions(
            **{name: values[name] for name in (*own, "prompt", "plain", "load", "context_shift")},
            api_key=key_of(values["api_key_file"], values["base_url"] or values["model"]),
            sampling=sampling,
            tools=tuple(values["tools"] or ()),
            json_output=values["json"],
            keep_history=not values["no_history"],
        )
    )
