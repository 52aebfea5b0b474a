"""What a tokenizer.json means: completed from the files beside it, and sealed against control tokens in users' text.

`tokenizer.json` is the pipeline; transformers reads a little more from elsewhere, and so does `read`: tokens named only
in tokenizer_config.json, added_tokens.json or special_tokens_map.json, and how `LlamaTokenizer` writes leading spaces.

`seal` makes the tokenizer that all text goes through. In it every control token has a secret name, so the characters
"<|im_end|>" are characters like any others, whatever the kind of model and wherever they stand, at no cost per
occurrence. The control tokens of a chat template are renamed in the rendered prompt; nobody else knows the names.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Collection, Mapping
from typing import Any

from serve.errors import ConfigError

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

Json = dict[str, Any]


def read(files: Mapping[str, bytes]) -> tuple[Json, Json]:
    """The tokenizer (tokenizer.json's layout) and its config, both complete. Raises `ConfigError`."""
    spec = read_json(files, "tokenizer.json")
    config = {**read_json(files, "special_tokens_map.json"), **read_json(files, "tokenizer_config.json")}
    if not isinstance(spec.get("model"), dict) or "vocab" not in spec["model"]:
        raise ConfigError("tokenizer.json has no model with a vocabulary; save the tokenizer again with transformers")
    model_type = read_json(files, "config.json").get("model_type", "llama")
    is_llama = str(config.get("tokenizer_class", "")).removesuffix("Fast") == "LlamaTokenizer" and model_type == "llama"
    if is_llama and b'"ByteLevel"' not in files["tokenizer.json"]:
        _as_llama_tokenizer(spec, config)
    _complete_added_tokens(spec, config, read_json(files, "added_tokens.json"))
    spec["truncation"] = spec["padding"] = None
    return spec, config


def read_json(files: Mapping[str, bytes], name: str) -> Json:
    """The object in the file of that name, empty when there is none."""
    if name not in files:
        return {}
    try:
        value = json.loads(files[name])
    except ValueError as error:
        raise ConfigError(f"{name} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{name} holds a {type(value).__name__}, not an object")
    return value


def content(token: Any) -> str | None:
    """The text of a token written as a string or as a serialised AddedToken."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def seal(spec: Json, controls: Collection[str], rename: Callable[[str], str]) -> Json:
    """`spec` with every token of `controls` under the name `rename` gives it.

    Ids stay: a token of the vocabulary keeps its entry, and `tokenizers` numbers the others by their order.
    """
    spec = copy.copy(spec)
    # Before normalisation: the secret name must be found as it is, and neighbours must not change it.
    spec["added_tokens"] = [
        {**token, "content": rename(token["content"]), "normalized": False} if token["content"] in controls else token
        for token in spec["added_tokens"]
    ]
    model = spec["model"] = copy.copy(spec["model"])
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        inside = [token for token in controls if token in vocab]
        if inside:
            vocab = model["vocab"] = dict(vocab)
            for token in inside:
                vocab[rename(token)] = vocab.pop(token)
    else:  # unigram: [piece, score], the index is the id
        inside = [piece for piece, _ in vocab if piece in controls]
        model["vocab"] = [[rename(piece) if piece in controls else piece, score] for piece, score in vocab]
    if model.get("unk_token") in controls:
        model["unk_token"] = rename(model["unk_token"])
    if inside and model.get("merges"):  # no merge may spell a control token
        gone = set(inside)
        model["merges"] = [merge for merge in model["merges"] if gone.isdisjoint(_parts(merge))]
    return spec


def _parts(merge: str | list[str]) -> tuple[str, str, str]:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right, left + right


def _as_llama_tokenizer(spec: Json, config: Json) -> None:
    """transformers' `LlamaTokenizer` takes the vocabulary from the file and this pipeline from its class.

    The difference shows behind a special token: "▁" is put before the text there only in `legacy` mode.
    """
    prepends = config.get("add_prefix_space") is not False
    scheme = ("always" if config.get("legacy", False) else "first") if prepends else "never"
    spec["normalizer"] = None
    spec["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    steps: list[Json] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prepends:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    spec["decoder"] = {"type": "Sequence", "decoders": steps}


def _complete_added_tokens(spec: Json, config: Json, added_tokens: Json) -> None:
    """Append those added tokens that are only named beside the file, and mark the named ones special."""
    vocab = spec["model"]["vocab"]
    ids = dict(vocab) if isinstance(vocab, dict) else {piece: index for index, (piece, _) in enumerate(vocab)}
    tokens: dict[str, Json] = {token["content"]: token for token in spec.get("added_tokens") or []}
    ids.update({text: token["id"] for text, token in tokens.items()})
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    extras = [content(token) for token in (extra.values() if isinstance(extra, dict) else extra)]
    named = [content(config.get(name)) for name in NAMED_TOKENS]
    special = [text for text in (*named, *extras) if text]

    found: list[tuple[str, Json]] = []
    decoder = config.get("added_tokens_decoder") or {}
    for _, token in sorted(decoder.items(), key=lambda item: int(item[0])):
        found.append((str(content(token)), token))
    for text, _ in sorted(added_tokens.items(), key=lambda item: int(item[1])):
        found.append((text, {"normalized": text not in special, "special": text in special}))
    found += [(text, {"special": True}) for text in special]
    for text, flags in found:
        if text in tokens:
            continue
        ids.setdefault(text, max(ids.values(), default=-1) + 1)
        tokens[text] = {
            "id": ids[text],
            "content": text,
            **{flag: bool(flags.get(flag, False)) for flag in ("single_word", "lstrip", "rstrip", "special")},
            "normalized": bool(flags.get("normalized", False)),
        }
    for text in special:
        tokens[text] = {**tokens[text], "special": True}
    spec["added_tokens"] = sorted(tokens.values(), key=lambda token: int(token["id"]))
