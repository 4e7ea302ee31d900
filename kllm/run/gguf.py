"""`kllm export-gguf`: load anything, write it as GGUF in several types, prove each, say so in a card."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kllm.errors import KllmError, UserError
from kllm.export import llamacpp
from kllm.export.gguf_write import QUANTS, GgufInfo, size_label, write_gguf
from kllm.export.load import load_model
from kllm.export.ollama import modelfile, template_of
from kllm.export.resolve import MODEL_FILES, resolve
from kllm.export.resolve_adapter import check_unmerged
from kllm.export.tokenizers import load_tokenizer
from kllm.files import new_file, write_text
from kllm.model.presets import gguf_arch
from kllm.model.transformer import Transformer
from kllm.run.exportcard import CARD_MARK, gguf_card, source_license
from kllm.run.hffolder import verifies
from kllm.tokenizer.tokenizer import Tokenizer

Say = Callable[[str], None]


@dataclass(frozen=True)
class GgufExport:
    """What is asked for; see `kllm export-gguf --help`."""

    source: str
    out: Path
    """A folder, or a file that ends in .gguf when one type is asked for."""
    quants: tuple[str, ...] = ("q8_0",)
    name: str | None = None
    license: str = ""
    tokenizer: str | None = None
    adapter: str | None = None
    ollama: bool = False
    verify: bool | None = None
    overwrite: bool = False
    assume: Mapping[str, Any] = field(default_factory=dict)


def export_gguf(job: GgufExport, say: Say = lambda line: None) -> dict[str, Any]:
    """Does the export and returns its report: source, name, arch, parameters, files (each with its check).

    Raises:
        UserError, KllmError: bad input, a shape or tokenizer that llama.cpp cannot run, a failed check.
    """
    if job.adapter is not None:
        check_unmerged(job.source, job.adapter)
    name = job.name or export_name(job.source)
    paths = _paths(job, Path(name).name or "model")
    model, tokenizer = load_model(job.source, assume=job.assume, tokenizer=job.tokenizer is None, say=say)
    if job.tokenizer is not None:
        tokenizer = load_tokenizer(job.tokenizer)
    merged = None
    if job.adapter is not None:
        from kllm.export.adapter import merge_adapters

        (merged,) = merge_adapters(model, [(job.adapter, 1.0)])
    terms = job.license or source_license(job.source)
    # a path would tell the world about this machine
    source = export_name(job.source) if Path(job.source).exists() else job.source
    source += f" with adapter {merged['adapter']} merged" if merged else ""
    info = GgufInfo(name, license=terms, source=source)
    fresh = not job.out.exists()
    try:
        report = gguf_files(model, tokenizer, paths, info, say, ollama=job.ollama, verify=job.verify)
    except KllmError:
        if fresh:
            with contextlib.suppress(OSError):  # a folder with a finished file in it stays
                job.out.rmdir()
        raise
    if merged:
        report["merged"] = merged
    if job.out.suffix != ".gguf":
        _write_card(job.out / "README.md", gguf_card(name, job.source, terms, report), say)
    return report


def _write_card(path: Path, text: str, say: Say) -> None:
    """The folder may be a project's: a README that is no card of ours stays."""
    if path.exists() and CARD_MARK not in path.read_text(encoding="utf-8", errors="replace"):
        say(f"{path} is not of an export and stays as it is: no card is written")
    else:
        write_text(path, text)


def _modelfile(path: Path, count: int) -> Path:
    """Where ollama's Modelfile of one of `count` files goes."""
    return path.with_name("Modelfile" if count == 1 else f"{path.stem}.Modelfile")


def gguf_files(
    model: Transformer,
    tokenizer: Tokenizer | None,
    paths: Mapping[str, Path],
    info: GgufInfo,
    say: Say,
    *,
    ollama: bool,
    verify: bool | None,
) -> dict[str, Any]:
    """Writes one file for each type; none appears under its name before it was verified.

    Args:
        paths: type -> file.
        ollama: also write a Modelfile beside each.
        verify: None verifies models that are small enough.
    """
    if tokenizer is None:
        raise UserError("the model has no tokenizer beside it", where=info.source, hint="--tokenizer DIR")
    if tokenizer.vocab_size > model.shape.vocab_size:
        rows = model.shape.vocab_size
        message = f"the tokenizer has {tokenizer.vocab_size:,} tokens, the model {rows:,} rows"
        raise UserError(message, where=info.source, hint="give the one that the model was trained with")
    model.eval()
    arch = gguf_arch(model.shape)
    template = template_of(tokenizer) if ollama else None  # refused before anything is written
    verifying = verifies(verify, model, say)
    if verifying and llamacpp.available() is None:
        say("read back with the gguf package; llama.cpp itself is asked too after pip install xllamacpp")
    for note in _notes(tokenizer):
        say(note)
    files = []
    for quant, path in paths.items():
        facts = _one(model, tokenizer, path, quant, info, verifying)
        for note in _fallbacks(quant, facts["tensor_types"]):
            say(f"{path.name}: {note}")
        if template is not None:
            beside = _modelfile(path, len(paths))
            length = model.shape.max_position_embeddings
            write_text(beside, modelfile(path.name, tokenizer, template, num_ctx=length))
            facts["modelfile"] = str(beside)
        files.append(facts)
    return {
        "source": info.source,
        "name": info.name,
        "arch": arch,
        "parameters": model.num_parameters(),
        "size_label": size_label(model),
        "files": files,
    }


def _one(
    model: Transformer, tokenizer: Tokenizer, path: Path, quant: str, info: GgufInfo, verifying: bool
) -> dict[str, Any]:
    with new_file(path) as aside:
        facts = {**write_gguf(model, tokenizer, aside, quant, info).to_dict(), "path": str(path)}
        if verifying:
            from kllm.export.verify_gguf import verify_gguf

            facts["verified"] = verify_gguf(model, tokenizer, aside, quant)
    return facts


def export_name(source: str) -> str:
    """A file name for what `source` names: the run's, the folder's or the file's own."""
    place = Path(source)
    file = place.suffix in MODEL_FILES  # on the disk or on the hub
    parts = [place.stem if file else place.name, *(p.name for p in place.resolve().parents)]
    # a stage's final/ or a checkpoint says less than the run above it
    plain = [p for p in parts if p and p not in ("final", "checkpoints") and not p.startswith("step-")]
    return plain[0] if plain else "model"


def _paths(job: GgufExport, name: str) -> dict[str, Path]:
    for quant in job.quants:
        if quant not in QUANTS:
            hint = f"known: {', '.join(QUANTS)}"
            raise UserError(f"unknown type {quant!r}", where="flag --quant", hint=hint)
    if job.out.suffix == ".gguf":
        if len(job.quants) != 1:
            raise UserError("one file cannot hold several types", where=str(job.out), hint="name a folder")
        paths = {job.quants[0]: job.out}
    else:
        if job.out.is_file():
            hint = "name a new folder, or a file that ends in .gguf"
            raise UserError("is a file; a folder is written", where=str(job.out), hint=hint)
        paths = {quant: job.out / f"{name}-{quant}.gguf" for quant in job.quants}
    for path in paths.values():
        if path.is_dir():
            raise UserError("is a folder; a file is written", where=str(path), hint="name a new file")
        if path.exists() and Path(job.source).exists() and path.resolve() == resolve(job.source).resolve():
            raise UserError("source and result are the same file", str(path), hint="name another OUT")
        for written in (path, *([_modelfile(path, len(paths))] if job.ollama else [])):
            if written.exists() and not job.overwrite:
                raise UserError("is there already", where=str(written), hint="--overwrite, or name a new one")
    return paths


def _notes(tokenizer: Tokenizer) -> list[str]:
    spec = tokenizer.spec()
    if spec.get("normalizer") and not spec["model"].get("byte_fallback"):
        kind = spec["normalizer"].get("type")
        return [f"the tokenizer normalises text ({kind}), llama.cpp does not: only odd text differs"]
    return []


def _fallbacks(quant: str, types: Mapping[str, int]) -> list[str]:
    """Which tensors are of another type than asked for, because of their widths."""
    expected = {
        "q4_k_m": {"q4_k", "q6_k"},
        "q5_k_m": {"q5_k", "q6_k"},
        "q6_k": {"q6_k"},
    }.get(quant, {quant, "q8_0"})
    # q5_k, q6_k and q8_0 may also be the mix's own choice for some tensors
    expected |= {"q5_k", "q6_k"}
    others = {kind: n for kind, n in types.items() if kind not in expected | {"f32"}}
    if set(others) <= {"q8_0"} and quant != "q6_k":
        others = {}
    if not others:
        return []
    shown = ", ".join(f"{n} in {kind}" for kind, n in sorted(others.items()))
    return [f"widths that are no multiple of the type's block: {shown}"]
