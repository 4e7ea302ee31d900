"""Modelfiles: the Go template says what the Jinja template says, or the export is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from chat_support import TEXT, chat_tokenizer

from kllm.errors import UserError
from kllm.export.ollama import find_frame, go_template, modelfile, template_of
from kllm.tokenizer.chat import ChatEncoder
from kllm.tokenizer.tokenizer import Tokenizer
from kllm.tokenizer.train import train_tokenizer

S, U = {"role": "system", "content": "Be nice."}, {"role": "user", "content": "hi\n there {{ x }}"}
A, V = {"role": "assistant", "content": "hello"}, {"role": "user", "content": "再见"}
FUNCTION = {"name": "add", "description": "adds", "parameters": {"type": "object"}}
TOOL = {"type": "function", "function": FUNCTION}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}],
}
RESULT = {"role": "tool", "content": "3"}
PLAIN = [[U], [S, U], [U, A, V], [S, U, A, V]]
WITH_TOOLS: list[tuple[list[dict[str, Any]], list[dict[str, Any]]]] = [
    *((messages, []) for messages in PLAIN),
    ([U], [TOOL]),
    ([S, U], [TOOL, TOOL]),
    ([S, U, CALL, RESULT], [TOOL]),
    ([U, CALL, RESULT, A, V], [TOOL]),
]
DEFAULT_SYSTEM = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}[sys]I am X.[/sys]{% endif %}"
    "{% if m.role == 'system' %}[sys]{{ m.content }}[/sys]{% else %}<|im_start|>{{ m.role }}: {{ m.content }}"
    "<|im_end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return chat_tokenizer()


def test_the_modelfile(tokenizer: Tokenizer) -> None:
    text = modelfile("m-q8_0.gguf", tokenizer, template_of(tokenizer), num_ctx=2048)
    assert text.startswith('FROM ./m-q8_0.gguf\nTEMPLATE """')
    assert text.count('"""') == 2
    for line in (
        'PARAMETER stop "<|im_end|>"',
        'PARAMETER stop "<|endoftext|>"',
        'PARAMETER stop "<|im_start|>"',
        "PARAMETER num_ctx 2048",
    ):
        assert line in text.splitlines()
    assert "{{-" not in text and "-}}" not in text  # they would trim the template's own newlines


def test_a_model_without_a_template_continues_the_bare_prompt() -> None:
    from dataclasses import replace

    bare = train_tokenizer(TEXT * 5, 320, max_bytes=1_000_000, min_frequency=1)[0]
    spec = json.dumps(bare.spec()).replace("<|im_start|>", "<|a|>").replace("<|im_end|>", "<|b|>")
    source = replace(bare._source, spec=spec, chat_template=None, config={"eos_token": "<|b|>"})
    assert template_of(Tokenizer(source)) == "{{ .Prompt }}"


@pytest.mark.parametrize("messages", PLAIN)
@pytest.mark.parametrize("template", [None, DEFAULT_SYSTEM], ids=["own", "default-system"])
def test_the_frame_plays_what_jinja_renders(
    template: str | None, messages: list[dict[str, str]], tokenizer: Tokenizer
) -> None:
    given = tokenizer if template is None else tokenizer.with_chat_template(template)
    encoder = ChatEncoder(given)
    played = find_frame(encoder).play(messages)
    assert played == encoder.text(messages, add_generation_prompt=True)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ loop.index }}: {{ m.content }}\n{% endfor %}",
        "{{ messages[-1].content }}<|im_end|>",
        "{% for m in messages %}<|im_start|>{{ m.content | upper }}<|im_end|>{% endfor %}",
    ],
)
def test_a_template_that_is_no_row_of_turns_is_refused(template: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="ollama"):
        template_of(tokenizer.with_chat_template(template))


# The template engine that ollama uses, with the two of its types that print themselves as JSON.
GO = """
package main

import ("encoding/json"; "fmt"; "os"; "strings"; "text/template")

type Text string
func (t Text) String() string { return string(t) }
type Function struct { Name string; Arguments Text }
type Call struct { Function Function }
type Message struct { Role, Content string; ToolCalls []Call }
type Tool struct { Type string; Function Text }
type Case struct { Messages []Message; Tools []Tool }

func main() {
    var in struct { Template string; Cases []Case }
    if err := json.NewDecoder(os.Stdin).Decode(&in); err != nil { panic(err) }
    t := template.Must(template.New("t").Parse(in.Template))
    for _, c := range in.Cases {
        var out strings.Builder
        if err := t.Execute(&out, c); err != nil { panic(err) }
        line, _ := json.Marshal(out.String())
        fmt.Println(string(line))
    }
}
"""


def played_by_go(template: str, cases: list[Any], folder: Path) -> list[str]:
    def message(m: dict[str, Any]) -> dict[str, Any]:
        calls = [c["function"] for c in m.get("tool_calls", [])]
        return {
            "Role": m["role"],
            "Content": m["content"],
            "ToolCalls": [
                {"Function": {"Name": c["name"], "Arguments": json.dumps(c["arguments"])}} for c in calls
            ],
        }

    (folder / "main.go").write_text(GO)
    asked = [
        {
            "Messages": [message(m) for m in messages],
            "Tools": [{"Type": "function", "Function": json.dumps(t["function"])} for t in tools],
        }
        for messages, tools in cases
    ]
    done = subprocess.run(
        ["go", "run", "main.go"],
        cwd=folder,
        input=json.dumps({"Template": template, "Cases": asked}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.skipif(shutil.which("go") is None, reason="no Go compiler")
def test_go_writes_what_jinja_renders(tokenizer: Tokenizer, tmp_path: Path) -> None:
    encoder = ChatEncoder(tokenizer)
    found = played_by_go(go_template(find_frame(encoder)), WITH_TOOLS, tmp_path)
    wanted = [encoder.text(m, tools or None, add_generation_prompt=True) for m, tools in WITH_TOOLS]
    assert found == wanted


@pytest.mark.skipif(shutil.which("go") is None, reason="no Go compiler")
@pytest.mark.parametrize("name", ["minimind", "qwen3", "smollm2"])
def test_go_writes_what_real_templates_render(name: str, data_kit: Path, tmp_path: Path) -> None:
    encoder = ChatEncoder(Tokenizer.load(data_kit / "tokenizers" / name))
    cases = [(messages, []) for messages in PLAIN]
    found = played_by_go(go_template(find_frame(encoder)), cases, tmp_path)
    assert found == [encoder.text(m, add_generation_prompt=True) for m in PLAIN]
