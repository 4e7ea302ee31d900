"""Puts a directory on the hub (HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE are honoured)."""

from __future__ import annotations

import re
from pathlib import Path

from kllm.errors import KllmError, UserError


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
        api.upload_folder(folder_path=directory, repo_id=repo, commit_message="Upload by kllm convert")
    except Exception as e:  # the hub raises many kinds; all mean the same to the user
        status = getattr(getattr(e, "response", None), "status_code", None)
        hint = "set HF_TOKEN to a token that may write there" if status in (401, 403) else None
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0][:200]
        raise KllmError(f"the hub refused the upload: {reason}", where=repo, hint=hint) from None
    return str(url)
