"""How a run looks: a live display on a terminal, plain lines in a pipe, JSON for scripts, or quiet.

Results go to stdout, everything else to stderr, so that `kllm eval ... > result.txt` keeps only the
result. No escape codes are ever written to a pipe. The display changes no bit of the training.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from kllm.observe.reporting import Curve, Reporter, Spans, cell_width, merged, one_line, pretty
from kllm.observe.sinks import clean
from kllm.observe.spark import ASCII_BARS, BARS, sparkline


class PlainReporter:
    """Lines without escape codes, for pipes, logs and dumb terminals."""

    def __init__(self, out: IO[str] | None = None, err: IO[str] | None = None) -> None:
        self.out = out or sys.stdout
        self.err = err or sys.stderr
        self._curve = Curve("")

    def _log(self, text: str) -> None:
        print(text, file=self.err, flush=True)

    def header(self, title: str, rows: Mapping[str, Any]) -> None:
        self._log(f"== {title}")
        width = max((len(k) for k in rows), default=0)
        for key, value in rows.items():
            self._log(f"   {key:<{width}}  {value}")

    def progress(self, stage: str, step: int, total: int, metrics: Mapping[str, Any]) -> None:
        if stage != self._curve.stage or step < self._curve.step:
            self._curve = Curve(stage)
        self._curve.observe(step, total, metrics)
        if metrics:
            share = f"{100 * step / total:.0f}%" if total else ""
            parts = [f"{stage} {self._curve.position()} {share}", *self._curve.fields(), self._curve.left()]
            self._log("  ".join(p for p in parts if p))

    def evaluation(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._log(f"step {step}  " + "  ".join(pretty(k, v) for k, v in metrics.items()))

    def sample(self, step: int, prompt: str, text: str) -> None:
        self._log(f"step {step} sample  {one_line(prompt)} -> {one_line(text)}")

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        cells = [[str(c) for c in columns], *[[str(c) for c in row] for row in rows]]
        widths = [max(cell_width(row[i]) for row in cells) for i in range(len(columns))]
        if title:
            print(title, file=self.out)
        for row in cells:
            padded = [c + " " * (w - cell_width(c)) for c, w in zip(row, widths, strict=True)]
            print("  ".join(padded).rstrip(), file=self.out, flush=True)

    def spans(self, title: str, spans: Spans) -> None:
        print(title, file=self.out)
        text = "".join(f"[{piece}]" if trained else piece for piece, trained in merged(spans))
        print(text + "\n(the model is trained on what stands in [ ])", file=self.out, flush=True)

    def message(self, text: str) -> None:
        self._log(text)

    def warn(self, text: str) -> None:
        self._log(f"warning: {text}")

    def done(self, text: str) -> None:
        print(text, file=self.out, flush=True)

    def close(self) -> None:
        self.out.flush()
        self.err.flush()


class QuietReporter(PlainReporter):
    """Only results, warnings and errors."""

    def _log(self, text: str) -> None:
        if text.startswith("warning: "):
            super()._log(text)

    def done(self, text: str) -> None:
        """Said by the exit code."""


class JsonReporter:
    """One JSON object a line on stdout for every call: `{"event": ..., ...}`."""

    def __init__(self, out: IO[str] | None = None) -> None:
        self.out = out or sys.stdout

    def _emit(self, event: str, **facts: Any) -> None:
        row = {"event": event, **facts}
        print(json.dumps(clean(row), ensure_ascii=False, default=str), file=self.out, flush=True)

    def header(self, title: str, rows: Mapping[str, Any]) -> None:
        self._emit("header", title=title, rows=dict(rows))

    def progress(self, stage: str, step: int, total: int, metrics: Mapping[str, Any]) -> None:
        if metrics:
            self._emit("progress", stage=stage, step=step, total=total, **metrics)

    def evaluation(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._emit("evaluation", step=step, **metrics)

    def sample(self, step: int, prompt: str, text: str) -> None:
        self._emit("sample", step=step, prompt=prompt, text=text)

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        self._emit("table", title=title, columns=list(columns), rows=[list(r) for r in rows])

    def spans(self, title: str, spans: Spans) -> None:
        pieces = [{"text": piece, "trained": trained} for piece, trained in merged(spans)]
        self._emit("spans", title=title, spans=pieces)

    def message(self, text: str) -> None:
        self._emit("message", text=text)

    def warn(self, text: str) -> None:
        self._emit("warning", text=text)

    def done(self, text: str) -> None:
        self._emit("done", text=text)

    def close(self) -> None:
        self.out.flush()


class RichReporter:
    """A live bar under scrolling news, for a terminal.

    Text from data and models is never read as markup. Without UTF-8 the curve is drawn in ASCII.
    """

    def __init__(self, out: Any = None, err: Any = None) -> None:
        from rich.console import Console

        # `out`, `err` are rich consoles; tests hand in their own
        self.out = out or Console(highlight=False, markup=False)
        self.err = err or Console(stderr=True, highlight=False, markup=False)
        self._curve = Curve("")
        self._live: Any = None

    def _bars(self) -> str:
        return BARS if "utf" in self.err.encoding.lower() else ASCII_BARS

    def _result(self, renderable: Any) -> None:
        """Prints to stdout without tearing the live display."""
        if self._live is not None and self.out.is_terminal:
            self._live.console.print(renderable)
        else:
            self.out.print(renderable, soft_wrap=not self.out.is_terminal)

    def header(self, title: str, rows: Mapping[str, Any]) -> None:
        from rich.panel import Panel
        from rich.table import Table
        from rich.text import Text

        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(overflow="fold")
        for key, value in rows.items():
            grid.add_row(Text(key), Text(str(value)))
        self._stop()
        self.err.print(
            Panel(
                grid, title=Text(title, style="bold"), title_align="left", border_style="cyan", expand=False
            )
        )

    def progress(self, stage: str, step: int, total: int, metrics: Mapping[str, Any]) -> None:
        if stage != self._curve.stage or step < self._curve.step:
            self._stop()
            self._curve = Curve(stage)
        self._curve.observe(step, total, metrics)
        if self._live is None:
            from rich.live import Live

            self._live = Live(
                console=self.err, get_renderable=self._render, refresh_per_second=4, redirect_stdout=False
            )
            self._live.start()
        if total and step >= total:
            self._stop()

    def _render(self) -> Any:
        """Two lines: where the run is, and its figures; what does not fit is left out from the end."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        curve = self._curve
        share = f"{100 * curve.step / curve.total:5.1f}%" if curve.total else ""
        bar = ProgressBar(total=max(curve.total, 1), completed=curve.step, width=None)
        top = Table.grid(padding=(0, 1), expand=True)
        for ratio in (None, 1, None, None, None):
            top.add_column(ratio=ratio, no_wrap=True)
        position = Text(curve.position())
        top.add_row(
            Text(curve.stage, style="bold cyan"), bar, position, Text(share), Text(curve.left(), style="cyan")
        )
        line = Text("  ", no_wrap=True, overflow="crop")
        for i, field in enumerate(curve.fields()):
            room = self.err.width - line.cell_len
            spark = sparkline(curve.losses, 16, self._bars()) if i == 0 and len(curve.losses) > 1 else ""
            if len(field) + len(spark) + 3 > room:
                break
            line.append(field, style="bold" if i == 0 else "")
            line.append(f" {spark}" if spark else "", style="green")
            line.append("   ")
        return Group(top, line)

    def _say(self, text: str, style: str = "") -> None:
        from rich.text import Text

        self.err.print(Text(text, style=style))

    def evaluation(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._say(f"step {step}  " + "  ".join(pretty(k, v) for k, v in metrics.items()), "green")

    def sample(self, step: int, prompt: str, text: str) -> None:
        from rich.text import Text

        self.err.print(Text.assemble((f"step {step}  ", "dim"), (prompt, "dim"), (f" {text}", "italic")))

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(title) if title else None, title_justify="left", box=box.SIMPLE_HEAD)
        for column in columns:
            table.add_column(Text(column), overflow="fold")
        for row in rows:
            table.add_row(*[Text(str(cell)) for cell in row])
        self._result(table)

    def spans(self, title: str, spans: Spans) -> None:
        from rich.text import Text

        pieces = [(piece, "bold green" if trained else "dim") for piece, trained in merged(spans)]
        self._result(Text(title, style="bold"))
        self._result(Text.assemble(*pieces))
        self._result(Text("(bright: what the model is trained on)", style="dim"))

    def message(self, text: str) -> None:
        self._say(text)

    def warn(self, text: str) -> None:
        self._say(f"warning: {text}", "yellow")

    def done(self, text: str) -> None:
        from rich.text import Text

        self._stop()
        self._result(Text(text, style="bold"))

    def _stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def close(self) -> None:
        self._stop()


class LoggedReporter:
    """Passes every call on and writes it to a log file as well (`log.txt` of a stage)."""

    def __init__(self, inner: Reporter, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.inner = inner
        self._file = path.open("a", encoding="utf-8")
        self._plain = PlainReporter(_Stamped(self._file), _Stamped(self._file))  # type: ignore[arg-type]

    def log_only(self, text: str) -> None:
        """A line for the file alone, for example a traceback."""
        self._plain.message(text)

    def __getattr__(self, name: str) -> Any:
        shown, written = getattr(self.inner, name), getattr(self._plain, name)

        def both(*args: Any, **kwargs: Any) -> None:
            shown(*args, **kwargs)
            if not self._file.closed:
                written(*args, **kwargs)

        return both

    def close(self) -> None:
        self.inner.close()
        self._file.close()


class _Stamped:
    """A text stream that puts the time before each line."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self._fresh = True

    def write(self, text: str) -> None:
        for line in text.splitlines(keepends=True):
            stamp = time.strftime("%H:%M:%S ") if self._fresh else ""
            self._file.write(stamp + line)
            self._fresh = line.endswith("\n")

    def flush(self) -> None:
        self._file.flush()


def make_reporter(mode: str | None = None) -> Reporter:
    """The display for `mode` ('rich', 'plain', 'json', 'quiet'); None chooses by the terminal.

    rich needs a terminal on stderr that understands cursor movement; NO_COLOR keeps the display
    and drops the colours.
    """
    if mode is None:
        smart = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        mode = "rich" if smart else "plain"
    if mode == "rich":
        return RichReporter()
    return {"plain": PlainReporter, "json": JsonReporter, "quiet": QuietReporter}[mode]()
