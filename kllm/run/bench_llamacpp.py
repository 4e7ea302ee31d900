"""llama.cpp as a peer of `kllm bench generate`, in a process of its own: it ends that when displeased.

`python -m kllm.run.bench_llamacpp` reads one JSON line that says which file to load, then one per task, and
answers each with one JSON line. It keeps its own clocks, so that waiting for its turn costs nothing.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kllm.errors import KllmError
from kllm.export.llamacpp import BINDINGS
from kllm.run.bench import Cost

_MARK = "KLLM-BENCH "


class LlamaCpp:
    """A loaded GGUF file in a child process.

    Args:
        module: the binding (a key of `BINDINGS`).
        path: the file.
        threads: of the computation.
        streams: most sequences at once.
        context: tokens of the longest one.

    Raises:
        KllmError: llama.cpp refuses the file, with its own last words.
    """

    def __init__(self, module: str, path: Path, *, threads: int, streams: int, context: int) -> None:
        self.path = path
        self._words = tempfile.TemporaryFile()  # noqa: SIM115 (closed by close)
        self._child = subprocess.Popen(
            [sys.executable, "-m", "kllm.run.bench_llamacpp"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._words,
            text=True,
        )
        asked = {"module": module, "path": str(path), "threads": threads}
        self.reader = str(self._ask({**asked, "streams": streams, "context": context})["reader"])

    def run(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, shared: bool
    ) -> tuple[Cost, list[list[int]]]:
        """Continues all prompts at once by `new_tokens` (no end token ends one); greedy unless `shared`.

        Args:
            shared: the prompts are one and the same: computed once, sampled at temperature 1.
        """
        task = {"prompts": [list(p) for p in prompts], "new_tokens": new_tokens, "shared": shared}
        done = self._ask(task)
        return Cost(done["cpu"], done["wall"]), done["tokens"]

    def close(self) -> None:
        """Ends the child."""
        if self._child.stdin:
            self._child.stdin.close()
        try:
            self._child.wait(10)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        if self._child.stdout:
            self._child.stdout.close()
        self._words.close()

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._child.stdin and self._child.stdout
        try:
            self._child.stdin.write(json.dumps(question) + "\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            pass  # its last words say why
        for line in self._child.stdout:  # the bindings chat on stdout too
            if line.startswith(_MARK):
                return dict(json.loads(line.removeprefix(_MARK)))
        self._words.seek(0)
        lines = self._words.read().decode(errors="replace").strip().splitlines() or ["no reason given"]
        raise KllmError(f"llama.cpp ended: {lines[-1][-300:]}", where=str(self.path))


def _main() -> None:
    setup = json.loads(sys.stdin.readline())
    run = {"llama_cpp": _with_llama_cpp, "xllamacpp": _with_xllamacpp}[setup["module"]](setup)
    name = BINDINGS[setup["module"]]
    _answer({"reader": f"llama.cpp ({name} {version(name)})"})
    for line in sys.stdin:
        task = json.loads(line)
        wall, cpu = time.perf_counter(), time.process_time()
        tokens = run(task["prompts"], task["new_tokens"], task["shared"])
        _answer({"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall, "tokens": tokens})


def _answer(found: dict[str, Any]) -> None:
    sys.stdout.write(f"\n{_MARK}{json.dumps(found)}\n")
    sys.stdout.flush()


class _Sequences:
    """Many sequences in one llama.cpp context, one batch a step."""

    def __init__(self, setup: dict[str, Any]) -> None:
        import llama_cpp

        self.lib = lib = llama_cpp
        silent = lib.llama_log_callback(lambda level, text, data: None)
        self.silent = silent  # the library keeps the pointer only
        lib.llama_log_set(silent, None)
        lib.llama_backend_init()
        model = lib.llama_model_load_from_file(setup["path"].encode(), lib.llama_model_default_params())
        if not model:
            raise SystemExit(f"{setup['path']} cannot be loaded")
        each = math.ceil(setup["context"] / 256) * 256
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max = each * setup["streams"], setup["streams"]
        params.n_batch = params.n_ubatch = max(512, setup["context"] * setup["streams"])
        params.n_threads = params.n_threads_batch = setup["threads"]
        self.context = lib.llama_init_from_model(model, params)
        if not self.context:
            raise SystemExit("no context")
        self.batch = lib.llama_batch_init(params.n_batch, 0, 1)
        self.greedy = lib.llama_sampler_init_greedy()
        self.noise = lib.llama_sampler_init_dist(0)

    def feed(self, rows: Sequence[tuple[int, Sequence[int], int]]) -> list[int]:
        """Decodes (sequence, tokens, first position); returns where each one's last logits are."""
        batch, at, last = self.batch, 0, []
        for sequence, tokens, start in rows:
            for i, token in enumerate(tokens):
                batch.token[at], batch.pos[at] = token, start + i
                batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence
                batch.logits[at] = i == len(tokens) - 1
                at += 1
            last.append(at - 1)
        batch.n_tokens = at
        if code := self.lib.llama_decode(self.context, batch):
            raise SystemExit(f"llama_decode: {code}")
        return last

    def run(self, prompts: list[list[int]], new_tokens: int, shared: bool) -> list[list[int]]:
        lib, n = self.lib, len(prompts)
        memory = lib.llama_get_memory(self.context)
        lib.llama_memory_clear(memory, True)
        sampler = self.noise if shared else self.greedy
        if shared:
            where = self.feed([(0, prompts[0], 0)]) * n
            for k in range(1, n):
                lib.llama_memory_seq_cp(memory, 0, k, -1, -1)
        else:
            where = self.feed([(k, prompt, 0) for k, prompt in enumerate(prompts)])
        out: list[list[int]] = [[] for _ in prompts]
        for step in range(new_tokens):
            for k in range(n):
                out[k].append(lib.llama_sampler_sample(sampler, self.context, where[k]))
            if step < new_tokens - 1:
                where = self.feed([(k, out[k][-1:], len(prompts[k]) + step) for k in range(n)])
        return out


def _with_llama_cpp(setup: dict[str, Any]) -> Any:
    return _Sequences(setup).run


def _with_xllamacpp(setup: dict[str, Any]) -> Any:
    import urllib.request

    import xllamacpp

    each = math.ceil(setup["context"] / 256) * 256
    params = xllamacpp.CommonParams()
    params.model.path = setup["path"]
    params.n_ctx, params.n_parallel = each * setup["streams"], setup["streams"]
    params.warmup = False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = setup["threads"]
    server = xllamacpp.Server(params)
    pool = ThreadPoolExecutor(setup["streams"])

    def post(body: dict[str, Any]) -> list[int]:
        request = urllib.request.Request(
            f"{server.listening_address}/completion",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=600) as answer:
            return list(json.loads(answer.read())["tokens"])

    def run(prompts: list[list[int]], new_tokens: int, shared: bool) -> list[list[int]]:
        how: dict[str, Any] = {
            "n_predict": new_tokens,
            "ignore_eos": True,
            "return_tokens": True,
            "cache_prompt": False,
        }
        how |= {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} if shared else {"temperature": -1}
        # its server computes a shared prompt once per slot
        return list(pool.map(post, [{"prompt": prompt, **how} for prompt in prompts]))

    return run


if __name__ == "__main__":
    _main()
