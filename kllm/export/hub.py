"""The Hugging Face hub, both ways: fetches models, tokenizers and GGUF files, uploads directories.

HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE are honoured by the hub's own client. No torch.
"""

from __future__ import annotations

import errno
import logging
import re
import sys
from pathlib import Path

from kllm.errors import KllmError, UserError
from kllm.tokenizer.source import TOKENIZER_FILES

_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w.-]+))?(?:/([\w./-]+\.gguf))?")
_PAIR = ["vocab.json", "merges.txt"]
_TOKENIZER = [name for name in TOKENIZER_FILES if name not in _PAIR]
_FILES = {
    "config": ["config.json"],
    "tokenizer": _TOKENIZER,
    "adapter": ["adapter_config.json", "adapter_model.safetensors"],
    "model": ["config.json", *_TOKENIZER, "model.safetensors", "model-*.safetensors", "*.index.json"],
}
"""What is fetched of a repository, whatever else is in it: other formats of the same weights, above all."""
_STALE = ["*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json"]
_BIN = ["pytorch_model.bin", "pytorch_model-*.bin"]


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form of a model on the hub: OWNER/NAME[@REVISION][/FILE.gguf]."""
    return _ID.fullmatch(name) is not None and not name.startswith(".") and ".." not in name


def fetch(name: str, what: str = "model") -> Path:
    """A folder in the hub's own cache with a repository's model, or one GGUF file.

    Args:
        name: OWNER/NAME, OWNER/NAME@REVISION, OWNER/NAME/FILE.gguf.
        what: `model`, or only its `config` or its `tokenizer`; or an `adapter`.

    Raises:
        UserError: no such repository, revision or file, or not without a token; nothing cached offline.
        KllmError: the hub cannot be reached.
    """
    known = _ID.fullmatch(name)
    if known is None or not is_hub_id(name):
        raise UserError("no such file or directory", where=name, hint="a hub id is OWNER/NAME")
    _prepare_client(name)
    repo, revision, file = known.groups()
    try:
        if file:
            from huggingface_hub import hf_hub_download

            return Path(hf_hub_download(repo, file, revision=revision))
        place = _snapshot(repo, revision, _FILES[what])
        second = _second_choice(place, what)
        if second:
            place = _snapshot(repo, revision, [*_FILES[what], *second])
    except Exception as e:  # the client raises many kinds
        raise _explained(e, name, file) from None
    if fault := _lacking(place, what):
        raise UserError(fault, where=name, hint=_instead(repo, revision, name))
    return place


def _prepare_client(name: str) -> None:
    try:
        from huggingface_hub.utils import disable_progress_bars
    except ImportError:
        raise UserError(
            "no such directory, and hub ids need huggingface_hub",
            where=name,
            hint="pip install 'kllm[hub]', or give a local directory",
        ) from None
    # its only warning says in other words what `fetch` says
    logging.getLogger("huggingface_hub._snapshot_download").setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        disable_progress_bars()


def _snapshot(repo: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    # patterns match across folders: onnx/config.json is not wanted
    return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"]))


def _second_choice(place: Path, what: str) -> list[str]:
    """What to ask for because the usual form of it was not there."""
    weights = _BIN if what == "model" and not any(place.glob("*.safetensors")) else []
    pair = _PAIR if what in ("model", "tokenizer") and not (place / "tokenizer.json").exists() else []
    return [*weights, *pair]


def _lacking(place: Path, what: str) -> str | None:
    if what == "tokenizer":
        found = any((place / name).exists() for name in ("tokenizer.json", "vocab.json"))
        return None if found else "the repository has no tokenizer.json"
    if what == "adapter":
        missing = [name for name in _FILES["adapter"] if not (place / name).exists()]
        return f"the repository has no {missing[0]}: no LoRA adapter" if missing else None
    if not (place / "config.json").exists():
        return "the repository has no config.json: no model that can be read"
    weights = what == "config" or any(place.glob("*.safetensors")) or any(place.glob("*.bin"))
    return None if weights else "the repository has no weights in model.safetensors or pytorch_model.bin"


def _instead(repo: str, revision: str | None, name: str) -> str | None:
    """The GGUF files that a repository has to offer, or that only a part of it is in the cache."""
    from huggingface_hub import HfApi

    try:
        files = HfApi().list_repo_files(repo, revision=revision)
    except Exception:
        return "only a part of it is in the cache; unset HF_HUB_OFFLINE to fetch the rest"
    ggufs = [file for file in files if file.endswith(".gguf")]
    return f"name one of its files: {name}/{ggufs[0]}" if ggufs else None


def _explained(error: Exception, name: str, file: str | None) -> KllmError:
    """One line for what the client raised; its classes differ between versions, their names do not."""
    missing = "no such file" if file else "no such directory"
    chain: list[BaseException] = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    kinds = {kind.__name__ for e in chain for kind in type(e).__mro__}
    codes = (getattr(getattr(e, "response", None), "status_code", None) for e in chain)
    status = next((code for code in codes if code), None)
    if "OfflineModeIsEnabled" in kinds:
        hint = "unset HF_HUB_OFFLINE to fetch it, or give a local path"
        return UserError(f"{missing}, not in the hub's cache, and HF_HUB_OFFLINE is set", name, hint)
    if "GatedRepoError" in kinds:
        hint = "accept its terms on the hub, then set HF_TOKEN"
        return UserError(f"{missing}, and the hub's model is gated", name, hint)
    if kinds & {"RepositoryNotFoundError", "HFValidationError"}:
        hint = "check the name; a private one needs HF_TOKEN, set to a token that may read it"
        return UserError(f"{missing}, and no such model on the hub", name, hint)
    if "RevisionNotFoundError" in kinds:
        return UserError("the hub's model has no such revision", name, "a branch, a tag or a commit")
    if "RemoteEntryNotFoundError" in kinds or (status == 404 and file):
        return UserError(f"the hub's repository has no file {file}", name, "check the name on its page")
    if status in (401, 403):
        return UserError(f"the hub refuses access ({status})", name, "is HF_TOKEN a token that may read it?")
    for e in chain:
        if isinstance(e, OSError) and (e.filename or e.errno == errno.ENOSPC):
            hint = "free some space, or set HF_HOME to another disk"
            return KllmError(f"cannot write the hub's cache: {e.strerror}", str(e.filename or name), hint)
    hint = "check the network, HF_ENDPOINT (a mirror) and HTTPS_PROXY, or give a local path"
    return KllmError(f"{missing}, and the hub cannot be reached: {_reason(chain)}", name, hint)


def _reason(chain: list[BaseException]) -> str:
    """The innermost words: the outer ones speak of caches and of what may be wrong."""
    lines = [str(e).strip().splitlines()[0] for e in chain if str(e).strip()]
    errnos = [match[0] for line in lines if (match := re.search(r"\[Errno -?\d+\] [\w ]+", line))]
    return (errnos or lines[-1:] or [type(chain[0]).__name__])[-1][:200]


def check_repo(name: str) -> None:
    """UserError unless `name` can be a repository, so that nobody waits for a conversion first."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"{name!r} is no hub id", where="flag --push", hint="OWNER/NAME")
    try:
        import huggingface_hub  # noqa: F401
    except ImportError:
        raise UserError(
            "pushing needs huggingface_hub", where="flag --push", hint="pip install 'kllm[hub]'"
        ) from None


def push(directory: Path, repo: str, *, private: bool = False) -> str:
    """Uploads every file of `directory` in one commit; the repository is made if it is not there.

    Returns:
        The address of the repository.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        url = api.create_repo(repo, exist_ok=True, private=private)
        api.upload_folder(
            folder_path=directory,
            repo_id=repo,
            commit_message="Upload by kllm convert",
            delete_patterns=_STALE,  # else weights of an earlier upload would go first
        )
    except Exception as e:  # the hub raises many kinds; all mean the same to the user
        status = getattr(getattr(e, "response", None), "status_code", None)
        hint = "set HF_TOKEN to a token that may write there" if status in (401, 403) else None
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0][:200]
        raise KllmError(f"the hub refused the upload: {reason}", where=repo, hint=hint) from None
    return str(url)
