"""A Modelfile for ollama: the chat template as ollama writes it (Go templates), stop tokens, settings.

The turn frame is found by rendering probe conversations with the tokenizer's own Jinja template, and the
Go template is accepted only if, played through, it writes the same text as Jinja does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kllm.errors import UserError
from kllm.tokenizer.chat import ChatEncoder
from kllm.tokenizer.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")
_PROBE = {"system": "0815 rules 0815", "user": "0815 question 0815", "assistant": "0815 answer 0815"}


@dataclass(frozen=True)
class Frame:
    """What a template writes around turns.

    Attributes:
        before, after: role -> text before and after its content.
        header: what begins the answer to come.
        default: what stands first when the conversation has no system turn.
        tools: what stands between the rules and the tools if there are rules, what always stands before
            the tools, and after them; None if the template takes no tools as JSON lines of a system turn.
    """

    before: dict[str, str]
    after: dict[str, str]
    header: str
    default: str
    tools: tuple[str, str, str] | None

    def play(self, messages: Sequence[dict[str, str]]) -> str:
        """The text that the Go template made from this frame writes, with the answer's header."""
        lead = "" if messages and messages[0]["role"] == "system" else self.default
        turns = [self.before[m["role"]] + m["content"] + self.after[m["role"]] for m in messages]
        return lead + "".join(turns) + self.header


def find_frame(encoder: ChatEncoder) -> Frame:
    """The frame of a chat template; UserError for one that is no sequence of framed turns."""

    def text(*roles: str, header: bool = False) -> str:
        messages = [{"role": role, "content": _PROBE[role]} for role in roles]
        return encoder.text(messages, add_generation_prompt=header)

    try:
        user, ruled, again = text("user"), text("system", "user"), text("user", "assistant", "user")
        header = text("user", header=True)[len(user) :]
        twice = text("user", "user")[len(user) :]  # what begins a user's turn, whatever stood before
    except UserError as e:
        raise UserError(f"ollama's template cannot be derived: {e.message}", where="chat template") from None
    lead, _, tail = user.partition(_PROBE["user"])
    user_before = twice.partition(_PROBE["user"])[0]
    rules_before, _, rest = ruled.partition(_PROBE["system"])
    answer_before, _, more = again[len(user) :].partition(_PROBE["assistant"])
    between, answered = (t.partition(_PROBE["user"])[0] for t in (rest, more))
    frame = Frame(
        {"system": rules_before, "user": user_before, "assistant": answer_before},
        {
            "system": between.removesuffix(user_before),
            "user": tail,
            "assistant": answered.removesuffix(user_before),
        },
        header,
        lead.removesuffix(user_before),
        _tools(encoder, user_before),
    )
    for roles in ("user",), ("system", "user"), ("user", "assistant", "user"), ("system", *ROLES[1:], "user"):
        messages = [{"role": role, "content": _PROBE[role]} for role in roles]
        if frame.play(messages) != text(*roles, header=True):
            raise UserError(
                "the chat template is no plain sequence of turns, so ollama's cannot be derived",
                where="chat template",
                hint="leave out --ollama and write the TEMPLATE by hand",
            )
    return frame


def _tools(encoder: ChatEncoder, user_before: str) -> tuple[str, str, str] | None:
    """The texts around a list of tools, if it stands as JSON lines in a system turn with the rules."""
    rules, user = ({"role": role, "content": _PROBE[role]} for role in ("system", "user"))
    tool = {"type": "function", "function": {"name": "probe", "description": "d", "parameters": {}}}
    line = '{"type": "function", "function": {"name": "probe", "description": "d", "parameters": {}}}'
    try:
        one, two = (encoder.text([rules, user], [tool] * n) for n in (1, 2))
        bare = encoder.text([user], [tool])
    except UserError:
        return None
    if one.count(line) != 1 or two != one.replace(line, f"{line}\n{line}"):
        return None
    lead, _, rest = one.partition(line)
    before, _, lead = lead.partition(_PROBE["system"])
    bare_lead = bare.partition(line)[0]
    gap = lead.removesuffix(bare_lead.removeprefix(before))
    end = rest.partition(_PROBE["user"])[0].removesuffix(user_before)
    if bare_lead != before + lead.removeprefix(gap) or not end.startswith("\n"):
        return None
    return gap, lead.removeprefix(gap), end.removeprefix("\n")


def go_template(frame: Frame) -> str:
    """The frame as a Go template over `.Messages`, `.Role`, `.Content`, `.Tools` and `.ToolCalls`.

    No `{{-`: it would trim the frame's own newlines.
    """
    b, a = frame.before, frame.after
    role = '(eq .Role "{}")'
    system, calls, tool = f"{{{{ if {role.format('system')} }}}}", "", ""
    out = []
    if frame.default:
        out.append(
            '{{ if and .Messages (ne (index .Messages 0).Role "system") }}' + frame.default + "{{ end }}"
        )
    if frame.tools is not None:
        gap, lead, end = frame.tools
        rules = "{{ range .Messages }}" + system + "{{ .Content }}" + gap + "{{ end }}{{ end }}"
        listed = '{{ range .Tools }}{"type": "function", "function": {{ .Function }}}\n{{ end }}'
        out.append("{{ if .Tools }}" + b["system"] + rules + lead + listed + end + "{{ end }}")
        system = f"{{{{ if and {role.format('system')} (not $.Tools) }}}}"
        call = '{"name": "{{ .Function.Name }}", "arguments": {{ .Function.Arguments }}}'
        calls = "{{ range .ToolCalls }}<tool_call>\n" + call + "\n</tool_call>{{ end }}"
        response = "<tool_response>\n{{ .Content }}\n</tool_response>"
        tool = f"{{{{ else if {role.format('tool')} }}}}" + b["user"] + response + a["user"]
    out += ["{{ range .Messages }}", system, b["system"], "{{ .Content }}", a["system"]]
    for name, more in (("user", ""), ("assistant", calls)):
        out += [f"{{{{ else if {role.format(name)} }}}}", b[name], "{{ .Content }}", more, a[name]]
    return "".join([*out, tool, "{{ end }}{{ end }}", frame.header])


def template_of(tokenizer: Tokenizer) -> str:
    """The Go template of a tokenizer; the bare prompt for one that has no chat template.

    Raises:
        UserError: its chat template cannot be written as a Go template.
    """
    try:
        encoder = ChatEncoder(tokenizer)
    except UserError:
        if tokenizer.chat_template is not None:
            raise
        return "{{ .Prompt }}"
    template = go_template(find_frame(encoder))
    if '"""' in template:
        raise UserError('the chat template holds """, which a Modelfile cannot quote', where="chat template")
    return template


def modelfile(
    file_name: str, tokenizer: Tokenizer, template: str, *, num_ctx: int, temperature: float = 0.7
) -> str:
    """The Modelfile of a GGUF file in the same folder.

    Args:
        file_name: of the GGUF.
        template: of `template_of`.
        num_ctx: context length in tokens; ollama's own default is short.
        temperature: sampling default.
    """
    names = {index: text for text, index in tokenizer.added_tokens.items()}
    stops = [names[i] for i in tokenizer.stop_token_ids if i in names]
    # a turn's opening token never belongs into an answer either
    stops += [t for t in ("<|im_start|>",) if t in tokenizer.added_tokens and t not in stops]
    lines = [f"FROM ./{file_name}", f'TEMPLATE """{template}"""']
    lines += [f'PARAMETER stop "{token}"' for token in stops]
    lines += [
        f"PARAMETER num_ctx {num_ctx}",
        f"PARAMETER temperature {temperature:g}",
        "PARAMETER top_p 0.95",
    ]
    return "\n".join(lines) + "\n"
