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


def build_chat() -> Callable[..., Any]:
    """The callback of `kllm chat`."""
    flags = options.section_flags("SamplingSection", "Sampling")

    def command(**values: Any) -> int:
        return _chat(flags, values)

    parameters = [options.extra_parameter(extra) for extra in _extras()]
    parameters += options.flag_parameters(flags)
    command.__doc__ = (
        "Talk to a model, here or at an OpenAI-compatible address. It remembers the conversation; Ctrl-C "
        "stops an answer, /help lists commands. In a pipe: one answer, plain. At an address, what is not "
        "given below is the server's affair.\n\n"
        "Example: kllm chat runs/quickstart --tools calculator"
    )
    return options.with_signature(command, parameters)


def _flag(text: str, panel: str, *names: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, metavar=metavar, help=text, rich_help_panel=panel)


def _extras() -> list[options.Extra]:
    what = typer.Argument(
        help="Run, stage, checkpoint, Hugging Face folder, GGUF or hub id; or the URL of a server; with "
        "--base-url the model's name there.",
        metavar="MODEL|URL",
        show_default=False,
    )
    text, yes = str | None, bool
    return [
        ("model", Annotated[text, what], None),
        (
            "base_url",
            Annotated[text, _flag("An OpenAI-compatible server.", _WHERE, "--base-url", metavar="URL")],
            None,
        ),
        (
            "api_key_file",
            Annotated[
                Path | None,
                _flag(
                    "File with the server's key; else KLLM_API_KEY or OPENAI_API_KEY.",
                    _WHERE,
                    "--api-key-file",
                    metavar="FILE",
                ),
            ],
            None,
        ),
        (
            "adapter",
            Annotated[
                text,
                _flag("A LoRA on it: PEFT folder, LoRA run or hub id.", _WHERE, "--adapter", metavar="DIR"),
            ],
            None,
        ),
        (
            "device",
            Annotated[str, _flag("auto, cpu, cuda, cuda:1, mps.", _WHERE, "--device", metavar="NAME")],
            "auto",
        ),
        (
            "raw",
            Annotated[yes, _flag("No chat turns: the model goes on with the text.", _WHERE, "--raw")],
            False,
        ),
        (
            "tools",
            Annotated[
                list[str] | None,
                _flag(
                    "What it may call: calculator, clock, python, module:function, file.py:function.",
                    _TOOLS,
                    "--tools",
                    metavar="A,B",
                ),
            ],
            None,
        ),
        (
            "codeact",
            Annotated[
                yes,
                _flag(
                    "It acts by writing Python, run in a sandbox; tools are functions there.",
                    _TOOLS,
                    "--codeact",
                ),
            ],
            False,
        ),
        (
            "unsafe_python",
            Annotated[
                yes,
                _flag(
                    "Run its Python WITHOUT a sandbox: it may do whatever you may. Where none can be had.",
                    _TOOLS,
                    "--unsafe-python",
                ),
            ],
            False,
        ),
        ("system", Annotated[text, _flag("System prompt.", _LOOK, "--system", metavar="TEXT")], None),
        (
            "thinking",
            Annotated[
                bool | None,
                _flag("Think first, where its template knows the switch.", _LOOK, "--think/--no-think"),
            ],
            None,
        ),
        (
            "prompt",
            Annotated[
                text,
                _flag(
                    "Answer this and leave; so does text on stdin.", _LOOK, "--prompt", "-p", metavar="TEXT"
                ),
            ],
            None,
        ),
        (
            "json",
            Annotated[
                yes, _flag("The answer to --prompt as JSON, with calls, usage and timings.", _LOOK, "--json")
            ],
            False,
        ),
        (
            "load",
            Annotated[text, _flag("Go on with a conversation of /save.", _LOOK, "--load", metavar="FILE")],
            None,
        ),
        (
            "context_shift",
            Annotated[
                yes,
                _flag(
                    "When the context is full, forget the oldest turns and say so.", _LOOK, "--context-shift"
                ),
            ],
            False,
        ),
        ("plain", Annotated[yes, _flag("No markdown, no colours.", _LOOK, "--plain")], False),
        ("no_history", Annotated[yes, _flag("Keep nothing of what is typed.", _LOOK, "--no-history")], False),
    ]


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


def key_of(file: Path | None) -> str | None:
    """The key for a server: the file's first word, or the environment's.

    Raises:
        UserError: the file cannot be read, or is empty.
    """
    if file is None:
        words = (os.environ.get("KLLM_API_KEY") or os.environ.get("OPENAI_API_KEY") or "").split()
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
            api_key=key_of(values["api_key_file"]),
            sampling=sampling,
            tools=tuple(values["tools"] or ()),
            json_output=values["json"],
            keep_history=not values["no_history"],
        )
    )
