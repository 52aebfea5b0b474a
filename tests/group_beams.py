"""Writes `group_beams.json`: what diverse beam search gives in transformers 4.55.4, the last release line that had it.

    python -m venv tf455 && tf455/bin/pip install transformers==4.55.4 torch==2.13.0
    tf455/bin/python tests/group_beams.py

The cases hold no weights: `give_weights` makes them from the parameters' names, the same in both versions. The padding
of a finished group would count as chosen by it (see `serve/text/beams/beam.py`); its token is biased out of all reach.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from zlib import crc32

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB = 48
PAD = VOCAB - 1
PAD_BIAS = -1e4
NUM_CASES = 64
FILE = Path(__file__).with_name("group_beams.json")


def make_model(seed: int, scale: float) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, eos_token_id=None, bos_token_id=None,
        attn_implementation="eager",
    )  # fmt: skip
    model = LlamaForCausalLM(config).float().eval()
    give_weights(model, seed, scale)
    return model


def give_weights(model: torch.nn.Module, seed: int, scale: float) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(crc32(f"{seed}/{name}".encode()))
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(noise if parameter.dim() > 1 else 1 + noise)


def random_case(rng: random.Random) -> dict:
    num_beam_groups, size = rng.choice([(2, 1), (2, 2), (3, 1), (3, 2), (2, 3), (4, 1)])
    return {
        "seed": rng.randrange(10_000),
        "scale": rng.choice([0.2, 0.3, 0.4]),
        "prompt": [rng.randrange(PAD) for _ in range(rng.randint(1, 8))],
        "end_ids": sorted(rng.sample(range(PAD), rng.choice([1, 2, 3]))),
        "max_tokens": rng.randint(1, 12),
        "num_beams": num_beam_groups * size,
        "num_beam_groups": num_beam_groups,
        "diversity_penalty": rng.choice([0.1, 0.5, 1.0, 2.5]),
        "length_penalty": rng.choice([1.0, 1.0, 0.0, 0.6, 2.0, -0.5]),
        "early_stopping": rng.choice([True, False, "never"]),
    }


def hypotheses(case: dict) -> list[dict]:
    """Best first. Whichever end token ended it, `tokens` ends with the first of `end_ids`: so does that version."""
    prompt = torch.tensor([case["prompt"]])
    answer = make_model(case["seed"], case["scale"]).generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=case["max_tokens"],
        num_beams=case["num_beams"],
        num_beam_groups=case["num_beam_groups"],
        diversity_penalty=case["diversity_penalty"],
        length_penalty=case["length_penalty"],
        early_stopping=case["early_stopping"],
        num_return_sequences=case["num_beams"],
        eos_token_id=case["end_ids"],
        pad_token_id=PAD,
        sequence_bias={(PAD,): PAD_BIAS},
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
    )
    found = []
    for row, score in zip(answer.sequences, answer.sequences_scores, strict=True):
        tokens = row[prompt.shape[1] :].tolist()
        is_over = [token_id in case["end_ids"] for token_id in tokens]
        length = is_over.index(True) + 1 if True in is_over else len(tokens)
        found.append({"tokens": tokens[:length], "score": float(score)})
    return found


if __name__ == "__main__":
    rng = random.Random(4554)
    cases = [random_case(rng) for _ in range(NUM_CASES)]
    for case in cases:
        case["hypotheses"] = hypotheses(case)
    lines = ",\n".join(json.dumps(case) for case in cases)
    FILE.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
