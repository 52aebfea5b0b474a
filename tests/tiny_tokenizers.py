"""Small trained tokenizers of every kind decoders use, and published chat templates, as model folders.

`KINDS` names the builders. Each is the layout its family ships: normaliser, pre-tokenizer, decoder, post-processor and
special tokens, over a vocabulary of a few hundred tokens. The chat templates are those of the families' model cards.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXT = [
    "The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs!",
    "user assistant system You are a helpful assistant. Hello, how are you? I'm fine, thanks.",
    "What is 17 + 25? It is 42. Größe, naïve, 日本語 テスト, emoji 😀 and \t tabs.\n\nNew lines, too.",
    "tool_call name arguments get_weather city Paris think",
] * 4
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _qwen() -> tuple[Tokenizer, dict[str, Any]]:
    """Byte-level BPE, no post-processor; `<tool_call>` and `<think>` are added but not special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    _train_byte_level(tokenizer)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens(
        [
            AddedToken(text, normalized=False, special=False)
            for text in ("<tool_call>", "</tool_call>", "<think>", "</think>", "<|fim_prefix|>")
        ]
    )
    return tokenizer, {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}


def _llama3() -> tuple[Tokenizer, dict[str, Any]]:
    """Byte-level BPE with `ignore_merges`, `<|begin_of_text|>` by template post-processor, many reserved tokens."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    _train_byte_level(tokenizer)
    names = ["begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id", "eom_id", "python_tag"]
    names += [f"reserved_special_token_{index}" for index in range(40)]
    tokenizer.add_special_tokens([f"<|{name}|>" for name in names])
    bos = tokenizer.token_to_id("<|begin_of_text|>")
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", bos)]),
        ]
    )
    return tokenizer, {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
        "clean_up_tokenization_spaces": True,
    }


def _llama2() -> tuple[Tokenizer, dict[str, Any]]:
    """SentencePiece-like BPE with byte fallback, as `LlamaTokenizer`; `<s>` is in the vocabulary."""
    tokenizer = _sentencepiece_bpe(["<unk>", "<s>", "</s>"])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "legacy": False, "add_bos_token": True}
    return tokenizer, {"tokenizer_class": "LlamaTokenizer", **config}


def _llama2_legacy() -> tuple[Tokenizer, dict[str, Any]]:
    tokenizer, config = _llama2()
    return tokenizer, {**config, "legacy": True}


def _mistral() -> tuple[Tokenizer, dict[str, Any]]:
    """As Llama 2, but transformers reads its tokenizer.json as it is; control tokens of its own."""
    tokenizer, config = _llama2()
    tokenizer.add_special_tokens(["[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]"])
    return tokenizer, {**config, "model_type": "mistral"}


def _gemma() -> tuple[Tokenizer, dict[str, Any]]:
    """SentencePiece-like BPE without a space in front; whitespace runs are added tokens that are not special."""
    tokenizer = _sentencepiece_bpe(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"])
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ("\n\n", "\n\n\n", "▁▁", "▁▁▁▁")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    config = {
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "mask_token": "<mask>",
    }
    return tokenizer, {"tokenizer_class": "GemmaTokenizer", **config}


def _unigram() -> tuple[Tokenizer, dict[str, Any]]:
    """Unigram with Metaspace; the control tokens are pieces of the model, which could spell them."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    specials = ["<s>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=specials, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def _wordpiece() -> tuple[Tokenizer, dict[str, Any]]:
    """WordPiece with BERT's normaliser, which lower-cases and drops control characters."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator(
        TEXT, trainers.WordPieceTrainer(vocab_size=200, special_tokens=specials, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer, {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}


def _words() -> tuple[Tokenizer, dict[str, Any]]:
    """Whole words and no decoder; a control token named only in the config."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.train_from_iterator(TEXT, trainers.WordLevelTrainer(special_tokens=["<unk>"], show_progress=False))
    return tokenizer, {"unk_token": "<unk>", "eos_token": "<|end|>"}


KINDS = {
    "qwen": _qwen,
    "llama3": _llama3,
    "llama2": _llama2,
    "llama2-legacy": _llama2_legacy,
    "mistral": _mistral,
    "gemma": _gemma,
    "unigram": _unigram,
    "wordpiece": _wordpiece,
    "words": _words,
}


@cache
def trained(kind: str) -> tuple[str, str]:
    """The texts of tokenizer.json and of tokenizer_config.json."""
    tokenizer, config = KINDS[kind]()
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] not in BYTES]
    return json.dumps(spec), json.dumps(config)


def tokenizer_folder(path: Path, kind: str, *, chat_template: str | None = None) -> Path:
    """A model folder with the tokenizer of that kind and nothing else but config.json's model type."""
    folder = path / kind
    folder.mkdir(parents=True, exist_ok=True)
    spec, config_text = trained(kind)
    config = json.loads(config_text)
    model_type = config.pop("model_type", None)
    if model_type is not None:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    (folder / "tokenizer.json").write_text(spec)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if chat_template is not None:
        (folder / "chat_template.jinja").write_text(chat_template)
    return folder


def _train_byte_level(tokenizer: Tokenizer) -> None:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)


def _sentencepiece_bpe(specials: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=480, special_tokens=specials + BYTES, show_progress=False)
    ascii_only: Iterator[str] = ("".join(char for char in text if ord(char) < 128) for text in TEXT)
    tokenizer.train_from_iterator((text.replace(" ", "▁") for text in ascii_only), trainer)
    tokenizer.pre_tokenizer = None
    return tokenizer
