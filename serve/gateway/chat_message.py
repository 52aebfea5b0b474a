"""What was parsed from an answer as OpenAI's message, whole and in deltas: content, reasoning_content, tool_calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from serve.gateway.parsing.events import Arguments, CallStart, Content, Parsed, Reasoning, merged


class StreamedCalls:
    """Deltas of one choice. The first of a call holds its index, id, type and name; the others arguments only."""

    def __init__(self, new_id: Callable[[], str]) -> None:
        self._new_id = new_id
        self._num_calls = 0

    def deltas(self, parsed: Iterable[Parsed]) -> list[dict[str, Any]]:
        """What is new, in order."""
        told: list[dict[str, Any]] = []
        for event in merged(parsed):
            if isinstance(event, Content):
                told.append({"content": event.text})
            elif isinstance(event, Reasoning):
                told.append({"reasoning_content": event.text})
            elif isinstance(event, CallStart):
                call = {"index": self._num_calls, **_call(self._new_id(), event.name)}
                self._num_calls += 1
                told.append({"tool_calls": [call]})
            elif isinstance(event, Arguments):
                call = {"index": self._num_calls - 1, "function": {"arguments": event.text}}
                told.append({"tool_calls": [call]})
        return told


def whole_message(parsed: Iterable[Parsed], new_id: Callable[[], str]) -> dict[str, Any]:
    """The message. Content is null where there are calls or reasoning and nothing else."""
    content, reasoning = list[str](), list[str]()
    calls: list[dict[str, Any]] = []
    for event in merged(parsed):
        if isinstance(event, Content):
            content.append(event.text)
        elif isinstance(event, Reasoning):
            reasoning.append(event.text)
        elif isinstance(event, CallStart):
            calls.append(_call(new_id(), event.name))
        elif isinstance(event, Arguments):
            calls[-1]["function"]["arguments"] += event.text
    text = "".join(content)
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
    if not text and (calls or reasoning):
        message["content"] = None
    if reasoning:
        message["reasoning_content"] = "".join(reasoning)
    if calls:
        message["tool_calls"] = calls
    return message


def _call(call_id: str, name: str) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": ""}}
