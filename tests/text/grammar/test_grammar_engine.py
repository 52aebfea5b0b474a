"""Constrained sequences in the engine: valid whatever the memory, chunks, depth and mates; mates as if alone."""

from __future__ import annotations

import itertools
import json
from functools import cache
from pathlib import Path

import jsonschema
import pytest
import torch
from random_schemas import random_schema
from tiny import tiny_folder

from models.embedded.paths import EMBEDDED
from serve.errors import RequestFailed
from serve.events import FinishReason
from serve.options import ModelOptions, SpeculativeOptions
from serve.request import Grammar, SamplingParams
from serve.text.build import TextEngine, build_engine
from serve.text.grammar.grammar import Cost, Matcher
from serve.text.grammar.source import to_llguidance
from serve.text.grammar.vocabulary import Vocabulary, load_vocabulary
from serve.text.sequence import Sequence
from serve.text.tokenizer import Tokenizer, TokenizerBundle

pytest.importorskip("llguidance")
torch.set_num_threads(1)
names = itertools.count()
PROMPTS = [[7, 30, 2, 99, 41, 8, 5], list(range(100, 157)), [1, 2, 3], list(range(40, 80))]
SETTINGS = {
    "roomy": {},
    "small chunks": {"max_num_seqs": 8, "max_num_batched_tokens": 8},
    "little memory": {"num_blocks": 22, "max_num_seqs": 8, "max_num_batched_tokens": 64},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("models"), "qwen3")


@cache
def tokens_of(folder: Path) -> tuple[Tokenizer, Vocabulary]:
    tokenizer = Tokenizer(TokenizerBundle.from_folder(folder))
    config = json.loads((folder / "config.json").read_text())
    return tokenizer, load_vocabulary(folder, config["vocab_size"], [config["eos_token_id"]])


def build(folder: Path, *, num_blocks: int = 400, depth: int = 0, **values) -> TextEngine:
    options = ModelOptions(
        model=str(folder), threads=1, block_size=8, dtype="float32",
        kv_cache_memory_bytes=num_blocks * 2 * 2 * 8 * 2 * 32 * 4, **{"max_num_seqs": 32, **values},
    )  # fmt: skip
    return build_engine(options, progress=False, depth=depth)[0]


def sequence(folder: Path, prompt: list[int], kind: str | None, source: object = "", **params) -> Sequence:
    sampling = SamplingParams(**{"max_tokens": 120, "temperature": 0.0, **params})
    matcher = None
    if kind is not None:
        sampling = SamplingParams(**{"max_tokens": 120, "temperature": 0.0, "grammar": Grammar(kind="regex"), **params})
        vocabulary = tokens_of(folder)[1]
        source = source if isinstance(source, str) else json.dumps(source)
        core = vocabulary.matcher(to_llguidance(kind, source, is_compact=False, special=vocabulary.special))
        matcher = Matcher(core, vocabulary, sampling, Cost())
    return Sequence(
        id=f"job-{next(names)}", token_ids=list(prompt), num_prompt=len(prompt), sampling=sampling, matcher=matcher
    )


def run(engine: TextEngine, *sequences: Sequence) -> list[Sequence]:
    for one in sequences:
        engine.submit(one)
    while engine.step():
        pass
    return list(sequences)


def text(folder: Path, one: Sequence) -> str:
    return tokens_of(folder)[0].decode(one.token_ids[one.num_prompt :])


def output(one: Sequence) -> list[int]:
    return one.token_ids[one.num_prompt :]


@pytest.mark.parametrize("temperature", [0.0, 1.0, 2.0])
def test_two_hundred_random_schemas_on_the_embedded_model(temperature):
    """Every output that is not cut off is valid by its schema, as another library reads it."""
    path = Path(EMBEDDED["tandem-text"])
    if not (path / "model.safetensors").exists():
        pytest.skip("the embedded model is not here")
    engine = build_engine(ModelOptions(model=str(path), threads=1, dtype="float32"), progress=False, depth=0)[0]
    prompt = tokens_of(path)[0].encode_chat([{"role": "user", "content": "Give me a JSON object."}])
    schemas = [random_schema(seed) for seed in range(200)]
    done = run(
        engine,
        *(
            sequence(path, prompt, "json_schema", schema, max_tokens=400, temperature=temperature, seed=seed)
            for seed, schema in enumerate(schemas)
        ),
    )
    for schema, one in zip(schemas, done):
        assert one.finish_reason is FinishReason.STOP, (one.error, schema)
        jsonschema.validate(json.loads(text(path, one)), schema, cls=jsonschema.Draft202012Validator)


@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("setting", SETTINGS)
def test_outputs_do_not_depend_on_mates_memory_chunks_or_depth(folder, setting, depth):
    """Constrained and free ones, greedy and sampled, together under pressure: each as it is when alone."""

    def wanted() -> list[Sequence]:
        kinds = [("json_schema", random_schema(3)), (None, ""), ("regex", "[a-z]{30,40}"), ("choice", ["yes", "no!"])]
        return [
            sequence(folder, prompt, kind, source, temperature=temperature, seed=5, max_tokens=60)
            for (kind, source), prompt in zip(kinds, PROMPTS)
            for temperature in (0.0, 1.5)
        ]

    roomy = build(folder)
    alone = [output(run(roomy, one)[0]) for one in wanted()]
    engine = build(folder, depth=depth, **SETTINGS[setting])
    done = run(engine, *wanted())
    assert [output(one) for one in done] == alone
    if setting == "little memory":
        assert any(one.num_preemptions and one.matcher is not None for one in done)


@pytest.mark.parametrize("method", ["ngram", "draft_model"])
def test_speculation_changes_no_constrained_output(method):
    path = Path(EMBEDDED["tandem-text"])
    if not (path / "model.safetensors").exists():
        pytest.skip("the embedded model is not here")
    prompt = tokens_of(path)[0].encode_chat([{"role": "user", "content": "Give me a JSON object."}])

    def outputs(speculation: SpeculativeOptions) -> tuple[list[list[int]], int]:
        options = ModelOptions(model=str(path), threads=1, dtype="float32", speculative_config=speculation)
        done = run(
            build_engine(options, progress=False, depth=0)[0],
            *(
                sequence(path, prompt, "json_schema", random_schema(seed), temperature=temperature, seed=seed)
                for seed in range(16)
                for temperature in (0.0, 1.0)
            ),
            sequence(path, prompt, "regex", "(ab|cd){20}"),
        )
        return [output(one) for one in done], sum(one.num_accepted for one in done)

    expected, _ = outputs(SpeculativeOptions(num_speculative_tokens=0))
    model = "tandem-text-draft" if method == "draft_model" else None
    found, num_accepted = outputs(SpeculativeOptions(method=method, model=model, num_speculative_tokens=4))
    assert found == expected
    assert num_accepted > 0


def test_a_constrained_sequence_gets_a_token_from_every_overlapped_step(folder):
    """With one step in flight its newest token is known to the runner only, which is enough for the mask."""
    engine = build(folder, depth=1)
    one = sequence(folder, [1, 2], "regex", "[a-z]{60}")
    engine.submit(one)
    num_steps = 0
    while engine.step():
        num_steps += 1
    assert one.finish_reason is FinishReason.STOP
    assert num_steps <= one.num_output + 4


def test_a_complete_output_ends_without_an_end_token(folder):
    (one,) = run(build(folder), sequence(folder, [1, 2], "choice", ["yes"]))
    assert text(folder, one) == "yes"
    assert one.finish_reason is FinishReason.STOP and one.stop_token_id is None


def test_an_output_that_may_go_on_ends_where_the_model_ends_it(folder):
    """The end token is likeliest by far: it comes as soon as the grammar lets it."""
    end = tokens_of(folder)[1].end_ids[0]
    (one,) = run(build(folder), sequence(folder, [1, 2], "regex", "[a-z]{3,9}", logit_bias=((end, 100.0),)))
    assert len(text(folder, one)) == 3
    assert one.finish_reason is FinishReason.STOP and one.stop_token_id == end


@pytest.mark.parametrize("params", [{"ignore_eos": True}, {"min_tokens": 50}])
def test_the_end_is_put_off_while_the_grammar_can_go_on_and_no_longer(folder, params):
    end = tokens_of(folder)[1].end_ids[0]
    bias = ((end, 100.0),)
    (one,) = run(build(folder), sequence(folder, [1, 2], "regex", "[a-z]{3,9}", logit_bias=bias, **params))
    assert len(text(folder, one)) == 9
    assert one.finish_reason is FinishReason.STOP


def test_a_stop_token_of_the_request_that_is_no_text_counts_as_an_end(folder):
    tokenizer, _ = tokens_of(folder)
    other = tokenizer.special_tokens["<|endoftext|>"]
    params = {"stop_token_ids": (other,), "logit_bias": ((other, 100.0),)}
    (one,) = run(build(folder), sequence(folder, [1, 2], "regex", "[a-z]{3,9}", **params))
    assert len(text(folder, one)) == 3 and one.stop_token_id == other


def test_max_tokens_cuts_in_the_middle(folder):
    (one,) = run(build(folder), sequence(folder, [1, 2], "json_schema", {"type": "string"}, max_tokens=4))
    assert one.finish_reason is FinishReason.LENGTH and one.num_output == 4


def test_a_dead_end_fails_its_own_request_and_no_other(folder):
    """After "ab" nothing is possible: no terminal matches both."""
    dead = 'start: "a" "b" (/[x-z]+/ & /[a-c]+/)'
    engine = build(folder)
    (free,) = run(engine, sequence(folder, [5, 6], None, max_tokens=10, ignore_eos=True))
    mate = sequence(folder, [5, 6], None, max_tokens=10, ignore_eos=True)
    one = sequence(folder, [1, 2], "grammar", dead)
    run(engine, one, mate)
    assert one.finish_reason is FinishReason.ERROR and isinstance(one.error, RequestFailed)
    assert output(mate) == output(free)


def test_a_grammar_that_costs_too_much_fails_its_own_request_and_no_other(folder):
    engine = build(folder)
    mate = sequence(folder, [5, 6], None, max_tokens=10, ignore_eos=True)
    one = sequence(folder, [1, 2], "regex", "[a-z]{20}")
    assert one.matcher is not None
    one.matcher._cost.seconds = 100.0
    run(engine, one, mate)
    assert one.finish_reason is FinishReason.ERROR and "simpler" in str(one.error)
    assert mate.finish_reason is FinishReason.LENGTH


def test_penalties_and_filters_choose_among_legal_tokens_only(folder):
    params = {"temperature": 1.0, "top_k": 3, "top_p": 0.5, "min_p": 0.2, "repetition_penalty": 1.3, "seed": 3}
    (one,) = run(build(folder), sequence(folder, [1, 2], "regex", "(cat|dog){6}", presence_penalty=1.0, **params))
    assert one.finish_reason is FinishReason.STOP
    assert {text(folder, one)[i : i + 3] for i in range(0, 18, 3)} <= {"cat", "dog"}


def test_logprobs_are_those_of_the_model_not_of_the_mask(folder):
    engine = build(folder)
    (one,) = [sequence(folder, [1, 2], "choice", ["yes"], logprobs=3)]
    stream = engine.submit(one)
    while engine.step():
        pass
    entries = [entry for update in stream.take() for entry in update.logprobs or ()]
    assert len(entries) == one.num_output
    assert all(entry.logprob < -1.0 for entry in entries), "a forced token has no log-probability of 0"


# -- the matcher itself ------------------------------------------------------------------------------------------------


def matcher_of(folder: Path, kind: str, source: object, **params) -> Matcher:
    one = sequence(folder, [1], kind, source, **params).matcher
    assert one is not None
    return one


def ids_of(folder: Path, output: str) -> list[int]:
    return tokens_of(folder)[0].encode(output, add_special_tokens=False)


def test_a_look_past_drafts_leaves_no_trace(folder):
    matcher = matcher_of(folder, "regex", "[ab]{4}c")
    drafts = ids_of(folder, "abab")
    before = matcher.mask()
    masks = [matcher.mask(drafts[:num]) for num in range(len(drafts) + 1)]
    assert matcher.mask() == before
    for num, token_id in enumerate(drafts):
        assert matcher.mask() == masks[num]
        matcher.accept(token_id)
    assert matcher.mask() == masks[-1]


def test_drafts_are_legal_up_to_the_first_that_is_not(folder):
    matcher = matcher_of(folder, "regex", "[ab]{4}c")
    assert matcher.num_legal(ids_of(folder, "ab")) == 2
    assert matcher.num_legal(ids_of(folder, "abx")) == 2
    assert matcher.mask(ids_of(folder, "x")) is None and matcher.failure is None
    assert matcher.mask() is not None


def test_forks_go_their_own_ways(folder):
    matcher = matcher_of(folder, "choice", ["ab", "cd"])
    twin = matcher.fork()
    matcher.accept(ids_of(folder, "a")[0])
    twin.accept(ids_of(folder, "c")[0])
    matcher.accept(ids_of(folder, "b")[0])
    assert matcher.is_complete and not twin.is_complete
    twin.accept(ids_of(folder, "d")[0])
    assert twin.is_complete
