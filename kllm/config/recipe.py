"""A recipe: a name, a seed and an ordered list of stages; where each stage's inputs come from.

Inputs are paths or `stage:NAME`. A stage that names none takes the model and tokenizer of the stages
before it. `link_errors` checks this without touching a file, also on a recipe that has other mistakes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import model_validator
from pydantic_core import PydanticCustomError

from kllm.config.base import Name, NotNegative, Positive, Section
from kllm.config.stages import STAGES, BaseStage, Stage

REFERENCE = "stage:"
LINKS_ERROR = "stage_links"


@dataclass(frozen=True)
class Links:
    """What one stage says about its name and inputs; all that the static check needs."""

    index: int
    kind: str
    name: str
    model: str | None = None
    preset: str | None = None
    tokenizer: str | None = None
    teacher: str | None = None
    student_from: str | None = None
    endpoint: str | None = None
    """Where the stage gets answers to learn from; it needs no teacher then."""


@dataclass(frozen=True)
class LinkError:
    """A wrong name or input of a stage; `loc` is its path in the recipe: (stages, 1, model, path)."""

    loc: tuple[str | int, ...]
    message: str
    hint: str | None = None


class Recipe(Section):
    """A whole pipeline: stages that run in order in one run folder."""

    name: Name
    """Name of the run and of its folder; default: the recipe file's name."""
    seed: NotNegative = 42
    """Seed of everything random: the same recipe on the same device gives the same bits."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    nproc: Positive = 1
    """Processes (devices) to train with."""
    stages: list[Stage]
    """The stages, in order."""

    @model_validator(mode="after")
    def _links(self) -> Recipe:
        if not self.stages:
            raise ValueError("a recipe needs at least one stage")
        errors = link_errors(_links_of(stage.model_dump(), i) for i, stage in enumerate(self.stages))
        if errors:
            raise PydanticCustomError(LINKS_ERROR, "{text}", {"text": "; ".join(e.message for e in errors)})
        return self

    def stage(self, name: str) -> Stage:
        """The stage called `name`; KeyError if there is none."""
        return self.stages[self.index(name)]

    def index(self, name: str) -> int:
        """Position of the stage called `name`, from 0; KeyError if there is none."""
        for position, stage in enumerate(self.stages):
            if stage.name == name:
                return position
        raise KeyError(name)

    def dirname(self, name: str) -> str:
        """Folder of a stage inside the run folder: `02-pretrain`."""
        return f"{self.index(name) + 1:02d}-{name}"

    def inputs(self, name: str) -> dict[str, str]:
        """Where a stage's `model`, `tokenizer` and `teacher` come from: `stage:NAME` or a path; absent = it
        makes them, or needs none.

        A named tokenizer wins; a model that is read from somewhere brings its tokenizer along; otherwise the
        nearest earlier stage that makes one is taken. A student with fresh weights takes the teacher's
        tokenizer; its teacher is the nearest earlier model unless named.
        """
        links = [_links_of(stage.model_dump(), i) for i, stage in enumerate(self.stages)]
        return resolve_inputs(links, self.index(name))


def is_url(text: str) -> bool:
    """An endpoint that is asked over the network, not a model that is loaded."""
    return text.startswith(("http://", "https://"))


def raw_links(stages: Any) -> list[Links]:
    """Links of the stages of an unchecked recipe; what is no mapping of a known kind is left out."""
    if not isinstance(stages, (list, tuple)):
        return []
    known = [(i, s) for i, s in enumerate(stages) if isinstance(s, Mapping) and s.get("stage") in STAGES]
    return [_links_of(s, i) for i, s in known]


def _links_of(stage: Mapping[str, Any], index: int) -> Links:
    def text(section: Any, key: str) -> str | None:
        value = section.get(key) if isinstance(section, Mapping) else None
        return value if isinstance(value, str) else None

    kind = str(stage["stage"])
    tokenizer, teacher = stage.get("tokenizer"), stage.get("teacher")
    return Links(
        index=index,
        kind=kind,
        name=str(stage.get("name") or kind),
        model=text(stage.get("model"), "path"),
        preset=text(stage.get("model"), "preset"),
        tokenizer=tokenizer if isinstance(tokenizer, str) else text(tokenizer, "path"),
        teacher=teacher if isinstance(teacher, str) else text(teacher, "path"),
        student_from=text(stage, "student_from"),
        endpoint=text(stage, "from_endpoint"),
    )


def _takes(kind: str, what: str) -> bool:
    return what in STAGES[kind].model_fields


def _last_producer(stages: Iterable[Links], what: str) -> Links | None:
    return next((s for s in reversed(list(stages)) if what in STAGES[s.kind].produces), None)


def resolve_inputs(stages: list[Links], position: int) -> dict[str, str]:
    """The rule of `Recipe.inputs` on bare links."""
    stage, earlier, inputs = stages[position], stages[:position], {}
    fresh = stage.kind == "pretrain" and stage.model is None
    if _takes(stage.kind, "model"):
        producer = _last_producer(earlier, "model")
        if given := stage.model or stage.student_from:
            inputs["model"] = given
        elif not fresh and not stage.preset and producer:
            inputs["model"] = REFERENCE + producer.name
    if stage.endpoint and not is_url(stage.endpoint):
        inputs["endpoint"] = stage.endpoint
    if _takes(stage.kind, "teacher") and not stage.endpoint:
        teacher = stage.teacher or stage.student_from or _earlier_teacher(stage, earlier)
        if teacher:
            inputs["teacher"] = teacher
    if _takes(stage.kind, "tokenizer"):
        producer = _last_producer(earlier, "tokenizer")
        if stage.tokenizer:
            inputs["tokenizer"] = stage.tokenizer
        elif "model" in inputs or "teacher" in inputs:
            inputs["tokenizer"] = inputs.get("model") or inputs["teacher"]
        elif producer:
            inputs["tokenizer"] = REFERENCE + producer.name
    return inputs


def _earlier_teacher(stage: Links, earlier: list[Links]) -> str | None:
    """The nearest earlier model, for a student that does not start from it."""
    producer = _last_producer(earlier, "model")
    return REFERENCE + producer.name if producer and (stage.preset or stage.model) else None


def link_errors(links: Iterable[Links]) -> list[LinkError]:
    """All wrong names and inputs: duplicates, references that are wrong, late or of another kind, gaps."""
    stages = list(links)
    errors: list[LinkError] = []
    seen: dict[str, Links] = {}
    for position, stage in enumerate(stages):
        at: tuple[str | int, ...] = ("stages", stage.index)
        if stage.name in seen:
            hint = "give one of them another name: name: NAME"
            errors.append(LinkError((*at, "name"), f"two stages are called {stage.name!r}", hint))
        for what, value, path in _named(stage):
            if value and value.startswith(REFERENCE) and _takes(stage.kind, path[0]):
                message = _reference_error(value.removeprefix(REFERENCE), what, stages, position)
                if message:
                    errors.append(LinkError((*at, *path), message))
        errors.extend(_missing_inputs(stages, position, at))
        seen.setdefault(stage.name, stage)
    return errors


def _named(stage: Links) -> list[tuple[str, str | None, tuple[str, ...]]]:
    """What a stage names: (kind of thing, its value, its key)."""
    return [
        ("model", stage.model, ("model", "path")),
        ("tokenizer", stage.tokenizer, ("tokenizer", "path")),
        ("model", stage.teacher, ("teacher", "path")),
        ("model", stage.student_from, ("student_from",)),
        ("model", stage.endpoint, ("from_endpoint",)),
    ]


def _reference_error(name: str, what: str, stages: list[Links], position: int) -> str | None:
    target = next((i for i, s in enumerate(stages) if s.name == name), None)
    earlier = [s.name for s in stages[:position] if what in STAGES[s.kind].produces]
    choice = f"; stages before it that make a {what}: {', '.join(earlier) or 'none'}"
    if target is None:
        return f"there is no stage {name!r}{choice}"
    if target >= position:
        return f"stage {name!r} does not come before this one{choice}"
    if what not in STAGES[stages[target].kind].produces:
        return f"stage {name!r} is a {stages[target].kind} stage and makes no {what}{choice}"
    return None


def _missing_inputs(stages: list[Links], position: int, at: tuple[str | int, ...]) -> list[LinkError]:
    stage, inputs = stages[position], resolve_inputs(stages, position)
    errors = []
    fresh = stage.kind == "pretrain" or stage.preset
    if _takes(stage.kind, "model") and "model" not in inputs and not (fresh and stage.kind != "eval"):
        hint = "put a pretrain stage before it, or give model: {path: RUN, FOLDER or HUB ID}"
        errors.append(LinkError((*at, "model"), f"stage {stage.name!r} has no model to start from", hint))
    elif _takes(stage.kind, "tokenizer") and "tokenizer" not in inputs:
        hint = "put a tokenizer stage before it, or give tokenizer: {path: FOLDER or HUB ID}"
        errors.append(LinkError((*at, "tokenizer"), f"stage {stage.name!r} has no tokenizer", hint))
    if _takes(stage.kind, "teacher") and not stage.endpoint and "teacher" not in inputs:
        hint = "give teacher: RUN, FOLDER or HUB ID (or from_endpoint: URL and prompts: FILE)"
        errors.append(LinkError((*at, "teacher"), f"stage {stage.name!r} has no teacher", hint))
    return errors


def stage_kind(stage: BaseStage) -> str:
    """`tokenizer`, `pretrain`, ...: the kind of a stage."""
    return stage.stage
