"""`kllm chat`: its sampling flags are the schema's `SamplingSection`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from kllm.cli import options
from kllm.errors import UserError


def build_chat() -> Callable[..., Any]:
    """The callback of `kllm chat`."""
    flags = options.section_flags("SamplingSection", "Sampling")

    def command(**values: Any) -> int:
        return _chat(flags, values)

    what = typer.Argument(
        help="Run, stage, checkpoint, Hugging Face folder or hub id.", metavar="MODEL", show_default=False
    )
    extras: list[options.Extra] = [
        ("model", Annotated[str, what], options.REQUIRED),
        (
            "adapter",
            Annotated[
                str | None,
                typer.Option(
                    "--adapter", metavar="DIR", help="A LoRA on it: PEFT folder, LoRA run or hub id."
                ),
            ],
            None,
        ),
        (
            "system",
            Annotated[str | None, typer.Option("--system", metavar="TEXT", help="System prompt.")],
            None,
        ),
        (
            "device",
            Annotated[str, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps.")],
            "auto",
        ),
        (
            "prompt",
            Annotated[
                str | None,
                typer.Option(
                    "--prompt", "-p", metavar="TEXT", help="Answer this and leave; so does text on stdin."
                ),
            ],
            None,
        ),
        (
            "json",
            Annotated[
                bool, typer.Option("--json", help="The answer to --prompt as JSON, with token counts.")
            ],
            False,
        ),
    ]
    parameters = [options.extra_parameter(extra) for extra in extras]
    parameters += options.flag_parameters(flags)
    command.__doc__ = (
        "Talk to a model. It remembers the conversation; Ctrl-C stops an answer, /help lists commands.\n\n"
        "Example: kllm chat runs/quickstart"
    )
    return options.with_signature(command, parameters)


def sampling_of(flags: list[options.Flag], values: dict[str, Any]) -> Any:
    """A checked SamplingSection from the flags.

    Raises:
        UserErrors: values outside their ranges, each with its flag.
    """
    from pydantic import ValidationError

    from kllm.config.explain import message_of
    from kllm.config.parts import SamplingSection
    from kllm.errors import UserErrors

    given = {override.key: override.value for override in options.overrides_of(flags, values)}
    try:
        return SamplingSection.model_validate(given)
    except ValidationError as failure:
        names = {flag.key: flag.name for flag in flags}
        raise UserErrors(
            [
                UserError(message_of(error, error["loc"], given), where=f"flag {names[str(error['loc'][0])]}")
                for error in failure.errors()
            ]
        ) from None


def _chat(flags: list[options.Flag], values: dict[str, Any]) -> int:
    sampling = sampling_of(flags, values)
    from kllm.chat.repl import run_chat
    from kllm.engine import SamplingParams

    return run_chat(
        values["model"],
        adapter=values["adapter"],
        prompt=values.get("prompt"),
        system=values.get("system"),
        sampling=SamplingParams(**sampling.model_dump()),
        device=values["device"],
        json_output=values["json"],
    )
