"""Chat templates: Jinja as Hugging Face runs it, plus where the assistant's words stand.

The environment gives templates what they expect (trimmed blocks, loop controls, `tojson` that keeps
Chinese and key order, `raise_exception`, `strftime_now`) inside Jinja's immutable sandbox: a template
from the hub is somebody else's code. `{% generation %}` blocks are what the model is trained to say.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache, wraps
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from kllm.errors import UserError

DEFAULT_TEMPLATE = r"""{#- ChatML. A turn is <|im_start|>role, newline, text, <|im_end|>, newline. -#}
{%- set lead = messages[0].role if messages else '' %}
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if lead in ['system', 'developer'] %}
        {{- messages[0].content + '\n\n' }}
    {%- endif %}
    {{- '# Tools\n\nYou may call one or more functions to assist with the user query.\n\n' }}
    {{- 'You are provided with function signatures within <tools></tools> XML tags:\n<tools>' }}
    {%- for tool in tools %}
        {{- '\n' }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '\n</tools>\n\nFor each function call, return a json object with function name and arguments ' }}
    {{- 'within <tool_call></tool_call> XML tags:\n<tool_call>\n' }}
    {{- '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role in ['system', 'developer'] %}
        {%- if not (tools and loop.first) %}
            {{- '<|im_start|>system\n' + content + '<|im_end|>\n' }}
        {%- endif %}
    {%- elif message.role == 'user' %}
        {{- '<|im_start|>user\n' + content + '<|im_end|>\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\n' }}
        {%- if message.reasoning_content is string %}
            {%- generation %}
                {{- '<think>\n' + message.reasoning_content + '\n</think>\n\n' }}
            {%- endgeneration %}
        {%- endif %}
        {%- generation %}
            {{- content }}
            {%- for item in message.tool_calls or [] %}
                {%- set call = item.function if item.function else item %}
                {%- if content or not loop.first %}
                    {{- '\n' }}
                {%- endif %}
                {{- '<tool_call>\n{"name": "' + call.name + '", "arguments": ' }}
                {{- call.arguments if call.arguments is string else call.arguments | tojson }}
                {{- '}\n</tool_call>' }}
            {%- endfor %}
            {{- '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' + content + '\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- else %}
        {{- raise_exception('unknown role ' + message.role | string) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}
"""
"""The template of tokenizers trained here.

A turn's reasoning (`reasoning_content`) is written as a think block only when the message has one; an
empty string is an empty block. Reasoning of earlier turns stays, so that a conversation's tokens never
change behind the model. At the generation prompt `enable_thinking=False` adds the closed empty block;
true or undefined adds nothing and leaves it to the model. Tool results in a row share one user turn.
"""

SPAN_OPEN, SPAN_CLOSE = "kllm_span_open", "kllm_span_close"
"""Context variables: text put around what a `{% generation %}` block renders."""


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}`: marks what the block renders."""

    tags = {"generation"}  # noqa: RUF012  (the name and form are Jinja's)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_marked", [nodes.ContextReference()])
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _marked(self, context: Context, caller: Macro) -> str:
        return f"{context.get(SPAN_OPEN, '')}{caller()}{context.get(SPAN_CLOSE, '')}"


def _format(value: str, *args: Any, **kwargs: Any) -> str:
    """Jinja's `format` filter: printf-style."""
    _check_fields(_PRINTF, str(value))
    return str(value) % (kwargs or args)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


_MOST = 1_000_000  # characters or items that one operation of a template may make
_WIDE = 10_000  # width that a template may pad a text to
_PADDING = frozenset(("ljust", "rjust", "center", "zfill", "expandtabs"))
# fields that are wide, or as wide as an argument says
_PRINTF = re.compile(r"%[^a-zA-Z%]*(?:\d{5,}|\*)")
_FORMAT = re.compile(r"\{[^{}]*:[^{}]*(?:\d{5,}|\{)")


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, without the single operations that fill the memory or never end.

    They run in native code: no time limit outside would stop them.
    """

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and hasattr(left, "__len__") and len(left) > 16 * _MOST:
            raise SecurityError(f"a template may join up to {16 * _MOST:,} characters")
        if operator == "*":
            for many, times in ((left, right), (right, left)):
                if hasattr(many, "__len__") and isinstance(times, int) and len(many) * times > _MOST:
                    raise SecurityError(f"a template may repeat up to {_MOST:,} characters")
        if isinstance(left, int) and isinstance(right, int):
            bits = (
                left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
            )
            if operator != "%" and bits > 8192:
                raise SecurityError("a template may not compute such large numbers")
        if operator == "%" and isinstance(left, (str, bytes)):
            _check_fields(_PRINTF, str(left))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        name = getattr(__obj, "__name__", "")
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, (str, bytes)) and name in _PADDING:
            _check_widths((*args, *kwargs.values()))
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            _check_fields(_FORMAT, str(value.__self__))
        return wrapped


def _check_fields(pattern: re.Pattern[str], text: str) -> None:
    if pattern.search(text):
        raise SecurityError(f"a template may format fields up to {_WIDE:,} wide")


def _check_widths(arguments: Iterable[Any]) -> None:
    if any(isinstance(a, int) and abs(a) > _WIDE for a in arguments):
        raise SecurityError(f"a template may pad a text up to {_WIDE:,} wide")


def _narrow(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that pads, without widths that fill the memory."""

    @wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        _check_widths((*args, *kwargs.values()))
        return function(*args, **kwargs)

    return checked


@lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _narrow(_tojson)
    for name in ("center", "indent", "batch", "slice"):
        environment.filters[name] = _narrow(environment.filters[name])
    environment.filters["format"] = _format
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.globals.pop("lipsum")
    return environment


@lru_cache(maxsize=32)
def compile_template(template: str, where: str = "chat template") -> jinja2.Template:
    """Compiles a chat template.

    Raises:
        UserError: a syntax error, with its line.
    """
    try:
        return _environment().from_string(template)
    except jinja2.TemplateSyntaxError as e:
        raise UserError(
            f"syntax error in the chat template: {e.message}",
            where=f"{where}:{e.lineno}",
            hint="chat templates are Jinja, as in tokenizer_config.json on the hub",
        ) from e


def render(
    messages: Sequence[Mapping[str, Any]],
    template: str,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    **kwargs: Any,
) -> str:
    """A conversation as text: the same as transformers' `apply_chat_template(tokenize=False)`.

    Args:
        messages: OpenAI-style messages, passed to the template as they are.
        template: the template's text.
        tools: function schemas.
        add_generation_prompt: end with the header of an assistant turn.
        **kwargs: further variables (`enable_thinking`, `bos_token`, ...).

    Raises:
        UserError: the template is broken or refuses these messages.
    """
    compiled = compile_template(template)
    try:
        return compiled.render(
            messages=messages,
            tools=tools,
            documents=kwargs.pop("documents", None),
            add_generation_prompt=add_generation_prompt,
            **kwargs,
        )
    except jinja2.TemplateError as e:
        raise UserError(
            f"the chat template refuses this conversation: {e.message or type(e).__name__}",
            hint="check its roles and fields",
        ) from e
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as e:
        raise UserError(
            f"the chat template fails on this conversation: {e}", hint="check its roles and fields"
        ) from e
