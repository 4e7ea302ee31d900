"""report.md and report.html of a run: its stages, curves and results, from the files it left."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

from kllm.config.recipe import Recipe
from kllm.files import write_text
from kllm.observe import units
from kllm.observe.plots import loss_line
from kllm.run.listing import describe
from kllm.run.results import sample_answers, tables
from kllm.run.rundir import RunDir, read_json

Block = tuple[str, Any]
"""('title' | 'text' | 'code', str), ('table', [header, *rows]) or ('image', path inside the run)."""


def write_report(run: RunDir, recipe: Recipe) -> None:
    """Writes report.md and report.html into the run folder; the HTML links the plots beside it."""
    blocks = build(run, recipe)
    write_text(run.path / "report.md", markdown(blocks))
    write_text(run.path / "report.html", page(recipe.name, blocks))


def build(run: RunDir, recipe: Recipe) -> list[Block]:
    """The report as blocks."""
    facts, about = read_json(run.path / "run.json"), describe(run.path)
    versions = ", ".join(f"{k} {v}" for k, v in facts.get("versions", {}).items())
    machine = f"on {facts.get('host', '')} ({facts.get('cpus')} CPU cores)"
    blocks: list[Block] = [
        ("title", f"{recipe.name}: {about['state']}"),
        ("text", f"{facts.get('updated', '')}, {machine}; {versions}"),
        ("code", str(facts.get("command", ""))),
        (
            "table",
            [("stage", "kind", "state", "time", "tokens", "loss"), *[_row(run, s) for s in about["stages"]]],
        ),
    ]
    for stage in about["stages"]:
        blocks += _stage(run, stage)
    return blocks


def _row(run: RunDir, stage: dict[str, Any]) -> tuple[str, ...]:
    status = run.status(stage["dir"])
    loss = stage["loss"]
    return (
        stage["name"],
        stage["kind"],
        stage["state"],
        units.duration(stage["seconds"]) if stage["seconds"] else "",
        units.count(status["tokens"]) if isinstance(status.get("tokens"), int) else "",
        f"{loss:.4f}" if loss is not None else "",
    )


def _stage(run: RunDir, stage: dict[str, Any]) -> list[Block]:
    directory, status = run.path / stage["dir"], run.status(stage["dir"])
    blocks: list[Block] = []
    said = paragraph(stage, status)
    if said:
        blocks.append(("text", said))
    if line := loss_line(directory / "metrics.jsonl"):
        blocks.append(("code", line))
    for table in [*tables(stage["result"]), *sample_answers(stage["result"])]:
        blocks += [("text", table.title)] if table.title else []
        blocks.append(("table", [table.columns, *table.rows]))
    blocks += [("image", f"{stage['dir']}/plots/{p.name}") for p in _plots(directory)]
    return [("title", stage["name"]), *blocks] if blocks else []


def paragraph(stage: dict[str, Any], status: dict[str, Any]) -> str:
    """A stage in a sentence or two."""
    if status.get("error"):
        return f"The stage {stage['state']}: {status['error']}"
    if stage["state"] != "done":
        return ""
    took = units.duration(stage["seconds"])
    if not status.get("tokens"):
        return f"Took {took}."
    data: dict[str, Any] = status.get("data") or {}
    docs = f" from {data['docs']:,} documents" if data.get("docs") else ""
    said = f"A model of {status.get('parameters', 0):,} parameters saw {status['tokens']:,} tokens{docs} "
    said += f"in {status.get('steps', 0):,} steps and {took} on {status.get('device')}."
    bad = data.get("bad_rows")
    return said + (f" {bad:,} bad rows were left out." if bad else "")


def _plots(directory: Path) -> list[Path]:
    found = sorted((directory / "plots").glob("*.png"))
    return sorted(found, key=lambda p: p.name != "loss.png")


def markdown(blocks: list[Block]) -> str:
    """Blocks as Markdown."""
    lines: list[str] = []
    for i, (kind, value) in enumerate(blocks):
        if kind == "title":
            lines += [f"{'#' if i == 0 else '##'} {value}", ""]
        elif kind == "text":
            lines += [value, ""]
        elif kind == "code":
            lines += ["```", value, "```", ""]
        elif kind == "image":
            lines += [f"![{Path(value).stem}]({value})", ""]
        else:
            cells = [[_cell(c) for c in row] for row in value]
            lines += ["| " + " | ".join(cells[0]) + " |", "|" + " --- |" * len(cells[0])]
            lines += ["| " + " | ".join(row) + " |" for row in cells[1:]] + [""]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    return " ".join(str(value).replace("|", "\\|").split())


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
body { color: #222; background: #fff; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { text-align: left; padding: .25rem .75rem; border-bottom: 1px solid #ddd; }
pre { background: #f4f4f4; padding: .6rem; overflow-x: auto; }
img { max-width: 100%; }
@media (prefers-color-scheme: dark) {
  body { color: #ddd; background: #181818; } pre { background: #222; } th, td { border-color: #444; }
}
"""


def page(title: str, blocks: list[Block]) -> str:
    """Blocks as one HTML page without scripts or outside resources."""
    parts = []
    for i, (kind, value) in enumerate(blocks):
        if kind == "title":
            tag = "h1" if i == 0 else "h2"
            parts.append(f"<{tag}>{html.escape(value)}</{tag}>")
        elif kind == "text":
            parts.append(f"<p>{html.escape(value)}</p>")
        elif kind == "code":
            parts.append(f"<pre>{html.escape(value)}</pre>")
        elif kind == "image":
            parts.append(f'<p><img src="{html.escape(value)}" alt="{html.escape(Path(value).stem)}"></p>')
        else:
            head = "".join(f"<th>{html.escape(str(c))}</th>" for c in value[0])
            body = "".join(
                "<tr>" + "".join(f"<td>{html.escape(str(c))}</td>" for c in row) + "</tr>"
                for row in value[1:]
            )
            parts.append(f"<table><tr>{head}</tr>{body}</table>")
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    return f"<!doctype html>\n<html><head>{head}</head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"
