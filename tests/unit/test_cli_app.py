"""The command itself: quick help, one line for every mistake, exit codes."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import pytest

from kllm.cli.app import COMMANDS, main
from kllm.errors import Interrupted, KllmError, UserError, UserErrors

HEAVY = ("torch", "numpy", "tokenizers", "transformers", "jinja2", "safetensors")


def call(capsys, *arguments):
    """(exit code, stdout, stderr) of `kllm ARGUMENTS` in this process."""
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    captured = capsys.readouterr()
    return caught.value.code, captured.out, captured.err


def kllm(*arguments, **environment):
    """The same in a process of its own, with a pipe for stdout."""
    env = {**os.environ, "NO_COLOR": "1", "COLUMNS": "100", **environment}
    return subprocess.run(
        [sys.executable, "-m", "kllm", *arguments], capture_output=True, text=True, env=env, timeout=60
    )


@pytest.mark.parametrize(
    "arguments", [["--help"], ["pretrain", "--help"], ["recipe", "--help"], ["info", "-h"]]
)
def test_help_imports_nothing_heavy(arguments):
    code = (
        "import sys\nfrom kllm.cli.app import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit as e:\n    assert e.code == 0, e.code\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == "[]"
    assert "Usage: kllm" in done.stdout
    assert "\x1b" not in done.stdout


@pytest.mark.bench
@pytest.mark.parametrize("arguments", [["--help"], ["pretrain", "--help"]])
def test_help_is_instant(arguments):
    """Below 0.3 s of processor time (the best of some tries: other processes may be busy)."""
    best = 9.0
    for _ in range(6):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert kllm(*arguments).returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        best = min(best, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
        if best < 0.3:
            return
    pytest.fail(f"kllm {' '.join(arguments)} takes {best:.2f} s")


def test_every_command_has_help(capsys):
    for path, _, _, text in COMMANDS:
        code, out, _ = call(capsys, *path.split(), "--help")
        assert code == 0
        assert out.startswith(f"Usage: kllm {path} ")
        assert text
    code, out, _ = call(capsys, "--help")
    assert code == 0
    for path, _, _, text in COMMANDS:
        assert path.split()[0] in out
        assert " " in path or text in out


def test_help_never_cuts_a_flag(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    _, out, _ = call(capsys, "pretrain", "--help")
    assert "--model.max_position_embeddings N" in out
    assert "--train.dtype auto|float32|bfloat16" in out
    assert "--[no-]dataset.packing" in out
    assert "[default: 0.0005]" in out
    assert "…" not in out


def test_version(capsys):
    code, out, _ = call(capsys, "--version")
    assert code == 0
    assert out.startswith("kllm 0.")


def test_no_arguments_show_help(capsys):
    code, out, err = call(capsys)
    assert code == 2
    assert "Usage: kllm" in out + err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sftt"], "Did you mean 'sft'?"),
        (["recipe", "lss"], "Did you mean 'ls'?"),
        (["pretrain", "--learning_rate", "1"], "kllm calls it --lr"),
        (["pretrain", "--stepz", "1"], "--steps"),
        (["pretrain", "--lr"], "--lr"),
        (["pretrain", "--lr", "abc"], "flag --lr: pretrain.optim.lr: expected a number, got 'abc'"),
        (["pretrain", "--optim.name", "sgd"], "adamw"),
        (["pretrain", "--steps", "5", "--tokens", "1M"], "give one of train.steps"),
        (["pretrain", "--preset", "k-tiny", "--model", "x"], "not both"),
        (["pretrain", "--stage", "x"], "no --recipe is given"),
        (["pretrain", "extra"], "extra"),
        (["sft"], "needs a model to start from"),
        (["sft", "--preset", "k-tiny"], "needs a tokenizer"),
        (["eval"], "needs a model to start from"),
        (["eval", "a", "--model", "b"], "given twice"),
        (["run"], "which recipe?"),
        (["run", "quickstart", "--recipe", "quickstart"], "given twice"),
        (["run", "--recipe", "nowhere.yaml"], "no such recipe file"),
        (["run", "--recipe", "quickstart", "--set", "x"], "KEY=VALUE"),
        (["info", "k-smal"], "did you mean k-small?"),
        (["info", "k-small", "--seq-len", "0"], "at least 1"),
        (["recipe", "show", "quikstart"], "did you mean quickstart?"),
        (["recipe", "cp", "quickstart", "no/such/folder/x.yaml"], "no such folder"),
        (["recipe", "check", "nowhere.yaml"], "no such recipe file"),
        (["data", "inspect", "nowhere.jsonl"], "nowhere.jsonl"),
        (["runs", "ls", "nowhere"], "no such folder"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(capsys, monkeypatch, tmp_path, arguments, words):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(capsys, *arguments)
    assert code == 2
    assert words in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert out == ""


def test_all_mistakes_of_a_recipe_are_shown(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text("sed: 1\nstages:\n- stage: tokenizer\n  vocab: 3\n")
    code, _, err = call(capsys, "run", "--recipe", "r.yaml")
    assert code == 2
    assert [line.split(": ")[1] for line in err.splitlines()] == ["r.yaml:1", "r.yaml:4"]


def stub(monkeypatch, effect):
    import kllm.run.listing

    def find_runs(folder):
        raise effect

    monkeypatch.setattr(kllm.run.listing, "find_runs", find_runs)


@pytest.mark.parametrize(
    ("effect", "code", "words"),
    [
        (KllmError("disk full", where="runs/x"), 1, "error: runs/x: disk full\n"),
        (UserError("bad\nthing", hint="try"), 2, "error: bad thing (try)\n"),
        (UserErrors([UserError("a"), UserError("b")]), 2, "error: a\nerror: b\n"),
        (KeyboardInterrupt(), 130, ""),
        (Interrupted(15), 143, "interrupted\n"),
    ],
)
def test_exit_codes(capsys, monkeypatch, effect, code, words):
    stub(monkeypatch, effect)
    got, _, err = call(capsys, "runs", "ls")
    assert got == code
    assert err == words or (code == 130 and "Traceback" not in err)


def test_a_bug_of_ours_shows_where(capsys, monkeypatch):
    stub(monkeypatch, ZeroDivisionError("oops"))
    with pytest.raises(ZeroDivisionError):
        main(["runs", "ls"])


def test_debug_keeps_the_traceback(monkeypatch):
    stub(monkeypatch, UserError("bad"))
    with pytest.raises(UserError):
        main(["--debug", "runs", "ls"])
    with pytest.raises(UserError):
        main(["runs", "ls", "--debug"])


def test_a_reader_that_goes_away_is_no_error():
    script = f"{sys.executable} -m kllm recipe schema | head -n 1"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout == "{\n"
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


def test_completion_offers_commands_and_flags():
    done = kllm(_KLLM_COMPLETE="complete_bash", COMP_WORDS="kllm pre", COMP_CWORD="1")
    assert "pretrain" in done.stdout
    done = kllm(_KLLM_COMPLETE="complete_bash", COMP_WORDS="kllm pretrain --optim.sch", COMP_CWORD="2")
    assert "--optim.schedule" in done.stdout
    done = kllm(_KLLM_COMPLETE="complete_bash", COMP_WORDS="kllm pretrain --optim.schedule ", COMP_CWORD="3")
    assert "cosine" in done.stdout
