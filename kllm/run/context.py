"""What a stage is given to run: its settings, its folder, its inputs and someone to talk to."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kllm.config.recipe import Recipe, stage_kind
from kllm.config.stages import Stage
from kllm.observe.console import PlainReporter
from kllm.observe.reporting import Reporter


@dataclass(frozen=True)
class StageContext:
    """One stage of one run.

    inputs: directories that exist: `model` and `tokenizer`, each absent when the stage takes none;
    nproc: processes of this stage (1 inside a worker is never assumed: see `world`);
    smoke: sizes were shrunk for a test run;
    origins: dotted key -> where the value came from, for error messages.
    """

    recipe: Recipe
    stage: Stage
    stage_dir: Path
    run_dir: Path
    inputs: Mapping[str, Path] = field(default_factory=dict)
    reporter: Reporter = field(default_factory=PlainReporter)
    seed: int = 42
    device: str = "auto"
    nproc: int = 1
    smoke: bool = False
    origins: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.stage.name

    @property
    def kind(self) -> str:
        return stage_kind(self.stage)

    @property
    def rank(self) -> int:
        """This process among those that torchrun started (0 without it)."""
        return int(os.environ.get("RANK", "0"))

    @property
    def world(self) -> int:
        return int(os.environ.get("WORLD_SIZE", "1"))

    @property
    def is_main(self) -> bool:
        """Only this process writes files and lines."""
        return self.rank == 0

    @property
    def final_dir(self) -> Path:
        """The stage's result."""
        return self.stage_dir / "final"

    @property
    def metrics_path(self) -> Path:
        return self.stage_dir / "metrics.jsonl"

    @property
    def plots_dir(self) -> Path:
        return self.stage_dir / "plots"
