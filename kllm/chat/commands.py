"""The slash commands of the terminal chat."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from kllm.chat.conversation import Conversation
from kllm.chat.model import ChatModel
from kllm.chat.saved import load, path_of, save
from kllm.chat.settings import OPTIONS, set_option, shown
from kllm.chat.show import figures, one_line
from kllm.errors import UserError, harmless
from kllm.tools.registry import NAMES, find_tools

HELP = """\
/help              this list
/system [TEXT]     show or set the system prompt (/system - removes it)
/set [K=V ...]     show or set sampling options, e.g. /set temperature=0.2 (K=default: the model's own)
/think on|off|auto whether the model thinks first, where its template knows the switch
/show [WHAT]       prompt, params, tokens or thinking
/tools [NAMES|off] show or change what the model may call, e.g. /tools calculator,python
/undo              forget the last question and its answer
/retry             answer the last question again
/edit              take the last question back into the line to change it
/clear             forget the whole conversation
/save FILE         write the conversation: OpenAI messages, which the page and training read
/load FILE         go on with a conversation of a file
/model [NAME]      show the model, or talk to another one about the same
/stats             tokens, context and speed
/quit              leave (Ctrl-D too)
//text             say "/text" to the model
A message may have several lines: between three quotes (\"\"\"), with a backslash at a line's end, or
pasted. Alt-Enter breaks the line, Ctrl-G opens $EDITOR, Tab completes, Ctrl-C stops an answer."""

ARGUMENTS: dict[str, str | list[str]] = {
    "help": "",
    "system": "",
    "set": [f"{name}=" for name in OPTIONS],
    "think": ["on", "off", "auto"],
    "show": ["prompt", "params", "tokens", "thinking"],
    "tools": [*NAMES, "off"],
    "undo": "",
    "retry": "",
    "edit": "",
    "clear": "",
    "save": "file",
    "load": "file",
    "model": "file",
    "stats": "",
    "quit": "",
}
"""Command -> what may follow it: "file", words to choose from, or "" for anything."""
_ALIASES = {"exit": "quit", "bye": "quit", "?": "help", "regen": "retry"}
_THINK = {"on": True, "off": False, "auto": None}


class Commands:
    """Runs slash commands on a conversation. A method `do_...` is a command; True leaves.

    Args:
        chat: what is talked.
        say: shows a line.
        answer: has a question answered: it is given what asks.
        open_model: a model by its name.
        can_edit: a line may begin with something.
    """

    def __init__(
        self,
        chat: Conversation,
        say: Callable[[str], None],
        answer: Callable[[Callable[..., Any]], None],
        open_model: Callable[[str], ChatModel],
        *,
        can_edit: bool = True,
    ) -> None:
        self.chat, self._say, self._answer, self._open_model = chat, say, answer, open_model
        self._can_edit = can_edit
        self.attempts = 0
        self.default = ""
        """What stands on the next line to begin with."""
        self.thought = ""
        """The thinking of the newest answer."""

    def run(self, line: str) -> bool:
        """A line that begins with a slash; True to leave.

        Raises:
            UserError: no such command, or what it was given is wrong.
        """
        name, _, rest = line[1:].partition(" ")
        name = _ALIASES.get(name, name)
        if name not in ARGUMENTS:
            hint = f"/help lists them; //{name} says it to the model"
            raise UserError(f"unknown command /{name}", hint=hint)
        return bool(getattr(self, f"do_{name}")(rest.strip()))

    def do_help(self, rest: str) -> None:
        """Lists the commands."""
        self._say(HELP)

    def do_quit(self, rest: str) -> bool:
        """Leaves."""
        return True

    def do_clear(self, rest: str) -> None:
        """Forgets the conversation."""
        self.chat.clear()
        self._say("forgot everything")

    def do_system(self, rest: str) -> None:
        """Shows, sets or (with -) removes the system prompt."""
        if rest:
            self.chat.system = None if rest == "-" else rest
        self._say(f"system prompt: {self.chat.system or 'none'}")

    def do_set(self, rest: str) -> None:
        """Shows or sets a sampling option."""
        settings = self.chat.settings
        given = rest.split()
        for one in given if all("=" in word for word in given) else [rest]:  # or "K V"
            key, _, value = one.replace("=", " ", 1).partition(" ")
            emptied = "default" if one.endswith("=") else ""
            settings = set_option(settings, key.strip(), value.strip() or emptied)
        self.chat.settings = settings
        self._say(shown(self.chat.settings.sampling))

    def do_think(self, rest: str) -> None:
        """Switches thinking."""
        from dataclasses import replace

        words = {value: word for word, value in _THINK.items()}
        if rest:
            if rest not in _THINK:
                raise UserError(f"/think takes on, off or auto, not {rest!r}")
            self.chat.settings = replace(self.chat.settings, thinking=_THINK[rest])
        self._say(f"thinking: {words[self.chat.settings.thinking]}")

    def do_show(self, rest: str) -> None:
        """Shows the prompt, the parameters, the tokens or the thinking."""
        what = rest or "params"
        if what == "prompt":
            self._say(harmless(self.chat.prompt()) if self.chat.messages() else "nothing was said yet")
        elif what == "params":
            self._say(f"{self.chat.model.name}: {shown(self.chat.settings.sampling)}")
            self.do_think("")
        elif what == "tokens":
            self._say(self._context())
        elif what == "thinking":
            self._say(self.thought.strip() or "there was none")
        else:
            raise UserError(f"/show takes prompt, params, tokens or thinking, not {what!r}")

    def do_tools(self, rest: str) -> None:
        """Lists the tools, or offers others from now on."""
        if rest:
            self.chat.offer([] if rest == "off" else find_tools(rest.split(), where="/tools"))
        tools = list(self.chat.box.tools.values()) if self.chat.box is not None else []
        for tool in tools:
            self._say(f"{tool.signature}  {tool.description.splitlines()[0]}")
        if self.chat.code:
            self._say("code: the model acts by writing Python, which the sandbox runs")
        elif not tools:
            self._say(f"none; there are {', '.join(NAMES)}, module:function and file.py:function")

    def do_undo(self, rest: str) -> None:
        """Forgets the last turn."""
        question = self.chat.undo()
        if question is None:
            raise UserError("nothing to undo")
        self.attempts = 0
        stay = " (variables of its code stay; /clear forgets them too)" if self.chat.code else ""
        self._say(f"forgot: {one_line(question, 60)}{stay}")

    def do_edit(self, rest: str) -> None:
        """Takes the last question back into the line."""
        if not self._can_edit:
            raise UserError(
                "/edit needs a terminal that can move the cursor", hint="/undo, and type it again"
            )
        question = self.chat.undo()
        if question is None:
            raise UserError("nothing to edit")
        self.attempts = 0
        self.default = question

    def do_retry(self, rest: str) -> None:
        """Answers the last question again."""
        if not self.chat.turns and self.chat.unanswered is None:
            raise UserError("nothing to retry")
        self.attempts += 1
        self._answer(lambda stop: self.chat.retry(stop, attempt=self.attempts))

    def do_save(self, rest: str) -> None:
        """Writes the conversation."""
        if not self.chat.turns:
            raise UserError("nothing to save: nothing was said yet")
        path = _path(rest, "save")
        count = save(self.chat, path)
        self._say(f"{count} messages in {path}")

    def do_load(self, rest: str) -> None:
        """Goes on with a conversation of a file."""
        path = _path(rest, "load")
        notes = load(self.chat, path)
        self.attempts = 0
        turns = len(self.chat.turns)
        self._say(f"{turns} turn{'' if turns == 1 else 's'} from {path}")
        for note in notes:
            self._say(note)

    def do_model(self, rest: str) -> None:
        """Talks to another model."""
        if rest:
            other = self._open_model(rest)
            self.chat.model.close()
            self.chat.model = other
        model = self.chat.model
        self._say(f"{model.name}: {model.describe()}")
        if not rest and len(model.names) > 1:
            self._say(f"there: {', '.join(map(harmless, model.names))}")

    def do_stats(self, rest: str) -> None:
        """Tokens, context and speed."""
        turns = self.chat.turns
        self._say(f"{len(turns)} turn{'' if len(turns) == 1 else 's'}, {self._context()}")
        if not turns or not turns[-1].said:
            return
        said = [one for turn in turns for one in turn.said]
        prompts = sum(one.prompt_tokens for one in said)
        cached = sum(one.cached_tokens for one in said)
        self._say(f"last answer: {figures(turns[-1].said)}")
        self._say(
            f"all: {sum(one.completion_tokens for one in said):,} tokens answered, {prompts:,} read "
            f"({cached:,} of them known already)"
        )

    def _context(self) -> str:
        limit = self.chat.model.context
        last = next((turn.said[-1] for turn in reversed(self.chat.turns) if turn.said), None)
        used = last.prompt_tokens + last.completion_tokens if last else 0
        return f"{used:,} of {limit:,} tokens of context" if limit else f"{used:,} tokens of context"


def _path(text: str, command: str) -> Path:
    if not text:
        raise UserError(f"/{command} needs a file", hint=f"/{command} talk.json")
    return path_of(text)
