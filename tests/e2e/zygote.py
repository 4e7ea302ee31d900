"""A process that has torch imported and forks for every command: importing it anew takes most of a command's time.

Reads a line of JSON per command ({args, cwd, env, out, err}: files for its output), answers with its exit code.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import traceback


def run(job: dict) -> int:
    """In the child: becomes the command line."""
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["env"])
    sys.path.insert(0, job["cwd"])
    for number, name, mode in (
        (0, os.devnull, os.O_RDONLY),
        (1, job["out"], os.O_WRONLY),
        (2, job["err"], os.O_WRONLY),
    ):
        os.dup2(os.open(name, mode), number)
    sys.argv = ["kllm", *job["args"]]
    from kllm.cli.app import main

    code = 0
    try:
        main()
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def serve() -> None:
    """Until stdin ends."""
    import safetensors.torch
    import tokenizers
    import torch

    assert torch and tokenizers and safetensors
    if sys.argv[1:] == ["transformers"]:
        from transformers import AutoModelForCausalLM, LlamaForCausalLM

        assert AutoModelForCausalLM and LlamaForCausalLM
    else:
        assert "huggingface_hub" not in sys.modules, "it reads the environment when it is imported"
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                code = run(json.loads(line))
            finally:
                os._exit(code)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    serve()
