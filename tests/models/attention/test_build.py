"""Which backend is chosen, and why one is refused; the backends that need what is not here, by a stand-in for it."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from ragged import expected, found, random_step
from torch.nn import functional as F

from models.attention import measured
from models.attention.base import KVCacheSpec
from models.attention.build import NAMES, make_attention, why_not
from models.attention.flashinfer_paged import FlashInferAttention
from models.attention.measured import Row, choose, device_name
from models.attention.varlen import VarlenAttention

CPU = torch.device("cpu")
SPEC = KVCacheSpec(1, 2, 64, 16, torch.float32, CPU)
ROW = Row("this one", "float32", "auto", 8, 2, 64, "decode", 1, 1, 512, "cpu", 10.0, "2026-11-22", "abc")


def times(**microseconds: tuple[float, float]) -> list[Row]:
    """Of two cases, by backend."""
    return [
        replace(ROW, device=device_name(CPU), backend=name, phase=phase, microseconds=time)
        for name, pair in microseconds.items()
        for phase, time in zip(("decode", "prefill"), pair, strict=True)
    ]


def test_unmeasured_cpu_computes_with_its_own_backend_and_quantised_caches_with_the_reference(monkeypatch, tmp_path):
    monkeypatch.setattr(measured, "TABLE", tmp_path / "none.json")
    assert type(make_attention("auto", SPEC, 8)).__name__ == "CpuAttention"
    assert type(make_attention("auto", replace(SPEC, kv_dtype="int8"), 8)).__name__ == "SdpaAttention"


def test_the_least_geometric_mean_over_common_cases_is_chosen():
    assert choose(times(cpu=(10, 400), sdpa=(20, 100)), SPEC, 8, ("cpu", "sdpa")) == "sdpa"
    assert choose(times(cpu=(10, 100), sdpa=(20, 100)), SPEC, 8, ("cpu", "sdpa")) == "cpu"
    only_decodes = times(cpu=(10, 1), sdpa=(9, 1))[:3]
    assert choose(only_decodes, SPEC, 8, ("cpu", "sdpa")) == "sdpa"


def test_rows_of_another_device_shape_or_backend_do_not_count():
    rows = times(cpu=(10, 10), sdpa=(1, 1))
    for other in ({"device": "NVIDIA H100*"}, {"dtype": "bfloat16"}, {"head_dim": 128}, {"kv_dtype": "int8"}):
        assert choose([replace(row, **other) for row in rows], SPEC, 8, ("cpu", "sdpa")) is None
    assert choose(rows, SPEC, 8, ("cpu",)) is None, "one alone is not compared with anything"
    assert choose([replace(row, device="*") for row in rows], SPEC, 8, ("cpu", "sdpa")) == "sdpa"


def test_measured_times_decide_what_auto_is(monkeypatch, tmp_path):
    monkeypatch.setattr(measured, "TABLE", tmp_path / "measured.json")
    measured.write(times(cpu=(10, 10), sdpa=(20, 20)))
    measured.write(times(sdpa=(1, 1)))
    assert len(json.loads(measured.TABLE.read_text())) == 4, "new times replace old ones"
    assert type(make_attention("auto", SPEC, 8)).__name__ == "SdpaAttention"


def test_the_table_that_ships_can_be_read():
    assert all(row.backend in NAMES and row.microseconds > 0 for row in measured.read())


@pytest.mark.parametrize("name", ["flashinfer", "varlen"])
def test_backends_for_other_devices_are_refused_by_name_with_those_that_can(name):
    with pytest.raises(ValueError, match=rf"'{name}' .*; choose auto or one of cpu, sdpa"):
        make_attention(name, SPEC, 8)


def test_the_cpu_backend_refuses_what_it_cannot_keep():
    with pytest.raises(ValueError, match=r"'cpu' keeps no KV cache in int8; choose auto or one of sdpa"):
        make_attention("cpu", replace(SPEC, kv_dtype="int8"), 8)


def test_a_time_is_measured_by_the_protocol():
    spec = KVCacheSpec(1, 1, 16, 16, torch.float32, CPU)
    assert measured.measure(make_attention("sdpa", spec, 2), spec, 2, sequences=2, num_new=3, context=20) > 0


def documented_varlen(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa, seqused_k, block_table
):
    """What torch's documentation says of `varlen_attn` with block tables, sequence by sequence."""
    assert cu_seq_k is None and block_table.dtype == seqused_k.dtype == cu_seq_q.dtype == torch.int32
    assert max_q >= int((cu_seq_q[1:] - cu_seq_q[:-1]).max()) and max_k >= int(seqused_k.max())
    outs = []
    for index, used in enumerate(seqused_k.tolist()):
        rows = query[cu_seq_q[index] : cu_seq_q[index + 1]]
        keys, values = (part[block_table[index]].flatten(0, 1)[:used] for part in (key, value))
        distance = torch.arange(used - len(rows), used)[:, None] - torch.arange(used)
        hidden = (distance < 0) | ((distance > window_size[0]) if window_size[0] >= 0 else False)
        mask = torch.zeros(distance.shape, dtype=query.dtype).masked_fill(hidden, -torch.inf)
        out = F.scaled_dot_product_attention(
            rows.transpose(0, 1), keys.transpose(0, 1), values.transpose(0, 1), mask, scale=scale, enable_gqa=enable_gqa
        )
        outs.append(out.transpose(0, 1))
    return torch.cat(outs)


class DocumentedFlashInfer:
    """FlashInfer's two calls as its documentation has them: paged caches in its HND layout."""

    def append_paged_kv_cache(self, key, value, batch, positions, cache, indices, indptr, last_page_len, kv_layout):
        assert kv_layout == "HND" and all(t.dtype == torch.int32 for t in (batch, positions, indices, indptr))
        size = cache.shape[3]
        for row, (sequence, position) in enumerate(zip(batch.tolist(), positions.tolist())):
            page = indices[indptr[sequence] + position // size]
            assert position < (indptr[sequence + 1] - indptr[sequence] - 1) * size + last_page_len[sequence]
            cache[page, 0, :, position % size], cache[page, 1, :, position % size] = key[row], value[row]

    def BatchPrefillWithPagedKVCacheWrapper(self, workspace, kv_layout):
        assert workspace.dtype == torch.uint8 and kv_layout == "HND"
        planned = {}

        def run(query, cache):
            keys, values = (cache[:, half].transpose(1, 2) for half in (0, 1))
            indptr, last = planned["paged_kv_indptr"], planned["paged_kv_last_page_len"]
            counts = indptr[1:] - indptr[:-1]
            tables = torch.zeros(len(counts), int(counts.max()), dtype=torch.int32)
            for row, first, count in zip(tables, indptr, counts):
                row[:count] = planned["paged_kv_indices"][first : first + count]
            used = (counts - 1) * planned["page_size"] + last
            return documented_varlen(
                query, keys, values, planned["qo_indptr"], None, 1 << 30, 1 << 30,
                scale=planned["sm_scale"], window_size=(planned["window_left"], 0),
                enable_gqa=planned["num_qo_heads"] != planned["num_kv_heads"],
                seqused_k=used.int(), block_table=tables,
            )  # fmt: skip

        return SimpleNamespace(plan=lambda **arguments: planned.update(arguments), run=run)


@pytest.mark.parametrize("name", ["varlen", "flashinfer"])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("behind", [None, [3, 0, 2, 1]])
def test_what_varlen_attention_and_flashinfer_are_asked_for_equals_the_reference(monkeypatch, name, window, behind):
    step = random_step(SPEC, 8, [1, 4, 20, 1], [15, 16, 300, 40], behind=behind)
    if name == "varlen":
        backend = VarlenAttention(SPEC, 8, documented_varlen)
    else:
        monkeypatch.setitem(sys.modules, "flashinfer", DocumentedFlashInfer())
        backend = FlashInferAttention(SPEC, 8)
    (kv,) = backend.allocate(step.num_blocks)
    cache = kv if name == "varlen" else kv.permute(1, 0, 3, 2, 4)  # [2, blocks, block, K, H]
    for past, table in zip(step.past, step.layout.block_tables, strict=True):
        for at, row in enumerate(past):
            cache[:, table[at // 16], at % 16] = row
    out = found(backend, kv, SPEC, step, window=window)
    torch.testing.assert_close(out.double(), expected(SPEC, 8, step, window=window), atol=2e-6, rtol=1e-5)


def test_varlen_attention_is_not_for_models_that_cap_their_scores():
    assert why_not("varlen", replace(SPEC, caps_scores=True)) == "cannot cap scores, as this model does"


def test_every_backend_says_whether_it_can():
    assert {name for name in NAMES[1:] if why_not(name, SPEC) is None} == {"cpu", "sdpa"}
