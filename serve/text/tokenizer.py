"""Text to token ids and back, from a model's own tokenizer files, with the `tokenizers` library alone.

`TokenizerBundle` is the files as bytes: a replica sends it to each gateway, which therefore needs no model folder.
`Tokenizer` gives the ids transformers' `AutoTokenizer` and `apply_chat_template` give, with one difference: text from
users never becomes a control token. "<|im_end|>" in a prompt or message is encoded as those ten characters; only the
chat template and the tokenizer's own post-processor (`<s>` in front) put control tokens into a prompt.

All methods may be called from any thread.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jinja2
import tokenizers

from serve.errors import ConfigError
from serve.text import tokenizer_file
from serve.text.chat_template import ChatTemplate
from serve.text.detokenizer import Detokenizer, Spelling
from serve.text.template_probe import drops_answers, shows_tools

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "config.json",
)
_MORE_TEMPLATES = "additional_chat_templates"
LONG_CHARS = 1 << 16
LONG_AT_ONCE = 2
"""Texts beyond LONG_CHARS are encoded so many at a time: `tokenizers` takes some 250 bytes a token while it works, and
bodies of four megabytes were seen to take a gateway to a gigabyte."""


@dataclass(frozen=True, slots=True)
class TokenizerBundle:
    """The files of a model that `Tokenizer` reads: name → bytes."""

    files: dict[str, bytes]

    @classmethod
    def from_folder(cls, path: Path, chat_template: Path | None = None) -> TokenizerBundle:
        """Read the files of the model in `path`; `chat_template` is a jinja file to use instead of the model's own."""
        if not (path / "tokenizer.json").is_file():
            raise ConfigError(
                f"{str(path)!r} holds no tokenizer.json; write one with transformers: "
                "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
            )
        files = {name: (path / name).read_bytes() for name in FILES if (path / name).is_file()}
        for template in sorted((path / _MORE_TEMPLATES).glob("*.jinja")):
            files[f"{_MORE_TEMPLATES}/{template.name}"] = template.read_bytes()
        if chat_template is not None:
            if not chat_template.is_file():
                raise ConfigError(f"chat_template {str(chat_template)!r} is not a file")
            files = {name: data for name, data in files.items() if not name.startswith(_MORE_TEMPLATES)}
            files["chat_template.jinja"] = chat_template.read_bytes()
        return cls(files)


class Tokenizer:
    """The tokenizer of one model. Raises `ConfigError` for files it cannot use."""

    def __init__(self, bundle: TokenizerBundle) -> None:
        if "tokenizer.json" not in bundle.files:
            raise ConfigError("the tokenizer bundle holds no tokenizer.json")
        spec, config = tokenizer_file.read(bundle.files)
        named = {name: tokenizer_file.content(config.get(name)) for name in tokenizer_file.NAMED_TOKENS}
        more = {name: value for name, value in config.items() if name.endswith("_token") and isinstance(value, str)}
        added = {token["content"]: bool(token["special"]) for token in spec["added_tokens"]}
        try:
            self._template = ChatTemplate(
                _templates(bundle.files, config),
                special_tokens=more | {name: text for name, text in named.items() if text is not None},
                added_tokens=added,
            )
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"the chat template is not valid jinja2: {error} (line {error.lineno})") from error
        self._secret = "".join(secrets.choice("0123456789") for _ in range(32))
        """Precedes the control tokens' names; digits pass every normaliser and decoder unchanged."""
        self._tokenizer = _build(tokenizer_file.seal(spec, self._template.control_tokens, self._rename))
        self._turns = threading.BoundedSemaphore(LONG_AT_ONCE)
        self._spelling = Spelling(self._tokenizer, spec.get("decoder"), hidden=self._secret)
        added_tokens = self._tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added_tokens.items() if token.special)
        self.vocab_size: int = self._tokenizer.get_vocab_size()
        """Tokens, added ones included. A model may have more rows: its padding."""
        self.bos_token_id: int | None = self._id(named["bos_token"])
        self.eos_token_id: int | None = self._id(named["eos_token"])
        self.pad_token_id: int | None = self._id(named["pad_token"])
        self.generation_config: Mapping[str, Any] = tokenizer_file.read_json(bundle.files, "generation_config.json")
        """The model's own defaults for sampling, as its authors wrote them."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of a user's text. `add_special_tokens` adds what the model's post-processor puts around a text."""
        return self._ids(text, add_special_tokens=add_special_tokens)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """As transformers decodes. An id that is no token has no text."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)).replace(self._secret, "")

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The prompt as ids. The template alone writes special tokens; none are added around it.

        Raises `InvalidRequest`, with the template's own words where it refuses.
        """
        render = partial(self._template.render, messages, tools=tools, template_kwargs=template_kwargs)
        text = render(add_generation_prompt=add_generation_prompt, continue_final_message=continue_final_message)
        return self._ids(self._template.own_tokens(text, self._rename), add_special_tokens=False)

    def encode_controls(self, text: str) -> list[int]:
        """The ids of a text of the server's own, in which control tokens are meant."""
        return list(self._tokenizer.encode(self._template.own_tokens(text, self._rename), add_special_tokens=False).ids)

    @cached_property
    def chat_template(self) -> str:
        """The source of the chat template that is used with tools; empty without one."""
        return self._template.source(with_tools=True)

    @cached_property
    def shows_tools(self) -> bool:
        """Whether the chat template tells the model of tools."""
        return shows_tools(self._template)

    @cached_property
    def drops_tool_answers(self) -> bool:
        """Whether the chat template leaves out what tools answered."""
        return drops_answers(self._template)

    def special_ids(self, texts: Collection[str]) -> dict[int, str]:
        """Those of `texts` that are special tokens of the model, by id."""
        found = {self._id(text): text for text in texts}
        return {token_id: text for token_id, text in found.items() if token_id in self._special_ids}

    @property
    def special_tokens(self) -> dict[str, int]:
        """The special tokens: name → id."""
        return {self.token_text(token_id): token_id for token_id in sorted(self._special_ids)}

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for inside a text, possibly part of a character; none for an id that is no token."""
        return self._spelling.of(token_id)

    def token_text(self, token_id: int) -> str:
        """`token_bytes` as text, with U+FFFD for parts of a character."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def detokenizer(self, *, skip_special_tokens: bool = True, shown: Mapping[int, str] | None = None) -> Detokenizer:
        """The text of one stream of ids, as it arrives. `shown`: tokens that are never skipped, and their text."""
        return Detokenizer(self._spelling, skip=self._special_ids if skip_special_tokens else (), shown=shown or {})

    def _ids(self, text: str, *, add_special_tokens: bool) -> list[int]:
        with contextlib.nullcontext() if len(text) <= LONG_CHARS else self._turns:
            return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def _rename(self, control_token: str) -> str:
        return self._secret + control_token

    def _id(self, token: str | None) -> int | None:
        if token is None:
            return None
        name = self._rename(token) if token in self._template.control_tokens else token
        token_id: int | None = self._tokenizer.token_to_id(name)
        return token_id


def _build(spec: dict[str, Any]) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(spec))
    except Exception as error:  # `tokenizers` raises bare Exception
        raise ConfigError(f"tokenizer.json cannot be loaded: {error}") from error


def _templates(files: Mapping[str, bytes], config: Mapping[str, Any]) -> dict[str, str]:
    """The chat templates by name, from wherever transformers writes them; own files win over the config."""
    templates = {
        Path(name).stem: data.decode() for name, data in files.items() if name.startswith(_MORE_TEMPLATES + "/")
    }
    if "chat_template.jinja" in files:
        templates["default"] = files["chat_template.jinja"].decode()
    if templates:
        return templates
    found = config.get("chat_template") or tokenizer_file.read_json(files, "chat_template.json").get("chat_template")
    if isinstance(found, str):
        return {"default": found}
    if isinstance(found, list):
        return {entry["name"]: entry["template"] for entry in found}
    return {}
