"""The model's chat template: messages in, prompt text out, equal to transformers' `apply_chat_template`.

Only templates from the model's own files run, in `template_sandbox`. What callers send is rebuilt from plain JSON types
first, so a template sees no objects.

Control tokens in callers' strings ("<|im_end|>" in a message) must stay text, although the template writes the same
characters to mean the token. They are broken with a secret mark after their first character before rendering; in the
rendered text every whole control token is then the template's own (`Rendered.split`). A caller cannot know the mark,
and no string operation of a template can make a broken token whole. transformers' `sanitize_control_tokens` has the
same aim with marks around the token.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.nodes

from serve.errors import InvalidRequest
from serve.text.template_sandbox import TemplateEnvironment, render

ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
"""A fixed set: templates join the role into control tokens ("<|" + role + "|>")."""
RESERVED_KWARGS = frozenset(
    {"messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template", "tokenize"}
)
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


class ChatTemplate:
    """The templates of one model, with the control tokens callers must not be able to write.

    `special_tokens` are the template's variables `bos_token`, `eos_token`, … `control_tokens` maps the text of every
    added token to whether it is special; those that are not special count when the template itself writes them.
    """

    def __init__(
        self, templates: Mapping[str, str], *, special_tokens: Mapping[str, str], added_tokens: Mapping[str, bool]
    ) -> None:
        environment = TemplateEnvironment()
        self._templates = {name: environment.from_string(source) for name, source in templates.items()}
        self._sources = dict(templates)
        self._special_tokens = dict(special_tokens)
        literals = "\0".join(_literals(environment, source) for source in templates.values())
        special = [token for token, is_special in added_tokens.items() if is_special]
        written = [token for token in added_tokens if token in literals and not token.isspace()]
        self.control_tokens = frozenset([*special, *written])
        self._mark = "".join(secrets.choice("0123456789") for _ in range(32))
        self._controls = _any_of(self.control_tokens, self._mark)
        self._specials = _any_of(special, self._mark)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt, with callers' control tokens broken: for `own_tokens`. Raises `InvalidRequest`."""
        source, template = self._choose(tools)
        if add_generation_prompt and continue_final_message:
            raise InvalidRequest(
                "continue_final_message and add_generation_prompt exclude each other; set one of them to false",
                param="continue_final_message",
            )
        chat = [self._message(message, index) for index, message in enumerate(messages)]
        if not chat:
            raise InvalidRequest("messages is empty; send at least one message", param="messages")
        ending = _Ending(chat, source) if continue_final_message else None
        variables = {
            "documents": None,
            **self._special_tokens,
            **self._kwargs(template_kwargs or {}),
            "messages": chat,
            "tools": self._break(_plain(tools), self._controls) if tools is not None else None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            text = render(template, variables)
        except jinja2.TemplateRuntimeError as error:  # the template met something it was not written for
            raise self._refusal(f"the chat template cannot render these messages: {error}") from error
        except jinja2.TemplateError as error:  # the template's own raise_exception, or a limit
            raise self._refusal(str(error)) from error
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise self._refusal(f"the chat template cannot render these messages: {error}") from error
        return text if ending is None else ending.cut(text)

    def source(self, *, with_tools: bool = False) -> str:
        """The template's text; empty without a template."""
        name = "tool_use" if with_tools and "tool_use" in self._sources else "default"
        return self._sources.get(name, "")

    def own_tokens(self, rendered: str, rename: Callable[[str], str]) -> str:
        """The prompt with each control token the template wrote given another name, and callers' text as it was."""
        return self._controls.sub(lambda match: rename(match[0]), rendered).replace(self._mark, "")

    def _choose(self, tools: object) -> tuple[str, jinja2.Template]:
        name = "tool_use" if tools is not None and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise InvalidRequest(
                "the model has no chat template; use /v1/completions, or give one with --chat-template",
                param="messages",
            )
        return self._sources[name], self._templates[name]

    def _message(self, message: Mapping[str, Any], index: int) -> dict[str, Any]:
        """One message as templates expect it: no None values, content a string, tool arguments an object."""
        role = message.get("role")
        if not isinstance(role, str) or role not in ROLES:
            known = ", ".join(sorted(ROLES))
            raise InvalidRequest(f"messages[{index}].role is {role!r}; use one of {known}", param="messages")
        out = {key: _plain(value) for key, value in message.items() if value is not None}
        if isinstance(out.get("content"), list):
            out["content"] = _join_parts(out["content"], index)
        if "tool_calls" in out:
            out["tool_calls"] = _parse_arguments(out["tool_calls"])
        reasoning = next((out[key] for key in _REASONING_FIELDS if key in out), None)
        if reasoning is not None:
            out = {"thinking": reasoning, **out, "reasoning_content": reasoning}
        # Templates look for tokens of their own in what the model said before (Qwen's "</think>"): only tokens that
        # are special are broken there.
        out = self._break(out, self._specials if role == "assistant" else self._controls)
        return {**out, "role": role}

    def _kwargs(self, template_kwargs: Mapping[str, Any]) -> dict[str, Any]:
        for name in template_kwargs:
            if name in RESERVED_KWARGS or name in self._special_tokens or not name.isidentifier():
                raise InvalidRequest(
                    f"chat_template_kwargs must not set {name!r}; remove it, or use the request's own field",
                    param="chat_template_kwargs",
                )
        kwargs: dict[str, Any] = self._break(_plain(template_kwargs), self._controls)
        return kwargs

    def _break(self, value: Any, controls: re.Pattern[str]) -> Any:
        if isinstance(value, str):
            return controls.sub(lambda match: match[0][0] + self._mark + match[0][1:], value)
        if isinstance(value, dict):
            return {self._break(key, controls): self._break(item, controls) for key, item in value.items()}
        if isinstance(value, list):
            return [self._break(item, controls) for item in value]
        return value

    def _refusal(self, message: str) -> InvalidRequest:
        return InvalidRequest(message.replace(self._mark, ""), param="messages")


class _Ending:
    """Where the last message's text ends in the prompt, for a model that is to go on with that message.

    A tag is put after the text; the prompt is cut there. As in transformers a template that trims the text gets
    the prompt trimmed.
    """

    def __init__(self, chat: list[dict[str, Any]], source: str) -> None:
        content = chat[-1].get("content")
        if not isinstance(content, str) or "content" not in source:
            raise InvalidRequest(
                "continue_final_message needs a last message with content", param="continue_final_message"
            )
        self._content = content
        self._tag = secrets.token_hex(16)
        chat[-1]["content"] = f"{content}{self._tag} "

    def cut(self, text: str) -> str:
        at = text.rfind(self._tag)
        if at < 0 or self._content.strip() not in text:
            raise InvalidRequest(
                "continue_final_message is set, but the chat template does not write the last message as it is",
                param="continue_final_message",
            )
        keeps_space = text.startswith(" ", at + len(self._tag))
        return text[:at] if keeps_space else text[:at].rstrip()


def _any_of(tokens: Sequence[str] | frozenset[str], mark: str) -> re.Pattern[str]:
    """Matches the longest of `tokens` that is not broken (a token of one character is broken by the mark behind it)."""
    if not tokens:
        return re.compile(r"(?!)")
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile(f"(?:{'|'.join(map(re.escape, longest_first))})(?!{mark})")


def _literals(environment: TemplateEnvironment, source: str) -> str:
    """The text a template holds, outside its expressions and in their string constants."""
    tree = environment.parse(source)
    texts = [node.data for node in tree.find_all(jinja2.nodes.TemplateData)]
    texts += [node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)]
    return "\0".join(texts)


def _plain(value: Any) -> Any:
    """`value` rebuilt from JSON's own types."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    raise InvalidRequest(f"a value of type {type(value).__name__} is not JSON", param="messages")


def _join_parts(parts: list[Any], index: int) -> str:
    """Text parts joined by line breaks, as vLLM and llama.cpp give them to templates that take a string."""
    texts = []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict) and part.get("type") in ("text", "input_text", "refusal"):
            text = part.get("refusal" if part["type"] == "refusal" else "text")
            if not isinstance(text, str):
                raise InvalidRequest(f"messages[{index}].content has a text part without text", param="messages")
            texts.append(text)
        else:
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise InvalidRequest(
                f"messages[{index}].content has a part of type {kind!r}; this model reads text parts only",
                param="messages",
            )
    return "\n".join(texts)


def _parse_arguments(calls: Any) -> Any:
    """Tool calls with their arguments as objects: OpenAI's clients send JSON text, templates expect an object."""
    if not isinstance(calls, list):
        return calls
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            try:
                arguments = json.loads(function["arguments"] or "{}")
            except ValueError:
                continue  # what the model wrote was no JSON: the template shows it as it was
            function["arguments"] = arguments
    return calls
