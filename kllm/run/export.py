"""The export stage: the run's model for other programs, in one folder that appears when all is verified."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kllm.config.stages import ExportStage
from kllm.errors import UserError
from kllm.export.gguf_write import GgufInfo
from kllm.export.load import load_model
from kllm.files import new_directory
from kllm.observe import units
from kllm.run.context import StageContext
from kllm.run.exportcard import gguf_check, hf_check
from kllm.run.gguf import gguf_files
from kllm.run.hffolder import HfOptions, hf_folder


def export_stage(ctx: StageContext, stage: ExportStage) -> dict[str, Any]:
    """Writes `final/`: the Hugging Face folder with the GGUF files beside its weights.

    Returns:
        `result`: a row for each file (file, type, size, check); `export`: the reports behind them.
    """
    say = ctx.reporter.message
    model, tokenizer = load_model(ctx.inputs["model"], say=say)
    if tokenizer is None:
        hint = f"kllm convert {ctx.inputs['model']} OUT --tokenizer DIR gives it one"
        raise UserError("the model has no tokenizer beside it", str(ctx.inputs["model"]), hint)
    model.eval()
    name = ctx.recipe.name
    rows: list[dict[str, str]] = []
    reports: dict[str, Any] = {}
    with new_directory(ctx.final_dir) as aside:
        if stage.hf:
            options = HfOptions(
                dtype=stage.dtype, quant=stage.quant, calibrate=stage.calibrate, verify=stage.verify
            )
            reports["hf"] = hf_folder(model, tokenizer, aside, options, say)
            rows.append(_hf_row(reports["hf"]))
        if stage.gguf:
            info = GgufInfo(name, license=stage.license or "", source=f"{name} (seed {ctx.seed})")
            paths: dict[str, Path] = {kind: aside / f"{name}-{kind}.gguf" for kind in stage.gguf}
            reports["gguf"] = gguf_files(
                model, tokenizer, paths, info, say, ollama=stage.ollama, verify=stage.verify
            )
            for file in reports["gguf"]["files"]:
                file["path"] = str(ctx.final_dir / Path(file["path"]).name)
                if "modelfile" in file:
                    file["modelfile"] = str(ctx.final_dir / Path(file["modelfile"]).name)
                rows.append(_gguf_row(file))
    return {
        "result": {"files": rows},
        "export": reports,
        "parameters": model.num_parameters(),
        "device": "cpu",
    }


def _hf_row(report: dict[str, Any]) -> dict[str, str]:
    kind = report["quant"] if report.get("quant") else report["dtype"]
    check = hf_check(report["verified"]) if "verified" in report else "not checked"
    return {"file": "model.safetensors", "type": kind, "size": units.size(report["bytes"]), "check": check}


def _gguf_row(file: dict[str, Any]) -> dict[str, str]:
    check = gguf_check(file["verified"]) if "verified" in file else "not checked"
    name, size = Path(file["path"]).name, units.size(file["bytes"])
    return {"file": name, "type": file["quant"], "size": size, "check": check}
