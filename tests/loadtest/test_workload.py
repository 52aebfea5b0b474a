"""The workloads are those the peers were measured with, and a measurement reports what it saw."""

from __future__ import annotations

import json
import zlib

import pytest

from loadtest.workload import NAMES, Prompt, make_workload, measure

GOLDEN = {"W1": 2445377207, "W2": 2610048135, "W3": 4045830927, "S1": 705393570, "S32": 587850611}
"""CRC of repetition 0, taken from the script that measured the peers: other prompts would be another benchmark."""


@pytest.mark.parametrize("name", NAMES)
def test_a_workload_is_the_one_the_peers_had(name):
    prompts = [[prompt.token_ids, prompt.num_output] for prompt in make_workload(name, 0)]
    assert zlib.crc32(json.dumps(prompts).encode()) == GOLDEN[name]


@pytest.mark.parametrize("name", NAMES)
def test_repetitions_differ_in_ids_and_not_in_lengths(name):
    one, two = make_workload(name, 0), make_workload(name, 1)
    assert [(len(p.token_ids), p.num_output) for p in one] == [(len(p.token_ids), p.num_output) for p in two]
    assert all(a.token_ids != b.token_ids for a, b in zip(one, two))


def test_an_unknown_workload_is_refused():
    with pytest.raises(ValueError, match="W1"):
        make_workload("W9", 0)


def test_a_measurement_counts_tokens_and_times_the_first_one_apart():
    seen: list[int] = []

    def generate(prompts: list[Prompt]) -> list[list[int]]:
        seen.append(prompts[0].num_output)
        return [[1] * prompt.num_output for prompt in prompts]

    row = measure("S1", generate, repetitions=2, about={"peer": "fake"})
    assert seen == [1, 256, 1, 256]
    assert row["peer"] == "fake" and row["output_tokens"] == 256 and row["prompt_tokens"] == 16
    assert len(row["wall_all_s"]) == len(row["own_cores"]) == len(row["foreign_cores"]) == 2
    assert row["step_ms"] is not None and row["ttft_s"] is not None and row["head"] == [1] * 8
