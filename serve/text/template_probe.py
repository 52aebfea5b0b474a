"""What a chat template makes of tools, found out by showing it some: whether their names and answers reach the prompt.

A template that leaves them out answers as if they had never been sent, so whoever sends them must be told.
"""

from __future__ import annotations

from typing import Any

from serve.errors import InvalidRequest
from serve.text.chat_template import ChatTemplate

_NAME, _ANSWER = "probe_tool_name", "probe_tool_answer"
_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "Look it up.",
        "parameters": {"type": "object", "properties": {"key": {"type": "string"}}, "required": ["key"]},
    },
}
_CALL_ID = "abcdefgh1"
"""Nine letters and digits: Mistral's templates refuse others."""
_USER: dict[str, Any] = {"role": "user", "content": "hi"}
_CALLED: list[dict[str, Any]] = [
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": _CALL_ID, "type": "function", "function": {"name": _NAME, "arguments": {"key": "a"}}}],
    },
    {"role": "tool", "tool_call_id": _CALL_ID, "name": _NAME, "content": _ANSWER},
]


def shows_tools(template: ChatTemplate) -> bool:
    """Whether the model is told of a request's tools."""
    try:
        return _NAME in template.render([_USER], tools=[_TOOL])
    except InvalidRequest:
        return False


def drops_answers(template: ChatTemplate) -> bool:
    """Whether what a tool answered is left out without a word. Templates that refuse it say so themselves."""
    try:
        return _ANSWER not in template.render([_USER, *_CALLED], tools=[_TOOL])
    except InvalidRequest:
        return False
