"""`kllm convert`: a model as a Hugging Face folder, changed as asked and checked by another reader."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from kllm.errors import UserError

_SOURCE = Annotated[str, typer.Argument(metavar="SRC", help="Run, stage, checkpoint, folder or hub id.")]
_OUT = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")]
_TO = Annotated[
    Literal["hf", "kllm"], typer.Option(help="What to write; both are the same Hugging Face folder.")
]
_DTYPE = Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Numbers in the file.")]
_SHARD = Annotated[
    str, typer.Option(metavar="SIZE", help="Largest file, e.g. 500MB; larger models are split.")
]
_TOKENIZER = Annotated[
    str | None, typer.Option(metavar="PATH", help="Another tokenizer; rows of shared tokens are kept.")
]
_ROPE = Annotated[Literal["yarn", "linear"] | None, typer.Option(help="Stretch the positions by --factor.")]
_FACTOR = Annotated[float | None, typer.Option(metavar="X", help="How far to stretch.")]
_ADAPTER = Annotated[str | None, typer.Option(metavar="PATH", help="Merge this LoRA (a PEFT folder).")]
_VERIFY = Annotated[
    bool | None,
    typer.Option("--verify/--no-verify", help="Reload with transformers, compare. [default: if small]"),
]
_PUSH = Annotated[str | None, typer.Option(metavar="REPO", help="Upload to this hub id.")]
_PRIVATE = Annotated[bool, typer.Option("--private", help="A new repository is private.")]
_OVERWRITE = Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is there.")]
_JSON = Annotated[bool, typer.Option("--json", help="JSON on stdout, for scripts.")]


def build_convert() -> Callable[..., Any]:
    """The callback of `kllm convert`."""

    def command(
        source: _SOURCE,
        out: _OUT,
        to: _TO = "hf",
        dtype: _DTYPE = "float32",
        max_shard_size: _SHARD = "5GB",
        tokenizer: _TOKENIZER = None,
        rope_scaling: _ROPE = None,
        factor: _FACTOR = None,
        adapter: _ADAPTER = None,
        verify: _VERIFY = None,
        push: _PUSH = None,
        private: _PRIVATE = False,
        overwrite: _OVERWRITE = False,
        as_json: _JSON = False,
    ) -> None:
        """Write a model as a Hugging Face folder: other dtype, shards, longer positions, other tokenizer.

        Example: kllm convert runs/quickstart my-model --dtype bfloat16
        """
        from kllm.run.convert import Conversion, convert

        job = Conversion(
            source,
            out,
            dtype=dtype,
            max_shard_bytes=_bytes(max_shard_size),
            tokenizer=tokenizer,
            rope_scaling=rope_scaling,
            factor=factor,
            adapter=adapter,
            verify=verify,
            push=push,
            private=private,
            overwrite=overwrite,
        )
        report = convert(job, lambda line: typer.echo(f"note: {line}", err=True))
        if as_json:
            typer.echo(json.dumps(report, ensure_ascii=False, default=str))
        else:
            _print(report)

    return command


def _bytes(text: str) -> int:
    from kllm.config.base import parse_bytes

    try:
        return int(parse_bytes(text))
    except ValueError as error:
        raise UserError(str(error), where="flag --max-shard-size") from None


def _print(report: dict[str, Any]) -> None:
    from kllm.observe import units

    typer.echo(f"{report['out']}: {report['parameters']:,} parameters, {units.size(report['bytes'])}")
    if checked := report.get("verified"):
        typer.echo(
            f"checked with {checked['reader']}: logits differ by at most {checked['max_abs_diff']:.1e} "
            f"(allowed {checked['tolerance']:.1e}), greedy tokens equal "
            f"{checked['greedy_equal']}/{checked['greedy_total']}"
        )
    if "pushed" in report:
        typer.echo(f"pushed to {report['pushed']}")
