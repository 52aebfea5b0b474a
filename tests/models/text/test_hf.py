"""Foreign decoders compute on our KV blocks what they compute in transformers, or are refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from paged import PagedModel
from safetensors.torch import load_file, save_file
from tiny import HF_FAMILIES, tiny_folder, tiny_model
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    FalconH1Config,
    FalconH1ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForCausalLM,
    T5Config,
    T5Model,
)

from models.registry import ModelError, load_text_model
from models.text.hf import TransformersDecoder

CPU = torch.device("cpu")
TOLERANCE = {"atol": 2e-5, "rtol": 1e-5}
"""float32, logits of size one."""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("attention", ["sdpa", "cpu"])
@pytest.mark.parametrize("family", HF_FAMILIES)
def test_chunks_decodes_and_a_shared_prefix_in_mixed_batches_equal_transformers(
    tmp_path: Path, family: str, attention: str
) -> None:
    first, second = prompt(45), prompt(38, seed=1)
    model = load_text_model(tiny_folder(tmp_path, family), device=CPU)
    assert isinstance(model, TransformersDecoder)
    paged = PagedModel(model, attention)
    logits_a = [paged.step({"a": first[:30]})["a"]]
    logits_b = []
    for start in range(30, 45):
        parts = paged.step({"b": second[(start - 30) * 2 : (start - 29) * 2], "a": first[start : start + 1]})
        logits_a.append(parts["a"])
        logits_b.append(parts["b"])
    paged.fork("a", "c", num_blocks=3)
    logits_c = paged.step({"a": [7], "c": second[:9]})["c"]
    oracle = tiny_model(family)
    torch.testing.assert_close(torch.cat(logits_a), logits_of(oracle, first), **TOLERANCE)
    torch.testing.assert_close(torch.cat(logits_b), logits_of(oracle, second)[:30], **TOLERANCE)
    torch.testing.assert_close(logits_c, logits_of(oracle, first[:24] + second[:9])[24:], **TOLERANCE)


def test_dummy_weights_give_finite_logits(tmp_path: Path) -> None:
    model = load_text_model(tiny_folder(tmp_path, "olmo2"), device=CPU, load_format="dummy")
    assert PagedModel(model).step({"a": prompt(5)})["a"].isfinite().all()


def test_native_family_computed_by_transformers_agrees_with_the_native_decoder(tmp_path: Path) -> None:
    from models.registry import read_config
    from models.text.hf import load_transformers

    folder = tiny_folder(tmp_path, "qwen3")
    foreign = load_transformers(
        folder, read_config(folder), device=CPU, dtype=None, load_format="auto", max_model_len=None
    )
    native = load_text_model(folder, device=CPU)
    ids = prompt(30)
    torch.testing.assert_close(PagedModel(foreign).step({"a": ids}), PagedModel(native).step({"a": ids}), **TOLERANCE)
    assert foreign.spec == native.spec


@pytest.mark.parametrize(("positions", "length"), [(32, 30), (512, 60)])
def test_longrope_is_short_or_long_by_what_is_served(tmp_path: Path, positions: int, length: int) -> None:
    scaling = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0 + index / 10 for index in range(8)],
        "long_factor": [2.0 + index for index in range(8)],
    }
    overrides = {"rope_parameters": scaling, "original_max_position_embeddings": 32}
    ids = prompt(length)
    expected = logits_of(tiny_model("phi3", **overrides), ids)
    model = load_text_model(tiny_folder(tmp_path, "phi3", **overrides), device=CPU, max_model_len=positions)
    torch.testing.assert_close(PagedModel(model).step({"a": ids})["a"], expected, **TOLERANCE)


@pytest.mark.parametrize("kind", ["mamba", "falcon_h1", "gpt_oss"])
def test_model_that_needs_more_than_blocks_is_refused(tmp_path: Path, kind: str) -> None:
    model = {"mamba": mamba, "falcon_h1": falcon_h1, "gpt_oss": gpt_oss}[kind]()
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"cannot be served|not computed here"):
        load_text_model(tmp_path, device=CPU)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BertModel(bert()), "^BertModel does not generate text token by token; .* BertLMHeadModel$"),
        (lambda: BertForMaskedLM(bert()), "^BertForMaskedLM does not generate .* BertLMHeadModel$"),
        (lambda: RobertaForCausalLM(RobertaConfig(**ENCODER)), "RobertaSelfAttention lets tokens see those behind"),
        (lambda: tiny_model("qwen3").model, "^Qwen3Model does not generate .* Qwen3ForCausalLM$"),
        (lambda: T5Model(T5Config(**T5)), "^T5Model does not generate .* ends in ForCausalLM$"),
    ],
    ids=["encoder", "masked", "encoder-as-decoder", "headless", "encoder-decoder"],
)
def test_model_that_does_not_generate_text_is_refused_in_one_line(tmp_path: Path, make, message: str) -> None:
    make().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=message):
        load_text_model(tmp_path, device=CPU)


def test_weights_that_transformers_would_make_up_are_refused(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, "olmo2")
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights of Olmo2ForCausalLM, 'lm_head.weight' for one"):
        load_text_model(folder, device=CPU)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"architectures": ["NewForCausalLM"], "model_type": "new"},
            f"^NewForCausalLM has the model_type 'new', which transformers {transformers.__version__} does not know; "
            "upgrade transformers if the model is newer, or correct model_type in config.json$",
        ),
        ({"architectures": ["NewForCausalLM"]}, "has the model_type ''"),
        ({"architectures": "LlamaForCausalLM"}, "architectures in config.json is 'LlamaForCausalLM'; a list"),
        ({"model_type": "llama"}, "architectures in config.json is None"),
    ],
)
def test_unknown_architecture_is_refused_in_one_line(tmp_path: Path, config, message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=message):
        load_text_model(tmp_path, device=CPU)


def test_repository_code_is_never_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"architectures": ["OwnForCausalLM"], "model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}'
    )
    (tmp_path / "own.py").write_text("raise SystemExit('code of the repository was run')")
    with pytest.raises(ModelError, match="auto_map"):
        load_text_model(tmp_path, device=CPU)


def logits_of(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([ids])).logits[0]
    return logits


ENCODER = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2}


def bert() -> BertConfig:
    return BertConfig(**ENCODER, intermediate_size=32)


SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}


def mamba() -> PreTrainedModel:
    return MambaForCausalLM(MambaConfig(**SMALL, state_size=4))


def falcon_h1() -> PreTrainedModel:
    return FalconH1ForCausalLM(
        FalconH1Config(
            **SMALL,
            intermediate_size=32,
            num_attention_heads=2,
            num_key_value_heads=2,
            mamba_d_ssm=32,
            mamba_n_heads=4,
            mamba_d_head=8,
            mamba_d_state=8,
        )
    )


def gpt_oss() -> PreTrainedModel:
    return GptOssForCausalLM(
        GptOssConfig(
            **SMALL,
            intermediate_size=32,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=16,
            num_local_experts=2,
            num_experts_per_tok=1,
        )
    )
