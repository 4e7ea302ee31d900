"""From what the command line says to a conversation: which model, which tools, for whom."""

from __future__ import annotations

import io
import re
import signal
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kllm.chat.conversation import Conversation
from kllm.chat.model import ChatModel, Settings
from kllm.errors import Interrupted, KllmError, UserError, harmless

_SCHEMES = ("http://", "https://")
_ADDRESS = re.compile(r"[\w.-]+:\d{2,5}(/.*)?")


@dataclass(frozen=True)
class ChatOptions:
    """See the flags of `kllm chat`; `sampling` has those that were given."""

    model: str | None = None
    base_url: str | None = None
    api_key: str | None = field(default=None, repr=False)
    adapter: str | None = None
    device: str = "auto"
    raw: bool = False
    system: str | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    thinking: bool | None = None
    tools: tuple[str, ...] = ()
    codeact: bool = False
    unsafe_python: bool = False
    context_shift: bool = False
    prompt: str | None = None
    json_output: bool = False
    plain: bool = False
    keep_history: bool = True
    load: str | None = None

    @property
    def url(self) -> str | None:
        """Where the model is, if it is not here."""
        if self.base_url is not None:
            return self.base_url
        return self.model if self.model and self.model.lower().startswith(_SCHEMES) else None


def run_chat(options: ChatOptions) -> int:
    """Talks, or answers once if there is a prompt or stdin is not a terminal. Returns the exit code.

    Raises:
        UserError: no model, nothing to answer, options that exclude each other.
        KllmError: nobody answers at the address.
    """
    interactive = sys.stdin is not None and sys.stdin.isatty()
    check(options)
    _prepare_streams()
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
            signal.signal(number, _leave)  # or a sandbox would stay behind
    if options.json_output and options.prompt is None and interactive:
        raise UserError("needs a question", where="--json", hint="give --prompt, or text on stdin")
    if options.prompt is None and interactive:
        from kllm.chat.repl import talk

        chat = open_chat(options)
        try:
            return talk(
                chat,
                lambda name: open_model(options, name),
                plain=options.plain,
                keep_history=options.keep_history,
            )
        finally:
            chat.close()
    from kllm.chat.oneshot import answer_once, question_of

    question = question_of(options.prompt, interactive=interactive)
    chat = open_chat(options)
    try:
        return answer_once(chat, question, json_output=options.json_output)
    finally:
        chat.close()


def check(options: ChatOptions) -> None:
    """What is wrong whatever the model.

    Raises:
        UserError: the first mistake.
    """
    if options.url is None and not options.model:
        raise UserError(
            "needs a model", where="MODEL", hint="kllm chat runs/NAME, or kllm chat http://HOST:PORT"
        )
    if (
        options.url is None
        and _ADDRESS.fullmatch(options.model or "")
        and not Path(options.model or "").exists()
    ):
        raise UserError(
            f"no model is at {options.model}", where="MODEL", hint="an address begins with http://"
        )
    if options.url is not None:
        here = {"--adapter": options.adapter, "--raw": options.raw}
        for flag, given in here.items():
            if given:
                raise UserError("is for a model that is here, not at an address", where=f"flag {flag}")
    if options.raw and (options.tools or options.codeact or options.system):
        raise UserError("has no turns, so no tools, code or system prompt", where="flag --raw")
    if options.unsafe_python and not options.codeact and "python" not in options.tools:
        hint = "it is for --tools python and --codeact"
        raise UserError("there is no Python to run", where="flag --unsafe-python", hint=hint)


def open_chat(options: ChatOptions) -> Conversation:
    """The conversation, ready: tools are looked for first, since a model takes longer.

    Raises:
        UserError: see `find_tools`, `Toolbox`, `load_local`, `RemoteModel`.
    """
    from kllm.tools.registry import Toolbox, find_tools

    tools = find_tools(options.tools)
    box = None
    if tools or options.codeact:
        box = Toolbox(tools, code=options.codeact, unsafe_python=options.unsafe_python)
    model = open_model(options)
    chat = Conversation(
        model,
        system=options.system,
        settings=Settings(options.sampling, options.thinking),
        box=box,
        code=options.codeact,
        shift=options.context_shift,
    )
    if options.load is not None:
        _load(chat, options)
    if chat.tools and not model.shows(chat.tools):
        _say("its chat template shows it no tools: it will not call any")
    return chat


def _load(chat: Conversation, options: ChatOptions) -> None:
    """The conversation of --load; what the command line says goes before what the file says."""
    from kllm.chat.saved import load, path_of

    for note in load(chat, path_of(options.load or "")):
        _say(note)
    thinking = chat.settings.thinking if options.thinking is None else options.thinking
    chat.settings = Settings({**chat.settings.sampling, **options.sampling}, thinking)
    chat.system = options.system or chat.system


def open_model(options: ChatOptions, name: str | None = None) -> ChatModel:
    """The model of the options, or another one of this `name` at the same place."""
    if options.url is not None and not (name and name.startswith(_SCHEMES)):
        from kllm.chat.remote import RemoteModel

        own = options.model if options.base_url is not None else None
        return RemoteModel(options.url, key=options.api_key, model=name or own)
    if name and name.startswith(_SCHEMES):
        from kllm.chat.remote import RemoteModel

        return RemoteModel(name, key=options.api_key)
    from kllm.chat.local import load_local

    path = name or options.model
    assert path is not None  # `check` saw to it
    return load_local(
        path,
        adapter=None if name else options.adapter,
        device=options.device,
        raw=options.raw,
        say=_say,
    )


def _say(line: str) -> None:
    sys.stderr.write(f"note: {harmless(line)}\n")


def _leave(number: int, frame: object) -> None:
    raise Interrupted(number, "terminated")


def _prepare_streams() -> None:
    """A character that stdout's encoding has not is a question mark, not the end.

    Raises:
        KllmError: there is no stdout.
    """
    if sys.stdout is None:
        raise KllmError("there is nowhere to write the answer to", where="standard output")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
