"""Converters of published trace shapes."""

from __future__ import annotations

import pytest

from loadtest.traffic.traces import READERS, ImageArrival, TextArrival, TraceError, read_trace

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def test_azure_rows_count_from_the_first_to_the_tenth_of_a_microsecond():
    rows = AZURE + "2023-11-16 18:17:03.9799600,374,44\n2023-11-16 18:15:46.6805900,4808,10\n"
    assert READERS["azure"](rows.splitlines()) == [
        TextArrival(at_s=0.0, num_prompt=4808, num_output=10),
        TextArrival(at_s=pytest.approx(77.29937, abs=1e-6), num_prompt=374, num_output=44),
    ]


def test_mooncake_times_are_milliseconds_and_block_ids_are_kept():
    lines = [
        '{"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47]}',
        '{"timestamp": 30535, "input_length": 6472, "output_length": 26, "hash_ids": [46, 2354]}',
    ]
    assert READERS["mooncake"](lines) == [
        TextArrival(at_s=0.0, num_prompt=6955, num_output=52, blocks=(46, 47)),
        TextArrival(at_s=pytest.approx(3.053), num_prompt=6472, num_output=26, blocks=(46, 2354)),
    ]


def test_image_lines_may_leave_out_steps_and_deadline():
    lines = [
        '{"timestamp": 1.5, "width": 64, "height": 96}',
        "",
        '{"timestamp": 2, "width": 1, "height": 2, "slo_ms": 900}',
    ]
    assert READERS["image"](lines) == [
        ImageArrival(at_s=0.0, width=64, height=96),
        ImageArrival(at_s=0.5, width=1, height=2, deadline_s=0.9),
    ]


@pytest.mark.parametrize("shape", READERS)
def test_every_shape_has_a_sample(shape):
    arrivals = read_trace(shape)
    assert len(arrivals) >= 20 and arrivals[0].at_s == 0.0
    assert [one.at_s for one in arrivals] == sorted(one.at_s for one in arrivals)


def test_mooncake_samples_share_prefixes():
    blocks = [one.blocks for one in read_trace("mooncake")]
    assert sum(one[:2] in {other[:2] for other in blocks[:at]} for at, one in enumerate(blocks)) >= 5


@pytest.mark.parametrize(
    ("shape", "text", "message"),
    [
        ("azure", AZURE + "yesterday,1,2\n", "line 2: TIMESTAMP 'yesterday'"),
        ("azure", AZURE + "2023-11-16 18:15:46,many,2\n", "line 2: ContextTokens is 'many'"),
        ("mooncake", "{\n", "line 1 is not JSON"),
        ("mooncake", "[]\n", "line 1 is not a JSON object"),
        ("mooncake", '{"timestamp": 1, "input_length": -4, "output_length": 1}\n', "input_length is -4"),
        ("mooncake", '{"timestamp": 1, "input_length": 4, "output_length": 1, "hash_ids": ["a"]}\n', "hash_ids"),
        ("image", '{"timestamp": 1, "height": 4}\n', "line 1: width is None"),
        ("azure", AZURE, "no requests"),
    ],
)
def test_a_bad_line_is_named(tmp_path, shape, text, message):
    (tmp_path / "trace").write_text(text)
    with pytest.raises(TraceError, match=message):
        read_trace(shape, tmp_path / "trace")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(TraceError, match="nothing: No such file"):
        read_trace("azure", tmp_path / "nothing")
