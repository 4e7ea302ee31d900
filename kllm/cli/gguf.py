"""`kllm export-gguf`: a model as GGUF files, checked by llama.cpp where it is installed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from kllm.cli.assume import ASSUME, assumptions

_SOURCE = Annotated[
    str,
    typer.Argument(
        metavar="SRC", help="Run, stage, checkpoint, folder, .pth, .gguf or hub id (OWNER/NAME[@REV])."
    ),
]
_OUT = Annotated[Path, typer.Argument(metavar="OUT", help="Folder, or one file that ends in .gguf.")]
_QUANT = Annotated[
    list[str] | None,
    typer.Option(
        "--quant",
        "-q",
        metavar="TYPE",
        help="f32, f16, bf16, q8_0, q4_0, q4_1, q5_0, q5_1, q4_k_m, q5_k_m or q6_k; repeat for several, "
        "or separate them by commas. [default: q8_0]",
    ),
]
_NAME = Annotated[str | None, typer.Option(metavar="TEXT", help="The model's name. [default: from SRC]")]
_LICENSE = Annotated[
    str, typer.Option(metavar="ID", help="Licence, e.g. apache-2.0. [default: the one SRC names]")
]
_TOKENIZER = Annotated[str | None, typer.Option(metavar="PATH", help="Tokenizer of a model without one.")]
_ADAPTER = Annotated[str | None, typer.Option(metavar="PATH", help="Merge this LoRA (PEFT folder or .pth).")]
_OLLAMA = Annotated[bool, typer.Option("--ollama", help="Also write a Modelfile: template, stop tokens.")]
_VERIFY = Annotated[
    bool | None,
    typer.Option("--verify/--no-verify", help="Read back, run llama.cpp, compare. [default: if small]"),
]
_OVERWRITE = Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")]
_JSON = Annotated[bool, typer.Option("--json", help="JSON on stdout, for scripts.")]


def build_export_gguf() -> Callable[..., Any]:
    """The callback of `kllm export-gguf`."""

    def command(
        source: _SOURCE,
        out: _OUT,
        quant: _QUANT = None,
        name: _NAME = None,
        license: _LICENSE = "",
        tokenizer: _TOKENIZER = None,
        adapter: _ADAPTER = None,
        ollama: _OLLAMA = False,
        verify: _VERIFY = None,
        assume: ASSUME = None,
        overwrite: _OVERWRITE = False,
        as_json: _JSON = False,
    ) -> None:
        """Write a model as GGUF, for llama.cpp and ollama; quantised here, no llama.cpp needed.

        Example: kllm export-gguf runs/quickstart gguf --quant q8_0 --quant q4_k_m --ollama
        """
        from kllm.run.gguf import GgufExport, export_gguf

        job = GgufExport(
            source,
            out,
            quants=split_list(quant) or ("q8_0",),
            name=name,
            license=license,
            tokenizer=tokenizer,
            adapter=adapter,
            ollama=ollama,
            verify=verify,
            overwrite=overwrite,
            assume=assumptions(assume),
        )
        report = export_gguf(job, lambda line: typer.echo(f"note: {line}", err=True))
        if as_json:
            typer.echo(json.dumps(report, ensure_ascii=False, default=str))
        else:
            _print(report)

    return command


def split_list(given: list[str] | None) -> tuple[str, ...]:
    """Values of a repeatable flag that may also hold commas; in order, each once."""
    parts = [part.strip().lower() for text in given or [] for part in text.split(",")]
    return tuple(dict.fromkeys(part for part in parts if part))


def _print(report: dict[str, Any]) -> None:
    from kllm.observe import units
    from kllm.run.exportcard import gguf_check

    for file in report["files"]:
        typer.echo(f"{file['path']}: {file['arch']}, {report['size_label']}, {units.size(file['bytes'])}")
        if checked := file.get("verified"):
            typer.echo(f"  checked with {gguf_check(checked)}")
            typer.echo(
                f"  against the model: same likeliest token at {checked['same_top']:.1%} of positions, "
                f"KL {checked['kl']:.1e} nats"
            )
        if "modelfile" in file:
            typer.echo(f"  ollama create {report['name']} -f {file['modelfile']}")
