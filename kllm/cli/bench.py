"""`kllm bench generate`, `serve`, `train`: how fast, and whether it stays right under load."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any, Literal

import typer

from kllm.cli.gguf import split_list
from kllm.cli.options import extra_parameter, with_signature
from kllm.errors import UserError

_JSON = Annotated[bool, typer.Option("--json", help="JSON on stdout, for scripts.")]
_MODEL = Annotated[
    str | None,
    typer.Argument(metavar="[MODEL]", help="Run, stage, checkpoint, folder, .pth, .gguf or hub id."),
]
_LIST = "separated by commas"


def _flag(help: str, metavar: str | None = None, *names: str) -> Any:
    return typer.Option(*names, metavar=metavar, help=help)


_GENERATE: tuple[tuple[str, Any, Any], ...] = (
    ("model", _MODEL, None),
    ("preset", Annotated[str | None, _flag("Random weights of this shape instead of MODEL.", "NAME")], None),
    ("streams", Annotated[str, _flag(f"Answers at once, {_LIST}. [default: 1,16]", "N,...")], "1,16"),
    ("prompt_tokens", Annotated[int, _flag("Tokens of each prompt. [default: 8]", "N")], 8),
    ("new_tokens", Annotated[int, _flag("Tokens of each answer. [default: 48]", "N")], 48),
    ("rounds", Annotated[int, _flag("Turns of each, after a warm-up. [default: 5]", "N")], 5),
    (
        "weights",
        Annotated[str, _flag(f"Ours in fp32, int8, int4, {_LIST}. [default: fp32,int8]", "KIND,...")],
        "fp32,int8",
    ),
    ("threads", Annotated[int, _flag("Threads of every engine. [default: 1]", "N")], 1),
    (
        "peers",
        Annotated[
            str,
            _flag(f"Others, {_LIST}, or none. [default: transformers,llama.cpp]", "NAME,..."),
        ],
        "transformers,llama.cpp",
    ),
    (
        "shared",
        Annotated[bool, _flag("Also 16 samples of one 64-token prompt.", None, "--shared/--no-shared")],
        True,
    ),
    (
        "perplexity",
        Annotated[bool, _flag("Also what int8, int4 cost in it.", None, "--perplexity/--no-perplexity")],
        True,
    ),
    (
        "text",
        Annotated[str | None, _flag("Texts for that. [default: builtin:world/pretrain]", "FILE")],
        None,
    ),
    ("as_json", _JSON, False),
)


def build_generate() -> Callable[..., Any]:
    """The callback of `kllm bench generate`."""

    def command(**values: Any) -> int:
        """Time generation beside transformers and llama.cpp: same weights and prompts, taking turns.

        Example: kllm bench generate --preset k-small --weights fp32,int8,int4
        """
        from kllm.run.bench_generate import GenerateBench, bench_generate

        as_json, peers = values.pop("as_json"), values.pop("peers")
        lists = {
            "streams": _numbers("--streams", values.pop("streams")),
            "weights": split_list([values.pop("weights")]),
            "peers": () if peers == "none" else split_list([peers]),
        }
        report = bench_generate(GenerateBench(**{**values, **lists}), _say)
        if as_json:
            typer.echo(json.dumps(report, ensure_ascii=False))
        else:
            print_generate(report)
        return 0

    return with_signature(command, [extra_parameter(parameter) for parameter in _GENERATE])


_SERVE: tuple[tuple[str, Any, Any], ...] = (
    ("model", _MODEL, None),
    ("url", Annotated[str | None, _flag("A server that runs, instead of MODEL.", "URL")], None),
    ("key", Annotated[str | None, _flag("Its key.", "KEY", "--api-key")], None),
    ("name", Annotated[str | None, _flag("The model's name there. [default: the first]", "NAME")], None),
    (
        "endpoint",
        Annotated[
            Literal["completions", "chat"], _flag("What is asked. [default: completions]", "completions|chat")
        ],
        "completions",
    ),
    ("streams", Annotated[int, _flag("Readers at once. [default: 16]", "N")], 16),
    ("seconds", Annotated[float, _flag("How long. [default: 30]", "S")], 30.0),
    ("cases", Annotated[int, _flag("Different requests. [default: 24]", "N")], 24),
    ("min_tokens", Annotated[int, _flag("Shortest answer. [default: 4]", "N")], 4),
    ("max_tokens", Annotated[int, _flag("Longest answer. [default: 160]", "N")], 160),
    ("disconnect", Annotated[float, _flag("Readers who leave in the middle. [default: 0.1]", "SHARE")], 0.1),
    ("stall", Annotated[float, _flag("Readers who stop reading for 3 s. [default: 0.05]", "SHARE")], 0.05),
    ("patience", Annotated[float, _flag("Seconds without a byte: starved. [default: 60]", "S")], 60.0),
    ("ignore_eos", Annotated[bool, _flag("Answers of full length.", None, "--ignore-eos")], False),
    (
        "option",
        Annotated[list[str] | None, _flag("A further word for `kllm serve`; may be repeated.", "WORD")],
        None,
    ),
    ("seed", Annotated[int, _flag("Of the requests and the readers.", "N")], 0),
    ("as_json", _JSON, False),
)


def build_serve() -> Callable[..., Any]:
    """The callback of `kllm bench serve`."""

    def command(**values: Any) -> int:
        """Load a server with ragged streams; every one must say what the server says alone. Exit 1 if not.

        Example: kllm bench serve runs/quickstart --streams 64 --seconds 60
        """
        from kllm.run.bench_serve import ServeBench, bench_serve

        as_json, words = values.pop("as_json"), values.pop("option", None)
        report = bench_serve(ServeBench(options=tuple(words or ()), **values), _say)
        if as_json:
            typer.echo(json.dumps(report, ensure_ascii=False))
        else:
            print_serve(report)
        return 0 if report["ok"] else 1

    return with_signature(command, [extra_parameter(parameter) for parameter in _SERVE])


_TRAIN: tuple[tuple[str, Any, Any], ...] = (
    (
        "objective",
        Annotated[
            Literal["dpo", "lora"],
            _flag("dpo beside padding and a live reference; lora beside training all weights.", "dpo|lora"),
        ],
        ...,
    ),
    ("preset", Annotated[str, _flag("Random weights of this shape. [default: k-small]", "NAME")], "k-small"),
    ("pairs", Annotated[int, _flag("Pairs in a step of dpo. [default: 4]", "N")], 4),
    ("max_len", Annotated[int, _flag("What the naive way pads to. [default: 1024]", "N")], 1024),
    ("tokens", Annotated[int, _flag("Tokens in a step of lora. [default: 1024]", "N")], 1024),
    ("rank", Annotated[int, _flag("Of the adapter. [default: 16]", "N")], 16),
    ("rounds", Annotated[int, _flag("Turns of each, after a warm-up. [default: 3]", "N")], 3),
    ("threads", Annotated[int, _flag("Threads of both. [default: 1]", "N")], 1),
    ("as_json", _JSON, False),
)


def build_train() -> Callable[..., Any]:
    """The callback of `kllm bench train`."""

    def command(**values: Any) -> int:
        """Time a training step beside the naive way to do it: same weights and data, taking turns.

        Example: kllm bench train --objective dpo
        """
        from kllm.run.bench_train import TrainBench, bench_train

        as_json = values.pop("as_json")
        report = bench_train(TrainBench(**values), _say)
        if as_json:
            typer.echo(json.dumps(report, ensure_ascii=False))
        else:
            print_train(report)
        return 0

    return with_signature(command, [extra_parameter(parameter) for parameter in _TRAIN])


def _say(line: str) -> None:
    typer.echo(f"note: {line}", err=True)


def _numbers(flag: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",") if part.strip()))
    except ValueError:
        raise UserError(f"not numbers {_LIST}: {text!r}", where=f"flag {flag}") from None


# -- tables --------------------------------------------------------------------------------------------


def table(header: list[str], rows: list[list[str]]) -> str:
    """Columns of equal width, the first to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = []
    for row in [header, *rows]:
        cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)


def print_generate(report: dict[str, Any]) -> None:
    """The report of `bench_generate` for people."""
    from kllm.observe import units

    machine, settings = report["machine"], report["settings"]
    typer.echo(f"{report['model']}: {units.count(report['parameters'])} parameters")
    typer.echo(_machine(machine) + f", {settings['threads']} thread(s) each, {settings['rounds']} rounds")
    for name, reader in report["readers"].items():
        typer.echo(f"  {name}: {reader}")
    header = ["engine", "tok/s", "CPU ms/token", "median", "x CPU", "x wall", "same tokens"]
    for task in report["tasks"]:
        shape = f"{task['prompt_tokens']} + {task['new_tokens']} tokens each"
        typer.echo(f"\n{task['name']} ({shape})")
        typer.echo(table(header, [_generate_row(row) for row in task["rows"]]))
        if task["shared"]:
            alone = task["streams"] * task["prompt_tokens"]
            for row in task["rows"]:
                if (seen := row.get("prompt_tokens_computed")) is not None and seen < alone:
                    typer.echo(f"  {row['engine']} computed {seen} of {alone} prompt tokens")
    if aggregate := report["aggregate"]:
        each = ", ".join(f"{name} {ratio:.1f}x" for name, ratio in aggregate["ratio"].items())
        typer.echo(f"\n{aggregate['streams']} streams beside one, tokens per CPU second: {each}")
    typer.echo("x: beside transformers' generate in float32 (fastest rounds); tok/s by the clock")
    if cost := report["perplexity"]:
        typer.echo(f"\nperplexity on {cost['tokens']:,} tokens of {cost['text']}")
        rows = [[r["kind"], f"{r['ppl']:.4f}", f"{r['change']:+.3%}"] for r in cost["rows"]]
        typer.echo(table(["arithmetic", "perplexity", "beside fp32"], rows))
    for line in report["absent"]:
        typer.echo(f"absent: {line}")


def _generate_row(row: dict[str, Any]) -> list[str]:
    ratio, cpu, same = row.get("ratio", {}), row["cpu_ms_per_token"], row.get("same_tokens")
    return [
        row["engine"],
        f"{row['tok_s']['best']:.0f}",
        f"{cpu['min']:.2f}",
        f"{cpu['median']:.2f}",
        f"{ratio['cpu']:.2f}" if ratio else "",
        f"{ratio['wall']:.2f}" if ratio else "",
        "" if same is None else f"{same:.0%}",
    ]


def _machine(machine: dict[str, Any]) -> str:
    load = "" if machine["load"] is None else f", load {machine['load']:.1f}"
    kind = f" ({machine['capability']})" if machine["capability"] else ""
    return f"{machine['processor']}{kind}, {machine['cores']} cores, torch {machine['torch']}{load}"


def print_serve(report: dict[str, Any]) -> None:
    """The report of `bench_serve` for people."""
    typer.echo(f"{report['model']} at {report['url']}: {report['settings']['endpoint']}")
    typer.echo(_machine(report["machine"]))
    alone, load = report["alone"], report["load"]
    header = ["", "1 stream", f"{report['settings']['streams']} streams"]
    rows = [
        ["tokens/s", *(_number(x["tokens_s"], 0) for x in (alone, load))],
        ["tokens/s of a stream, median", *(_number(x["tokens_s_per_stream"]["p50"]) for x in (alone, load))],
    ]
    cpu = [x["server_cpu_ms_per_token"] for x in (alone, load)]
    if None not in cpu:
        rows.append(["server's CPU, ms per token", *(_number(x, 3) for x in cpu)])
    for name, title in (("ttft_s", "first token, ms"), ("gap_s", "between tokens, ms")):
        marks = [mark for mark in ("p50", "p99", "max") if mark in load[name]]
        rows += [[f"{title}, {mark}", *(_milli(x[name][mark]) for x in (alone, load))] for mark in marks]
    rows.append(["p99 / median", *(_number(x["gap_s"]["p99_over_median"]) for x in (alone, load))])
    rows.append(["Jain index, mean (least)", "", _fairness(load["jain"])])
    kinds = ("complete", "wrong", "incomplete", "starved", "left", "refused")
    rows += [[f"streams {kind}", *(str(x["streams"][kind]) for x in (alone, load))] for kind in kinds]
    typer.echo(table(header, rows))
    if report["ratio"]:
        less = f", {report['ratio_cpu']:.2f}x by the server's CPU" if report["ratio_cpu"] else ""
        typer.echo(f"aggregate: {report['ratio']:.2f}x one stream{less}")
    if load["errors"]:
        typer.echo("errors: " + ", ".join(f"{n} x {kind}" for kind, n in load["errors"].items()))
    gauges = report["gauges"]
    shown = [f"{key} {gauges[key]:g}" for key in ("running", "waiting", "kv") if gauges[key] is not None]
    state = ", ".join(shown) or "not told by this server"
    typer.echo(f"gauges afterwards: {state}" + ("" if gauges["idle"] else ": not idle"))
    for line in report["failures"]:
        typer.echo(line)
    typer.echo("all streams whole and right" if report["ok"] else "NOT all right")


def _number(value: float | None, digits: int = 1) -> str:
    return "n/a" if value is None else f"{value:.{digits}f}"


def _milli(value: float | None) -> str:
    return "n/a" if value is None else f"{1e3 * value:.1f}"


def _fairness(jain: dict[str, float | None]) -> str:
    return f"{_number(jain['mean'], 3)} ({_number(jain['min'], 3)})"


def print_train(report: dict[str, Any]) -> None:
    """The report of `bench_train` for people."""
    from kllm.observe import units

    settings = report["settings"]
    size = units.count(report["parameters"])
    typer.echo(f"{settings['objective']}, {settings['preset']} (random weights): {size} parameters")
    rounds = f"{settings['threads']} thread(s), {settings['rounds']} rounds"
    typer.echo(f"{_machine(report['machine'])}, {rounds}")
    facts = ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in report["facts"].items())
    typer.echo(facts)
    rows = [
        [
            row["name"],
            f"{row['cpu_s']['min']:.2f}",
            f"{row['cpu_s']['median']:.2f}",
            f"{row['ratio']['min']:.2f}",
            f"{row['ratio']['median']:.2f}",
            f"{row['first_loss']:.4f}",
        ]
        for row in report["rows"]
    ]
    typer.echo(table(["one step", "CPU s", "median", "x", "median x", "loss"], rows))
