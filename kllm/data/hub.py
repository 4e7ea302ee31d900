"""Data sets from the Hugging Face hub and from ModelScope, fetched on first use.

`owner/name`, `hf:owner/name` or `hf:owner/name/file.jsonl` mean the Hugging Face hub (HF_ENDPOINT,
HF_HOME and HF_HUB_OFFLINE are honoured by its client); `ms:owner/name[/file]` means ModelScope.
`@revision` may follow the name.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

from kllm.errors import KllmError, UserError

_NAME = r"([\w-][\w.-]*/[\w.-]+)(?:@([\w.-]+))?"
_ID = re.compile(_NAME)
_PREFIXED = re.compile(rf"(?:hf|ms|modelscope):{_NAME}(?:/(.+))?")
_PATTERNS = ["*.jsonl*", "*.json", "*.json.gz", "*.json.zst", "*.parquet", "*.txt", "*.txt.gz", "*.txt.zst"]
_NOT_DATA = {"dataset_infos.json", "dataset_info.json", "state.json", "config.json"}


def is_hub_id(source: str) -> bool:
    """Whether `source` names a hub data set; a bare `owner/name` counts if no such folder is here."""
    if _PREFIXED.fullmatch(source):
        return True
    return bool(_ID.fullmatch(source)) and not Path(source).parent.exists()


def fetch(source: str) -> Path:
    """Downloads the data files of a hub id (or finds them in the client's cache); their folder or file.

    Raises:
        UserError: the client package is missing, or there is no such data set or file.
        KllmError: the hub cannot be reached.
    """
    match = _PREFIXED.fullmatch(source) or _ID.fullmatch(source)
    if match is None:
        raise UserError("not the name of a data set", source, "write owner/name")
    name, revision = str(match[1]), match[2]
    inner = match[3] if match.re is _PREFIXED else None
    modelscope = source.startswith(("ms:", "modelscope:"))
    patterns = [inner] if inner else _PATTERNS
    download = _modelscope if modelscope else _huggingface
    folder = Path(download(name, revision, patterns, source))
    found = folder / inner if inner else folder
    if not found.exists():
        raise UserError(f"the data set {name} has no file {inner}", source)
    return found


def is_metadata(path: Path) -> bool:
    """Files that lie beside a data set's rows but are none."""
    return path.name in _NOT_DATA


def _client(module: str, source: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        hint = f"pip install {extra}, or give a local file"
        message = f"no such file here, and data sets of a hub need the package {module}"
        raise UserError(message, source, hint) from None


def _huggingface(name: str, revision: str | None, patterns: list[str], source: str) -> str:
    hub = _client("huggingface_hub", source, "'kllm[hub]'")
    try:
        folder = hub.snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=patterns)
        return str(folder)
    except Exception as error:  # the client raises a dozen unrelated types
        raise _explain(error, name, source) from error


def _modelscope(name: str, revision: str | None, patterns: list[str], source: str) -> str:
    client = _client("modelscope", source, "modelscope")
    try:
        return str(client.dataset_snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:
        raise _explain(error, name, source) from error


def _explain(error: Exception, name: str, source: str) -> KllmError:
    kind = type(error).__name__
    if kind == "GatedRepoError":
        return UserError(f"the data set {name} is gated", source, "accept its terms on the hub and log in")
    if kind in ("RepositoryNotFoundError", "HFValidationError", "NotExistError"):
        return UserError(f"no such file here, and no data set {name} on the hub", source)
    reason = (str(error).strip() or kind).splitlines()[0]
    hint = "check the network, or HF_ENDPOINT and HF_HUB_OFFLINE, or give a local file"
    message = f"no such file here, and the data set {name} could not be fetched: {reason}"
    return KllmError(message, source, hint)
