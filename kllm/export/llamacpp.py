"""Asks llama.cpp what it makes of a GGUF file, through whichever binding is installed.

llama.cpp ends its process when a file displeases it, so it runs in a child: `python -m
kllm.export.llamacpp` reads one JSON question on stdin and answers with one JSON line.
"""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from kllm.errors import KllmError

BINDINGS = {"llama_cpp": "llama-cpp-python", "xllamacpp": "xllamacpp"}
"""Module -> package, the one that gives raw logits first."""
TOP = 20
_MARK = "KLLM-ANSWER "


@dataclass(frozen=True)
class Continuation:
    """What llama.cpp said after one prompt."""

    tokens: list[int]
    """Greedy tokens."""
    logprobs: list[dict[int, float]]
    """For each of them the likeliest tokens and their natural log-probabilities."""


@dataclass(frozen=True)
class Answer:
    """reader: the binding and its version; texts: ids of each text; continuations: one a prompt."""

    reader: str
    texts: list[list[int]]
    continuations: list[Continuation]


def available(binding: str | None = None) -> str | None:
    """The module of an installed binding (of `binding` if given), None without one."""
    wanted = [binding] if binding else list(BINDINGS)
    return next((name for name in wanted if importlib.util.find_spec(name) is not None), None)


def ask(
    path: Path,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    texts: Sequence[str] = (),
    *,
    binding: str | None = None,
    timeout: float = 600.0,
) -> Answer:
    """Greedy continuations of token prompts and token ids of texts, KV cache in float32.

    Args:
        path: the GGUF file.
        prompts: token ids; nothing is put before them.
        new_tokens: of each continuation; end tokens do not end it.
        texts: tokenised as they are, special tokens in them read as text.

    Raises:
        KllmError: no binding, or llama.cpp refuses the file (with its own last words).
    """
    module = available(binding)
    if module is None:
        raise KllmError("no llama.cpp here", where=str(path), hint="pip install --no-deps xllamacpp")
    question = {
        "module": module,
        "path": str(path),
        "prompts": [list(p) for p in prompts],
        "new_tokens": new_tokens,
        "texts": list(texts),
    }
    command = [sys.executable, "-m", "kllm.export.llamacpp"]
    try:
        done = subprocess.run(
            command, input=json.dumps(question), capture_output=True, text=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        raise KllmError(f"llama.cpp did not answer within {timeout:.0f} s", where=str(path)) from None
    line = next((x for x in done.stdout.splitlines() if x.startswith(_MARK)), None)
    if line is None:
        raise KllmError(f"llama.cpp refuses it: {_last_words(done.stderr)}", where=str(path))
    found = json.loads(line.removeprefix(_MARK))
    continuations = [
        Continuation(c["tokens"], [{int(k): _number(v) for k, v in step} for step in c["logprobs"]])
        for c in found["continuations"]
    ]
    return Answer(
        f"llama.cpp ({BINDINGS[module]} {version(BINDINGS[module])})", found["texts"], continuations
    )


def _number(value: float | None) -> float:
    """JSON has no NaN: one binding says null."""
    return math.nan if value is None else value


def _last_words(stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    for words in (("error loading", "ggml_assert"), ("error", "failed", "exception")):
        if telling := [line for line in lines if any(word in line.lower() for word in words)]:
            return telling[0][-300:]
    return (lines or ["no reason given"])[-1][-300:]


def _main() -> None:
    question = json.loads(sys.stdin.read())
    answer = {"llama_cpp": _with_llama_cpp, "xllamacpp": _with_xllamacpp}[question["module"]](question)
    sys.stdout.write(f"\n{_MARK}{json.dumps(answer)}\n")
    sys.stdout.flush()


def _with_llama_cpp(question: dict[str, Any]) -> dict[str, Any]:
    import llama_cpp

    longest = max((len(p) for p in question["prompts"]), default=1) + question["new_tokens"]
    model = llama_cpp.Llama(
        question["path"],
        n_ctx=max(64, longest + 8),
        n_batch=max(64, longest),
        n_ubatch=max(64, longest),
        n_threads=1,
        logits_all=False,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        verbose=False,
    )
    texts = [model.tokenize(t.encode(), add_bos=False, special=False) for t in question["texts"]]
    continuations = []
    for prompt in question["prompts"]:
        model.reset()
        tokens: list[int] = []
        steps: list[list[tuple[int, float]]] = []
        fresh = list(prompt)
        for _ in range(question["new_tokens"]):
            model.eval(fresh)
            logits = np.ctypeslib.as_array(model._ctx.get_logits_ith(-1), shape=(model.n_vocab(),))
            steps.append(_top(logits.astype(np.float64)))
            fresh = [steps[-1][0][0]]
            tokens += fresh
        continuations.append({"tokens": tokens, "logprobs": steps})
    return {"texts": texts, "continuations": continuations}


def _top(logits: np.ndarray) -> list[tuple[int, float]]:
    """The likeliest tokens with their log-probabilities, best first."""
    best = logits.max()
    total = best + math.log(np.exp(logits - best).sum())
    top = np.argpartition(-logits, min(TOP, len(logits) - 1))[:TOP]
    return [(int(i), float(logits[i] - total)) for i in top[np.argsort(-logits[top], kind="stable")]]


def _with_xllamacpp(question: dict[str, Any]) -> dict[str, Any]:
    import urllib.request

    import xllamacpp

    longest = max((len(p) for p in question["prompts"]), default=1) + question["new_tokens"]
    params = xllamacpp.CommonParams()
    params.model.path = question["path"]
    params.n_ctx = max(256, longest + 8)
    params.n_parallel = 1
    params.warmup = False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)

    def post(where: str, body: dict[str, Any]) -> Any:
        data = json.dumps(body).encode()
        request = urllib.request.Request(
            f"{server.listening_address}/{where}", data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.loads(answer.read())

    plain = {"add_special": False, "parse_special": False}
    texts = [post("tokenize", {"content": t, **plain})["tokens"] for t in question["texts"]]
    greedy = {"n_predict": 1, "temperature": -1, "n_probs": TOP, "return_tokens": True, "cache_prompt": True}
    continuations = []
    for prompt in question["prompts"]:
        tokens: list[int] = []
        steps: list[list[tuple[int, float]]] = []
        for _ in range(question["new_tokens"]):
            # one by one: the server keeps no probabilities of tokens that end inside a character
            found = post("completion", {"prompt": [*prompt, *tokens], **greedy})
            seen = found.get("completion_probabilities") or [{"top_logprobs": []}]
            steps.append([(p["id"], p["logprob"]) for p in seen[0]["top_logprobs"]])
            tokens += found["tokens"] or [steps[-1][0][0]]
        continuations.append({"tokens": tokens, "logprobs": steps})
    return {"texts": texts, "continuations": continuations}


if __name__ == "__main__":
    _main()
