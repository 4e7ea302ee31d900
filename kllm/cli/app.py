"""The `kllm` command: a table of commands, each loaded when it is used.

Nothing heavy is imported here, so that `--help` and shell completion stay instant: the schema is
imported by the commands that need flags from it, torch by the work itself.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from kllm import errors
from kllm.cli.help import HelpCommand, HelpGroup
from kllm.errors import Interrupted, KllmError, UserErrors

WORK, LOOK, RUNS = "Work", "Look", "Recipes and runs"

COMMANDS: tuple[tuple[str, str, str, str], ...] = (
    # command, module:function that builds it, panel, help
    ("run", "run:build_run", WORK, "Run a whole recipe: every stage, in order, skipping what is done."),
    ("tokenizer train", "stages:build_tokenizer", WORK, "Train a tokenizer."),
    ("tokenizer inspect", "look:build_tokenizer_inspect", LOOK, "Measure and compare tokenizers on texts."),
    ("pretrain", "stages:build_pretrain", WORK, "Train a model on plain text."),
    ("sft", "stages:build_sft", WORK, "Fine-tune a model on conversations."),
    ("lora", "stages:build_lora", WORK, "Fine-tune an adapter on conversations."),
    ("dpo", "stages:build_dpo", WORK, "Learn from preferences."),
    ("distill", "stages:build_distill", WORK, "Teach a smaller model what a larger one knows."),
    ("eval", "stages:build_eval", WORK, "Measure a model."),
    ("export", "stages:build_export", WORK, "Write a model for other programs, as a stage of a run."),
    ("chat", "talk:build_chat", WORK, "Talk to a model."),
    ("serve", "serve:build_serve", WORK, "Serve models over HTTP: OpenAI's API, and a page to chat."),
    ("convert", "convert:build_convert", WORK, "Write a model as a Hugging Face folder, changed as asked."),
    ("export-gguf", "gguf:build_export_gguf", WORK, "Write a model as GGUF, for llama.cpp and ollama."),
    ("bench generate", "bench:build_generate", LOOK, "Speed of generation, beside other programs."),
    ("bench serve", "bench:build_serve", LOOK, "Load a server with ragged streams and check every answer."),
    ("bench train", "bench:build_train", LOOK, "Speed of a training step, beside the naive way."),
    ("data inspect", "look:build_data_inspect", LOOK, "Show a data file as training will see it."),
    ("info", "look:build_info", LOOK, "Parameters, memory and FLOPs of a preset or model."),
    ("recipe ls", "recipes:build_ls", RUNS, "List the shipped recipes."),
    ("recipe show", "recipes:build_show", RUNS, "Print a recipe resolved, with the origin of every value."),
    ("recipe cp", "recipes:build_cp", RUNS, "Copy a shipped recipe to edit it."),
    ("recipe check", "recipes:build_check", RUNS, "Check recipes; every mistake is shown with its line."),
    ("recipe schema", "recipes:build_schema", RUNS, "JSON schema of recipes, for completion in editors."),
    ("runs ls", "runs:build_ls", RUNS, "List runs: state, stages, results."),
)
GROUPS: dict[str, tuple[str, str]] = {
    "tokenizer": (WORK, "Train and inspect tokenizers."),
    "bench": (LOOK, "Measure speed."),
    "data": (LOOK, "Look at data files."),
    "recipe": (RUNS, "List, show, copy and check recipes."),
    "runs": (RUNS, "Look at finished and running work."),
}
_USAGE_ERROR: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")
_HELP = {"help_option_names": ["-h", "--help"]}


def load_command(target: str, name: str, help_text: str) -> Any:
    """Build the real command behind a row of the table."""
    module, _, function = target.partition(":")
    callback = getattr(importlib.import_module(f"kllm.cli.{module}"), function)()
    single = typer.Typer(add_completion=False, rich_markup_mode=None)
    text = callback.__doc__ or help_text
    single.command(name, cls=HelpCommand, help=text, context_settings=_HELP)(callback)
    command = typer.main.get_command(single)
    command.name = name
    return command


def _lazy(target: str, kind: str | None, help_text: str) -> type[HelpCommand]:
    """A command class that turns into the real command when its arguments are parsed."""

    class LazyCommand(HelpCommand):
        def make_context(
            self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any
        ) -> Any:
            command = load_command(target, self.name or "", help_text)
            if kind is not None:
                from kllm.cli.options import spelling_of

                args = spelling_of(kind, args)
            return command.make_context(info_name, args, parent=parent, **extra)

    return LazyCommand


STAGE_COMMANDS = {
    "tokenizer train": "tokenizer",
    "pretrain": "pretrain",
    "sft": "sft",
    "lora": "lora",
    "dpo": "dpo",
    "distill": "distill",
    "eval": "eval",
    "export": "export",
}


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"kllm {version('kllm')}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Train, align, measure and talk to small language models.

    Start with: kllm run --recipe quickstart
    """


class _RootGroup(HelpGroup):
    """The top of the tree; its commands stand in the order of the table."""

    def list_commands(self, ctx: Any) -> list[str]:
        order = list(dict.fromkeys(path.split()[0] for path, *_ in COMMANDS))
        return sorted(super().list_commands(ctx), key=order.index)


def build_app() -> typer.Typer:
    """The whole command tree, with every command still unloaded."""
    options: dict[str, Any] = {
        "rich_markup_mode": None,
        "pretty_exceptions_enable": False,
        "context_settings": _HELP,
    }
    app = typer.Typer(name="kllm", cls=_RootGroup, no_args_is_help=True, **options)
    app.callback()(_root)
    groups: dict[str, typer.Typer] = {}
    for path, target, panel, help_text in COMMANDS:
        group, _, name = path.rpartition(" ")
        parent = app
        if group:
            if group not in groups:
                group_panel, group_help = GROUPS[group]
                groups[group] = typer.Typer(cls=HelpGroup, no_args_is_help=True, help=group_help, **options)
                app.add_typer(groups[group], name=group, rich_help_panel=group_panel)
            parent = groups[group]
        cls = _lazy(target, STAGE_COMMANDS.get(path), help_text)
        parent.command(name, cls=cls, help=help_text, rich_help_panel=None if group else panel)(
            _placeholder()
        )
    return app


def _placeholder() -> Callable[[], None]:
    def unloaded() -> None: ...

    return unloaded


def _report(error: KllmError) -> int:
    if isinstance(error, Interrupted):
        typer.echo(str(error), err=True)
        return error.exit_code
    lines = error.errors if isinstance(error, UserErrors) else [error]
    for line in lines:
        typer.echo(f"error: {errors.harmless(' '.join(str(line).split()))}", err=True)
    return error.exit_code


def _report_usage(error: Any) -> int:
    """One line for a wrong command line, with the name this program uses for what was meant."""
    if type(error).__name__ == "NoArgsIsHelpError":
        typer.echo(error.format_message(), err=True)
        return errors.EXIT_USAGE
    text = " ".join(error.format_message().split())
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "kllm"
    option = getattr(error, "option_name", None)
    kind = STAGE_COMMANDS.get(path.removeprefix("kllm "))
    better = None
    if type(error).__name__ == "NoSuchOption" and kind is not None:
        from kllm.cli.options import suggestion

        better = suggestion(kind, option or "")
    if better is not None:
        text = f"No such option: {option}, {better}"
    hint = "" if better or "ossible option" in text or "Did you mean" in text else f" (see {path} --help)"
    typer.echo(f"error: {text}{hint}", err=True)
    return errors.EXIT_USAGE


def _run(arguments: Sequence[str]) -> int:
    debug = "--debug" in arguments
    try:
        result = build_app()(
            args=[a for a in arguments if a != "--debug"], prog_name="kllm", standalone_mode=False
        )
        sys.stdout.flush()
        return result if isinstance(result, int) else errors.EXIT_OK
    except KllmError as error:
        if debug:
            raise
        return _report(error)
    except (KeyboardInterrupt, typer.Abort):
        if debug:
            raise
        typer.echo("interrupted", err=True)
        return errors.EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader went away (`kllm ... | head`): leave without a word, and keep Python from flushing again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except _USAGE_ERROR as error:
        if debug:
            raise
        return _report_usage(error)


def _interrupt(number: int, frame: Any) -> None:
    """Ctrl-C. While torch is imported the exception would be lost in C code, so it ends the program there."""
    module = sys.modules.get("torch")
    if getattr(getattr(module, "__spec__", None), "_initializing", False):
        os.write(2, b"interrupted\n")
        os._exit(errors.EXIT_INTERRUPTED)
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `kllm` script. Exits 0, 1 (failure), 2 (user's mistake) or 130 (interrupted)."""
    # torch then asks for huge pages: streaming weights through memory gets 8 to 16% faster
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    sys.exit(_run(list(sys.argv[1:] if arguments is None else arguments)))
