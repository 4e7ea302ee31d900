"""`kllm convert`: a model as a Hugging Face folder, changed as asked and checked by another reader."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from kllm.cli.assume import ASSUME, assumptions
from kllm.cli.options import extra_parameter, with_signature
from kllm.errors import UserError

_SOURCE = Annotated[
    str,
    typer.Argument(
        metavar="SRC", help="Run, stage, checkpoint, folder, .pth, .gguf or hub id (OWNER/NAME[@REV])."
    ),
]
_OUT = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; with --to torch a .pth file.")]
_TO = Annotated[
    Literal["hf", "kllm", "torch", "peft"],
    typer.Option(
        help="hf and kllm: the same Hugging Face folder; torch: a .pth with MiniMind's names; "
        "peft: a LoRA file (SRC) as a PEFT folder."
    ),
]
_DTYPE = Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Numbers in the file.")]
_SHARD = Annotated[
    str, typer.Option(metavar="SIZE", help="Largest file, e.g. 500MB; larger models are split.")
]
_QUANT = Annotated[
    Literal["awq", "int8", "int4"] | None,
    typer.Option(help="awq: 4 bits, for vLLM, SGLang, LMDeploy; int8, int4: compressed-tensors."),
]
_GROUP = Annotated[
    int | None, typer.Option(metavar="N", help="Weights that share a scale: 128, 64 or 32. [default: fits]")
]
_CALIBRATE = Annotated[
    str | None,
    typer.Option(metavar="PATH", help="Texts for --quant: half to calibrate, half for perplexity."),
]
_TOKENIZER = Annotated[
    str | None, typer.Option(metavar="PATH", help="Another tokenizer; rows of shared tokens are kept.")
]
_ROPE = Annotated[Literal["yarn", "linear"] | None, typer.Option(help="Stretch the positions by --factor.")]
_FACTOR = Annotated[float | None, typer.Option(metavar="X", help="How far to stretch.")]
_ADAPTER = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATH[@WEIGHT]",
        help="Merge this LoRA: a PEFT folder, LoRA run or .pth. Repeat: their changes add up.",
    ),
]
_MERGE = Annotated[
    bool, typer.Option("--merge", help="SRC is a LoRA (run, PEFT folder, .pth): merge it into its base.")
]
_KEEP = Annotated[
    bool, typer.Option("--keep-adapter", help="Do not merge it: write it to OUT/adapter as a PEFT folder.")
]
_BASE = Annotated[
    str | None, typer.Option(metavar="MODEL", help="Base that a PEFT folder names, or that --merge takes.")
]
_VERIFY = Annotated[
    bool | None,
    typer.Option("--verify/--no-verify", help="Reload with another program, compare. [default: if small]"),
]
_PUSH = Annotated[str | None, typer.Option(metavar="REPO", help="Upload to this hub id.")]
_PRIVATE = Annotated[bool, typer.Option("--private", help="A new repository is private.")]
_OVERWRITE = Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is there.")]
_JSON = Annotated[bool, typer.Option("--json", help="JSON on stdout, for scripts.")]


_PARAMETERS: tuple[tuple[str, Any, Any], ...] = (
    ("source", _SOURCE, inspect.Parameter.empty),
    ("out", _OUT, inspect.Parameter.empty),
    ("to", _TO, "hf"),
    ("dtype", _DTYPE, "float32"),
    ("max_shard_size", _SHARD, "5GB"),
    ("quant", _QUANT, None),
    ("group_size", _GROUP, None),
    ("calibrate", _CALIBRATE, None),
    ("tokenizer", _TOKENIZER, None),
    ("rope_scaling", _ROPE, None),
    ("factor", _FACTOR, None),
    ("adapter", _ADAPTER, None),
    ("merge", _MERGE, False),
    ("keep_adapter", _KEEP, False),
    ("base", _BASE, None),
    ("verify", _VERIFY, None),
    ("assume", ASSUME, None),
    ("push", _PUSH, None),
    ("private", _PRIVATE, False),
    ("overwrite", _OVERWRITE, False),
    ("as_json", _JSON, False),
)
_OPTIONS = ("dtype", "quant", "group_size", "calibrate", "verify")


def build_convert() -> Callable[..., Any]:
    """The callback of `kllm convert`."""

    def command(**values: Any) -> None:
        """Write a model of any kind as a Hugging Face folder (or a .pth), changed as asked, and check it.

        Example: kllm convert runs/quickstart my-model --dtype bfloat16
        """
        from kllm.run.convert import Conversion, HfOptions, convert

        as_json = values.pop("as_json")
        options = HfOptions(
            max_shard_bytes=_bytes(values.pop("max_shard_size")), **{n: values.pop(n) for n in _OPTIONS}
        )
        adapters = tuple(values.pop("adapter") or ())
        values["assume"] = assumptions(values["assume"])
        job = Conversion(options=options, adapters=adapters, **values)
        report = convert(job, lambda line: typer.echo(f"note: {line}", err=True))
        if as_json:
            typer.echo(json.dumps(report, ensure_ascii=False, default=str))
        else:
            _print(report)

    return with_signature(command, [extra_parameter(parameter) for parameter in _PARAMETERS])


def _bytes(text: str) -> int:
    from kllm.config.base import parse_bytes

    try:
        return int(parse_bytes(text))
    except ValueError as error:
        raise UserError(str(error), where="flag --max-shard-size") from None


def _print(report: dict[str, Any]) -> None:
    from kllm.observe import units
    from kllm.run.exportcard import hf_check, merged_line

    counted = "parameters" if "parameters" in report else "modules"
    what = f"{report[counted]:,} {counted}"
    typer.echo(f"{report['out']}: {what}, {units.size(report['bytes'])}")
    if cost := report.get("perplexity"):
        before, after = cost["before"], cost["after"]
        change = f"{before:.3f} -> {after:.3f} ({after / before - 1:+.1%})" if before else "too short to tell"
        typer.echo(f"perplexity on {cost['texts']}: {change}")
    if checked := report.get("verified"):
        typer.echo(f"checked with {hf_check(checked)}")
    for merged in report.get("merged", ()):
        typer.echo(f"merged {merged_line(merged)}")
    if "adapter" in report:
        typer.echo(f"adapter: {report['adapter']}")
    if "pushed" in report:
        typer.echo(f"pushed to {report['pushed']}")
