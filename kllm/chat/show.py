"""How answers look: markdown in a terminal, bare text in a pipe. A model cannot drive the terminal."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol, TextIO

from kllm.chat.conversation import Calling, Item, Note
from kllm.chat.markdown import last_lines, markdown, split_blocks
from kllm.chat.model import Called, Said, tokens_per_second
from kllm.errors import harmless
from kllm.tokenizer.parts import Part

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, ConsoleRenderable
    from rich.live import Live
    from rich.segment import Segment

_RESULT_LINES = 12
_FRAMES = 8  # a second; the model computes in this process


class Show(Protocol):
    """Where the items of one answer go."""

    def begin(self) -> None:
        """A question is on its way."""
        ...

    def item(self, item: Item) -> None:
        """Something came."""
        ...

    def end(self) -> None:
        """Nothing more comes."""
        ...


class PlainShow:
    """Bare text: the answer's words on `out`, everything else in lines on `aside`, nothing where it is None.

    Args:
        hold: words wait until it is clear that they are no code to be run, which goes aside.

    Attributes:
        text: the answer's words so far.
    """

    def __init__(self, out: TextIO, aside: TextIO | None = None, *, hold: bool = False) -> None:
        self._out, self._aside, self._hold = out, aside, hold
        self.text = self._held = ""

    def begin(self) -> None:
        """See `Show`."""
        self.text = ""

    def item(self, item: Item) -> None:
        """See `Show`."""
        if isinstance(item, Part) and item.kind == "content":
            if self._hold:
                self._held += harmless(item.text)
            else:
                self._write(harmless(item.text))
        elif isinstance(item, Calling) and self._held:
            self._line(self._held)
            self._held = ""
        elif isinstance(item, Called):
            self._break()
            mark = "!" if item.error else "->"
            self._line(f"[{item.name}] {one_line(shown_arguments(item))} {mark} {one_line(item.text)}")
        elif isinstance(item, Note):
            self._break()
            self._line(f"note: {item.text}")

    def end(self) -> None:
        """See `Show`."""
        if self._held:
            self._write(self._held)
            self._held = ""
        self._break()

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()
        self.text += text

    def _break(self) -> None:
        if self.text and not self.text.endswith("\n"):
            self._write("\n")

    def _line(self, text: str) -> None:
        if self._aside is not None:
            self._aside.write(harmless(text) + "\n")
            self._aside.flush()


class RichShow:
    """Markdown as it comes: finished blocks stand, the one being written is drawn anew.

    Thinking is dim and folds into one line; calls and their results stand in boxes.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.thought = ""
        """The thinking of the newest answer."""
        self._live: Live | None = None
        self._kind = ""
        self._tail = ""
        self._since = 0.0

    def begin(self) -> None:
        """See `Show`."""
        from rich.live import Live

        self.thought = self._tail = self._kind = ""
        self._live = Live(
            self._drawn(),
            console=self.console,
            refresh_per_second=_FRAMES,
            transient=True,
            get_renderable=self._drawn,
        )
        self._live.start()

    def item(self, item: Item) -> None:
        """See `Show`."""
        if isinstance(item, Part):
            if item.kind in ("reasoning", "content"):
                self._words(item.kind, harmless(item.text))
            return
        self._settle()
        if isinstance(item, Calling):
            self._kind, self._tail = "calling", f"{item.name} …"
        elif isinstance(item, Called):
            self._kind = self._tail = ""
            self.console.print(_box(item))
        elif isinstance(item, Note):
            self.console.print(harmless(item.text), style="dim", markup=False, highlight=False)

    def end(self) -> None:
        """See `Show`."""
        self._settle()
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _words(self, kind: str, text: str) -> None:
        if kind != self._kind:
            self._settle()
            self._kind, self._since = kind, time.monotonic()
            if kind == "reasoning":
                self.thought = ""
        if kind == "reasoning":
            self.thought += text
        self._tail += text
        if kind == "content" and "\n" in text:
            done, self._tail = split_blocks(self._tail)
            if done.strip():
                self.console.print(markdown(done))

    def _settle(self) -> None:
        """What was being drawn stands from now on."""
        kind, tail = self._kind, self._tail
        self._kind = self._tail = ""
        if kind == "content" and tail.strip():
            self.console.print(markdown(tail))
        elif kind == "reasoning":
            seconds = time.monotonic() - self._since
            words = f"thought for {seconds:.1f} s, {len(self.thought):,} characters (/show thinking)"
            self.console.print(words, style="dim italic", highlight=False)

    def _drawn(self) -> ConsoleRenderable:
        """What is being written now, as much of its end as the screen holds."""
        from rich.text import Text

        if self._kind == "content":
            height, width = self.console.height, self.console.width
            return _Bottom(markdown(last_lines(self._tail, height, width)))
        if self._kind == "reasoning":
            last = self._tail[-1000:].strip().rpartition("\n")[2]
            return Text(f"thinking … {last[-(self.console.width - 14) :]}", style="dim italic", no_wrap=True)
        return Text(self._tail if self._kind == "calling" else "", style="dim")


class _Bottom:
    """The last lines of something, as many as the screen holds."""

    def __init__(self, inner: ConsoleRenderable) -> None:
        self._inner = inner

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterable[Segment]:
        from rich.segment import Segment

        lines = console.render_lines(self._inner, pad=False)
        for line in lines[-max(1, console.height - 2) :]:
            yield from line
            yield Segment.line()


def _box(called: Called) -> ConsoleRenderable:
    from rich.box import ROUNDED
    from rich.console import Group
    from rich.panel import Panel
    from rich.syntax import Syntax
    from rich.text import Text

    arguments = harmless(shown_arguments(called))
    asked: ConsoleRenderable = Text(arguments)
    if called.name == "python":
        asked = Syntax(arguments, "python", theme="ansi_dark", background_color="default", word_wrap=True)
    lines = harmless(called.text).rstrip().splitlines()
    more = f"\n… {len(lines) - _RESULT_LINES} more lines" if len(lines) > _RESULT_LINES else ""
    result = Text("\n".join(lines[:_RESULT_LINES]) + more, style="red" if called.error else "green")
    where = " (server)" if called.there else ""
    return Panel(
        Group(*([] if called.told or not arguments.strip() else [asked]), result),
        title=Text(f"{harmless(called.name)}{where}"),  # as a str it would be markup
        title_align="left",
        subtitle=f"{called.seconds:.2f} s",
        subtitle_align="right",
        border_style="dim",
        box=ROUNDED,
        expand=False,
    )


def shown_arguments(called: Called) -> str:
    """A call's arguments for the eye: the only one's value, or `name=value` pairs."""
    try:
        given = json.loads(called.arguments)
    except (ValueError, RecursionError):
        return called.arguments
    if not isinstance(given, dict):
        return called.arguments
    texts = {
        name: one if isinstance(one, str) else json.dumps(one, ensure_ascii=False)
        for name, one in given.items()
    }
    if len(texts) == 1:
        return next(iter(texts.values()))
    return ", ".join(f"{name}={text}" for name, text in texts.items())


def one_line(text: str, width: int = 200) -> str:
    line = " ".join(harmless(text).split())
    return line if len(line) <= width else line[: width - 1] + "…"


def figures(said: list[Said]) -> str:
    """Tokens and speed of a turn's answers, for the line under it."""
    tokens = sum(one.completion_tokens for one in said)
    speed = tokens_per_second(said)
    words = [f"{tokens} token" + ("" if tokens == 1 else "s")]
    if speed is not None:
        words.append(f"{speed:.0f} tokens/s")
    if said:
        words.append(f"first after {said[0].prefill_s:.2f} s")
    return ", ".join(words)


def is_fancy(stream: TextIO, plain: bool) -> bool:
    """Whether colours and drawing may be used there."""
    return stream.isatty() and not plain and os.environ.get("TERM") != "dumb" and "NO_COLOR" not in os.environ


def show_for(*, plain: bool) -> Show:
    """How an interactive answer is shown on stdout; a file gets the bare words."""
    if not is_fancy(sys.stdout, plain):
        return PlainShow(sys.stdout, sys.stdout if sys.stdout.isatty() else sys.stderr)
    from rich.console import Console

    return RichShow(Console(file=sys.stdout))  # this one, also while tools have another
