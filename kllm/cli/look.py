"""`kllm data inspect`, `kllm tokenizer inspect` and `kllm info`: look before you train."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any

import typer

from kllm.errors import UserError

_JSON = Annotated[bool, typer.Option("--json", help="JSON on stdout, for scripts.")]


def build_info() -> Callable[..., Any]:
    """The callback of `kllm info`."""

    def command(
        what: Annotated[
            str | None,
            typer.Argument(metavar="[PRESET|PATH]", help="Preset, run, stage, checkpoint, folder or hub id."),
        ] = None,
        vocab: Annotated[
            str | None,
            typer.Option("--vocab-size", metavar="N", help="Vocabulary instead of the preset's own."),
        ] = None,
        seq_len: Annotated[
            str, typer.Option("--seq-len", metavar="N", help="Context for FLOPs and cache.")
        ] = "1024",
        micro: Annotated[
            str,
            typer.Option("--micro-batch-tokens", metavar="N", help="Tokens of one forward pass in training."),
        ] = "8192",
        as_json: _JSON = False,
    ) -> None:
        """Parameters by part, memory for training and inference, and FLOPs per token, by arithmetic alone.

        Without an argument: all presets in one table.
        """
        from kllm.cli.info import print_facts, print_presets
        from kllm.model.presets import PRESETS
        from kllm.run import info

        sizes = {
            name: _count(name, text)
            for name, text in (("--seq-len", seq_len), ("--micro-batch-tokens", micro))
        }
        if what is None:
            facts: Any = [info.summary(name) for name in PRESETS]
        else:
            shape = info.find_shape(what)
            if vocab is not None:
                shape = shape.with_(vocab_size=_count("--vocab-size", vocab))
            facts = info.facts(what, shape, sizes["--seq-len"], sizes["--micro-batch-tokens"])
        if as_json:
            typer.echo(json.dumps(facts, ensure_ascii=False))
        elif what is None:
            print_presets(facts)
        else:
            print_facts(facts)

    return command


def _count(flag: str, text: str) -> int:
    from kllm.config.base import parse_count

    try:
        value = int(parse_count(text))
    except ValueError as error:
        raise UserError(str(error), where=f"flag {flag}") from None
    if value < 1:
        raise UserError(f"must be at least 1, got {text}", where=f"flag {flag}")
    return value


def build_data_inspect() -> Callable[..., Any]:
    """The callback of `kllm data inspect`."""

    def command(
        source: Annotated[
            str, typer.Argument(metavar="FILE", help="File, folder, glob, builtin:NAME or hub id.")
        ],
        tokenizer: Annotated[
            str | None,
            typer.Option(
                "--tokenizer", metavar="PATH", help="Folder, run or hub id; adds token figures and the mask."
            ),
        ] = None,
        rows: Annotated[
            str, typer.Option("--rows", metavar="N", help="Read at most this many rows.")
        ] = "10000",
        row: Annotated[
            str, typer.Option("--row", metavar="N", help="Show this row as the sample, from 1.")
        ] = "1",
        as_json: _JSON = False,
    ) -> int:
        """Show a data file as training will see it: dialect, rows, lengths, one row with what is learned
        bright, and every bad row with its line.

        Example: kllm data inspect chats.jsonl --tokenizer runs/quickstart
        """
        from kllm.cli import inspected

        found = inspected.inspect_data(source, tokenizer, _count("--rows", rows), _count("--row", row))
        if as_json:
            typer.echo(json.dumps(found, ensure_ascii=False))
        else:
            inspected.print_data(found)
        return 0

    return command


def build_tokenizer_inspect() -> Callable[..., Any]:
    """The callback of `kllm tokenizer inspect`."""

    def command(
        tokenizers: Annotated[
            list[str],
            typer.Argument(metavar="TOKENIZER...", help="Folders, runs or hub ids; several are compared."),
        ],
        data: Annotated[
            list[str] | None,
            typer.Option(
                "--data",
                metavar="PATH",
                help="Texts to measure on; repeat for several. [default: builtin:world]",
            ),
        ] = None,
        text: Annotated[
            str | None, typer.Option("--text", metavar="TEXT", help="Show how this text is cut.")
        ] = None,
        max_bytes: Annotated[
            str, typer.Option("--max-bytes", metavar="SIZE", help="Read at most this much of each source.")
        ] = "2MiB",
        as_json: _JSON = False,
    ) -> int:
        """Compression by language, round trip, use of the vocabulary, longest tokens; several side by side.

        Example: kllm tokenizer inspect runs/quickstart Qwen/Qwen3-0.6B --data corpus.jsonl
        """
        from kllm.cli import compared
        from kllm.config.base import parse_bytes

        try:
            limit = int(parse_bytes(max_bytes))
        except ValueError as error:
            raise UserError(str(error), where="flag --max-bytes") from None
        found = compared.inspect_tokenizers(tokenizers, data or ["builtin:world/pretrain"], limit, text)
        if as_json:
            typer.echo(json.dumps(found, ensure_ascii=False))
        else:
            compared.print_tokenizers(found)
        return 0

    return command
