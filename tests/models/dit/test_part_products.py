"""Parts of a transformer on four ranks: each split alone, and their products."""

from __future__ import annotations

from pathlib import Path

import pytest
from parts import CPU, Case, Computed, ask, compute, largest_error, whole
from ranks import run_ranks
from tiny_pipelines import dit_pipeline, save, sd3_pipeline

from models.dit.grid import Split
from models.dit.registry import load_dit

EMBEDDED = Path(__file__).resolve().parents[3] / "models" / "embedded" / "tandem-image"
SPLITS = {
    "4 shards": Split(tensor=4),
    "4 parts of rows": Split(rows=4),
    "4 parts of tokens": Split(tokens=4),
    "2 shards of 2 parts of rows": Split(tensor=2, rows=2),
    "2 shards of 2 parts of tokens": Split(tensor=2, tokens=2),
    "2 parts of tokens of 2 parts of rows": Split(rows=2, tokens=2),
}
CASES = [(model, split) for model in ("text to image", "embedded") for split in SPLITS]
CASES += [("class-conditional", split) for split in SPLITS if "4 shards" not in split and "4 parts of tok" not in split]
CASES.remove(("class-conditional", "2 shards of 2 parts of tokens"))  # it has two heads
ROWS = (1, 3, 5)
CLOSE = 4e-6


@pytest.fixture(scope="module")
def computed(tmp_path_factory) -> dict[tuple[str, str], tuple[list[Computed], float]]:
    """(model, split) → by every rank, and the driver's largest error."""
    folder = tmp_path_factory.mktemp("models")
    folders = {
        "embedded": EMBEDDED,
        "text to image": save(sd3_pipeline(has_t5=False), folder / "sd3"),
        "class-conditional": save(dit_pipeline(), folder / "dit"),
    }
    models = {name: load_dit(folders[name], device=CPU) for name in folders}
    sizes = {"embedded": [(64, 64)], "text to image": [(36, 20)], "class-conditional": [(32, 32)]}
    calls = {name: ask(model, sizes[name], ["", "7"], ROWS) for name, model in models.items()}
    by_rank = run_ranks(4, compute, [Case(folders[model], SPLITS[split], calls[model]) for model, split in CASES])
    right = {name: whole(model, calls[name]) for name, model in models.items()}
    return {
        (model, split): (ranks, largest_error(ranks[0].outputs, right[model]))
        for (model, split), ranks in zip(CASES, zip(*by_rank))
    }


@pytest.mark.parametrize(("model", "split"), CASES)
def test_predictions_equal_those_of_one_rank(computed, model, split):
    ranks, error = computed[model, split]
    print(f"\nlargest difference {error:.1e}, bytes read {[rank.bytes_read for rank in ranks]}")
    assert error < CLOSE
    assert all(output is None for peer in ranks[1:] for output in peer.outputs)
