"""What is trained computes what the stock pipeline computes."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from models.embedded.captions import MAX_TOKENS, every_word
from models.embedded.image_autoencoder import build_autoencoder, decode, encode
from models.embedded.image_pipeline import Denoiser, NullRows, build_pipeline, build_tokenizer
from models.embedded.image_rows import prompt_tokens
from models.embedded.pictures import COLOURS, SHAPES
from models.embedded.training_budget import TrainingBudget

torch.set_num_threads(1)
TOKENIZER = build_tokenizer()


@pytest.fixture(scope="module")
def denoiser():
    """Random everywhere: with its gates at zero, as it begins, nothing would depend on the prompt."""
    torch.manual_seed(0)
    model = Denoiser(len(TOKENIZER)).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("rows", [1, 256])
def test_one_weighted_row_equals_rows_of_zeros_of_the_stock_pipeline(denoiser, rows):
    prompts = ["a red circle on a white background", ""]
    latents = torch.randn(2, 8, 16, 24, generator=torch.Generator().manual_seed(1))
    sigmas = torch.tensor([0.7, 0.2])
    pipeline = build_pipeline(build_autoencoder(), denoiser, TOKENIZER, 3.0)
    with torch.no_grad():
        embeds, _, pooled, _ = pipeline.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=rows
        )
        expected = denoiser.transformer(latents, embeds, pooled, 1000 * sigmas, return_dict=False)[0]
        stock = denoiser.transformer.attn_processors
        null_rows = NullRows()
        denoiser.transformer.set_attn_processor(null_rows)
        null_rows.count(rows)
        actual = denoiser(latents, sigmas, prompt_tokens(prompts, TOKENIZER))
        denoiser.transformer.set_attn_processor(stock)
    # float32 on both sides; only the order of additions differs.
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_velocity_points_from_latents_to_noise():
    """An oracle that returns `noise - latents` is integrated back to the latents."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(7)
    latents, noise = torch.randn(2, 1, 8, 4, 4).unbind(0)
    state = noise
    for timestep in scheduler.timesteps:
        state = scheduler.step(noise - latents, timestep, state, return_dict=False)[0]
    torch.testing.assert_close(state, latents, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("word", sorted({*every_word(), *COLOURS, *SHAPES}))
def test_every_word_is_one_token(word):
    assert len(TOKENIZER(f"a {word}, a").input_ids) == 6


def test_unknown_text_has_tokens_and_one_end():
    for text in ("qwxz", "東京 🙂", "déjà vu", "1234 + 5", ""):
        ids = TOKENIZER(text, padding="max_length", truncation=True).input_ids
        assert len(ids) == MAX_TOKENS
        assert ids[0] == TOKENIZER.bos_token_id and ids[-1] == TOKENIZER.eos_token_id
        assert TOKENIZER(text).input_ids.count(TOKENIZER.eos_token_id) == 1


def test_scaled_latents_come_back():
    torch.manual_seed(0)
    autoencoder = build_autoencoder()
    images = torch.rand(2, 3, 32, 48)
    plain = decode(autoencoder, encode(autoencoder, images))
    autoencoder.register_to_config(shift_factor=0.3, scaling_factor=0.7)
    torch.testing.assert_close(decode(autoencoder, encode(autoencoder, images)), plain)


def test_rate_rises_then_falls_to_almost_nothing():
    budget = TrainingBudget(10)
    rates = []
    for spent_s in range(0, 601, 6):
        budget.spent_s = float(spent_s)
        rates.append(budget.rate)
    assert rates[0] < 0.1 and max(rates) > 0.99 and rates[-1] == pytest.approx(0.01)
    assert rates[3:] == sorted(rates[3:], reverse=True)
