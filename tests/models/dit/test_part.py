"""Parts of a transformer on two ranks against the whole on one: the same predictions, whatever is split."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, SD3Transformer2DModel
from parts import CPU, Call, Case, Computed, ask, compute, largest_error, whole
from ranks import run_ranks
from tiny_pipelines import dit_pipeline, finish, flux_pipeline, save, sd3_pipeline

from models.dit.checkpoint import DiTError
from models.dit.grid import Grid, Split
from models.dit.registry import check_split, load_dit, load_part
from models.dit.shards import cut_layers
from models.parallel import Place
from serve.ranks.cost import image_tensor_traffic, latent_bytes, row_traffic, ulysses_traffic
from serve.ranks.image_geometry import read_image

EMBEDDED = Path(__file__).resolve().parents[3] / "models" / "embedded" / "tandem-image"
SPLITS = {"tensor": Split(tensor=2), "rows": Split(rows=2), "tokens": Split(tokens=2)}
ROWS = (1, 2, 5)
"""More ranks than rows, as many, and a number they do not divide."""
CLOSE = 4e-6
"""Of the largest number: sums of float32 in another order. A forward of other rows alone differs by up to 1.2e-6."""


def gated_pipeline() -> Any:
    """Feed-forwards of values and gates, projections without bias, tokens that two ranks cannot halve."""
    pipeline = dit_pipeline()
    transformer = DiTTransformer2DModel(
        sample_size=10, num_layers=2, num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=4,
        activation_fn="geglu", attention_bias=False,
    )  # fmt: skip
    pipeline.register_modules(transformer=transformer)
    return finish(pipeline)


def dual_pipeline() -> Any:
    """Blocks with a second attention, of the image alone, and no norms of queries and keys."""
    pipeline = sd3_pipeline(has_t5=False)
    config = {**pipeline.transformer.config, "dual_attention_layers": (0,), "qk_norm": None}
    pipeline.register_modules(transformer=SD3Transformer2DModel.from_config(config))
    return finish(pipeline)


MODELS: dict[str, tuple[Any, list[tuple[int, int]], list[str]]] = {
    "class-conditional": (dit_pipeline, [(32, 32)], ["", "7", "goldfish"]),
    "gated": (gated_pipeline, [(20, 20)], ["", "7"]),
    "text to image": (sd3_pipeline, [(32, 32), (36, 20)], ["", "a cat"]),
    "dual attention": (dual_pipeline, [(36, 20)], ["", "a cat"]),
    "embedded": (None, [(64, 64), (96, 64)], ["", "a red circle"]),
}
"""How it is made, sizes in pixels, prompts."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    made = {name: make for name, (make, _, _) in MODELS.items() if make}
    return {
        "embedded": EMBEDDED,
        **{name: save(make(), tmp_path_factory.mktemp("models") / "it") for name, make in made.items()},
    }


@pytest.fixture(scope="module")
def calls(folders) -> dict[str, tuple[list[Call], list[torch.Tensor]]]:
    """What is asked of every model, and what the whole answers."""
    answered = {}
    for name, (_, sizes, prompts) in MODELS.items():
        model = load_dit(folders[name], device=CPU)
        asked = ask(model, sizes, prompts, ROWS)
        answered[name] = asked, whole(model, asked)
    return answered


@pytest.fixture(scope="module")
def computed(folders, calls) -> dict[tuple[str, str], list[Computed]]:
    """(model, split) → by every rank. All in one start: importing diffusers takes longer than all of it."""
    names = [(model, split) for model in MODELS for split in SPLITS]
    cases = [Case(folders[model], SPLITS[split], calls[model][0]) for model, split in names]
    dummy = Case(folders["text to image"], SPLITS["tensor"], calls["text to image"][0], load_format="dummy")
    by_rank = run_ranks(2, compute, [*cases, dummy])
    return dict(zip([*names, ("dummy", "tensor")], zip(*by_rank)))


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("model", MODELS)
def test_predictions_equal_those_of_one_rank(computed, calls, model, split):
    driver, peer = computed[model, split]
    error = largest_error(driver.outputs, calls[model][1])
    print(f"\nlargest difference {error:.1e}")
    assert error < CLOSE
    assert peer.outputs == [None] * len(peer.outputs)


def test_parts_of_random_weights_are_those_of_the_whole(computed, calls, folders):
    model = load_dit(folders["text to image"], device=CPU, load_format="dummy")
    driver, _ = computed["dummy", "tensor"]
    assert largest_error(driver.outputs, whole(model, calls["text to image"][0])) < CLOSE
    assert driver.bytes_read == 0


@pytest.mark.parametrize("model", MODELS)
def test_a_rank_reads_its_shard_and_nothing_else(computed, folders, model):
    of_transformer = folders[model] / "transformer"
    config = json.loads((of_transformer / "config.json").read_text())
    in_file = 2 if model == "embedded" else 4
    for part in computed[model, "tensor"]:
        if model != "gated":
            assert read_image(config).weight_bytes(2) == 4 * part.num_parameters < part.weight_bytes
        positions = 0 if config["_class_name"].startswith("DiT") else part.weight_bytes // 4 - part.num_parameters
        assert part.bytes_read == in_file * (part.num_parameters + positions)
        assert part.num_parameters + part.num_parameters_elsewhere == computed[model, "rows"][0].num_parameters


def test_as_much_is_sent_as_the_cost_of_a_split_says(computed, calls):
    geometry = read_image(json.loads((EMBEDDED / "transformer" / "config.json").read_text()), latent_factor=4)
    geometry = replace(geometry, text_tokens=calls["embedded"][0][0][2][0]["text"].shape[1])
    num_rows, num_tokens = sum(ROWS), [16 * 16 // 4, 16 * 24 // 4]
    ranks = {split: [part.sent for part in computed["embedded", split]] for split in SPLITS}
    sums = sum(image_tensor_traffic(geometry, 2, image_tokens=number).bytes_sent for number in num_tokens)
    assert [rank["sums"] for rank in ranks["tensor"]] == [num_rows * sums] * 2
    tokens = sum(ulysses_traffic(geometry, 2, image_tokens=number).bytes_sent for number in num_tokens)
    gathered = sum(latent_bytes(geometry, number) // 2 for number in num_tokens)  # by the second rank only
    assert sum(rank["tokens"] for rank in ranks["tokens"]) == num_rows * (2 * tokens - gathered)
    sent = sum(row_traffic(geometry, 2, image_tokens=number).bytes_sent for number in num_tokens)
    assert ranks["rows"][1]["rows"] == sum(number - number // 2 for number in ROWS) * sent


@pytest.mark.parametrize(
    ("split", "refusal"),
    [
        (Split(tensor=3), "tensor_parallel_size is 3, .* the 4 attention heads .* 1, 2, 4"),
        (Split(tokens=8), "ulysses_degree is 8, .* the 4 attention heads; sizes that do are 1, 2, 4"),
        (Split(tensor=2, tokens=4), "ulysses_degree is 4, .* 2 attention heads that tensor_parallel_size 2 .* 1, 2"),
    ],
)
def test_heads_that_do_not_divide_are_refused_with_the_sizes_that_work(folders, split, refusal):
    with pytest.raises(DiTError, match=refusal):
        check_split(folders["text to image"], split)
    with pytest.raises(DiTError, match=refusal):
        load_part(folders["text to image"], Grid(split), device=CPU)


def test_a_pipeline_of_its_own_code_is_refused_by_name(tmp_path):
    with pytest.raises(DiTError, match=r"FluxPipeline .* one device; families that 2 ranks can share are DiTPipeline"):
        check_split(save(flux_pipeline(), tmp_path / "flux"), Split(rows=2))


def test_a_norm_over_all_heads_is_refused(tmp_path):
    pipeline = sd3_pipeline(has_t5=False)
    attention = pipeline.transformer.transformer_blocks[0].attn
    attention.norm_q = torch.nn.RMSNorm(32)
    with pytest.raises(DiTError, match=r"norm_q .* over all heads"):
        cut_layers(pipeline.transformer, Place(0, 2))


def test_files_that_lack_a_weight_are_refused(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    for path in folders["class-conditional"].rglob("*"):
        if path.is_file():
            copy = tmp_path / path.relative_to(folders["class-conditional"])
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    file = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["proj_out_2.weight"]
    save_file(weights, file)
    with pytest.raises(DiTError, match=r"lacks proj_out_2\.weight"):
        load_part(tmp_path, Grid(), device=CPU)
    save_file({**weights, "proj_out_2.weight": torch.zeros(3, 5)}, file)
    with pytest.raises(DiTError, match=r"proj_out_2\.weight as \[3, 5\]"):
        load_part(tmp_path, Grid(), device=CPU)
