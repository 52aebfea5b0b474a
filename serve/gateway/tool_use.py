"""How the tools of one chat request are used: what the model is shown, what its answer must be, how calls are read."""

from __future__ import annotations

import json
import secrets
import string
from dataclasses import dataclass, replace
from typing import Any

from serve.errors import InvalidRequest
from serve.gateway.parsing.formats import FORMATS, LIST, CallFormat, call_format
from serve.gateway.tools import Tool, ToolChoice
from serve.request import Grammar, ModelCard
from serve.text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolUse:
    """The model is shown tools."""

    tools: tuple[Tool, ...]
    choice: ToolChoice
    format: CallFormat
    """How calls are written: the model's own way, or another one that a grammar makes it take."""
    is_single: bool = False
    """The answer ends with its first call."""
    short_ids: bool = False
    """The model's template takes ids of nine letters and digits only (Mistral)."""

    def new_id(self) -> str:
        """The id of a call."""
        if self.short_ids:
            return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))
        return f"call_{secrets.token_hex(12)}"

    @property
    def names(self) -> frozenset[str]:
        return frozenset(tool.name for tool in self.tools)

    @property
    def is_forced(self) -> bool:
        """A grammar makes the answer a call."""
        return self.choice.mode == "required"

    def grammar(self) -> Grammar | None:
        """What holds a forced answer to the tools, and a free one to the schemas of strict tools where it calls one."""
        if self.is_forced:
            wanted = [tool for tool in self.tools if self.choice.name in (None, tool.name)]
            is_last = self.is_single or self.choice.name is not None or self.format is LIST
            return self._tagged(
                [self._structure(tool, tool.parameters) for tool in wanted],
                at_least_one=True,
                stop_after_first=is_last,
            )
        if self.format.trigger in self.format.openings and any(tool.is_strict for tool in self.tools):
            anything = {"type": "object"}
            return self._tagged(
                [self._structure(tool, tool.parameters if tool.is_strict else anything) for tool in self.tools],
                stop_after_first=self.is_single,
            )
        return None

    def _structure(self, tool: Tool, schema: dict[str, Any]) -> dict[str, Any]:
        begin, end = self.format.around(tool.name)
        return {"begin": begin, "schema": schema, "end": end}

    def _tagged(self, structures: list[dict[str, Any]], **how: bool) -> Grammar:
        tag = {"triggers": [self.format.trigger], "structures": structures, **how}
        return Grammar(kind="structural_tag", source=json.dumps(tag, ensure_ascii=False), param="tools")


def tool_use(body: Any, card: ModelCard, tokenizer: Tokenizer) -> ToolUse | None:
    """None: there are no tools, or the model is not to see them. Raises InvalidRequest for what would not be heeded."""
    if any(message.role == "tool" or message.tool_calls for message in body.messages) and tokenizer.drops_tool_answers:
        raise InvalidRequest(
            f"the chat template of {card.name} leaves out what tools answered; use a model made for tools, or give "
            "it another template with --chat-template",
            param="messages",
        )
    choice = _choice(body)
    if choice.mode == "none":
        return None
    need_tools_shown(card, tokenizer)
    written = call_format(card.tool_call_parser, tokenizer.chat_template)
    if written is None:
        raise InvalidRequest(
            f"how {card.name} writes tool calls is not known here; start the server with --tool-call-parser and one of "
            f"{', '.join(FORMATS)}",
            param="tools",
        )
    own = ToolUse(
        tools=body.tools,
        choice=choice,
        format=written,
        is_single=body.parallel_tool_calls is False,
        short_ids=written.short_ids,
    )
    return replace(own, format=LIST) if own.is_forced and not written.trigger else own


def need_tools_shown(card: ModelCard, tokenizer: Tokenizer) -> None:
    """Raise InvalidRequest when the model would never see a tool."""
    if not tokenizer.shows_tools:
        raise InvalidRequest(
            f"the chat template of {card.name} leaves tools out, so the model would not see them; use a model made "
            "for tools, or give it another template with --chat-template",
            param="tools",
        )


def _choice(body: Any) -> ToolChoice:
    choice: ToolChoice = body.tool_choice or ToolChoice("auto" if body.tools else "none")
    if not body.tools:
        if choice.mode == "required":
            raise InvalidRequest("tool_choice asks for a call, but there are no tools; send tools", param="tool_choice")
        return ToolChoice("none")
    if choice.name is not None and choice.name not in {tool.name for tool in body.tools}:
        raise InvalidRequest("tool_choice names a function that is not among the tools", param="tool_choice")
    return choice
