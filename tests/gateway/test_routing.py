"""The rule by which a replica is chosen."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from serve.backend import Load
from serve.gateway.routing import PROMISE_S, TIE_S, Prediction, Router
from serve.gateway.shortlist import NUM_DRAWN, NUM_HOLDERS, home, longest_holders
from serve.prefix_view import PrefixView, prompt_keys
from serve.request import ImageRequest, SamplingParams, TextRequest

BLOCK = 16
UNIT_S = 0.001


def request(prompt=range(200), *, request_id="r", salt="", session="", n=1) -> TextRequest:
    return TextRequest(
        request_id=request_id, model="tiny", prompt_token_ids=tuple(prompt), sampling=SamplingParams(max_tokens=4),
        cache_salt=salt, session=session, n=n,
    )  # fmt: skip


def image_request(side: int, num_steps: int = 20) -> ImageRequest:
    return ImageRequest(
        request_id=f"{side}", model="painter", prompt="x", width=side, height=side, num_inference_steps=num_steps,
        guidance_scale=1.0, solver="euler", seed=1,
    )  # fmt: skip


@dataclass
class Told:
    """A `Candidate`."""

    replica_id: str
    reported: Load
    prefixes: PrefixView = field(default_factory=PrefixView)
    unreported: Sequence[str] = ()
    num_looks: int = 0

    def load(self) -> Load:
        self.num_looks += 1
        return self.reported


def candidate(name: str, backlog_s: float = 0.0, *, cached=(), salt="", unreported=(), job_s=0.0, unit_s=UNIT_S):
    view = PrefixView()
    view.block_size = BLOCK
    view.keys.update(prompt_keys([*cached, 0], BLOCK, salt))
    return Told(name, Load(backlog_s=backlog_s, unit_s=unit_s, job_s=job_s), view, unreported)


def ranked(router: Router, asked, candidates: Sequence[Told]) -> list[Prediction]:
    """The first round."""
    return next(router.rounds(asked, {candidate.replica_id: candidate for candidate in candidates}))


def order(predictions: list[Prediction]) -> list[str]:
    return [prediction.replica_id for prediction in predictions]


def first(router: Router, asked, *candidates: Told) -> str:
    return ranked(router, asked, candidates)[0].replica_id


def price(router: Router, asked, at: Told) -> Prediction:
    """What it costs there, another replica being far too busy."""
    return ranked(router, asked, [at, candidate("other", 1e6)])[0]


def test_all_candidates_are_ranked_by_backlog():
    assert order(ranked(Router(), request(), [candidate("a", 3), candidate("b", 1), candidate("c", 2)])) == [
        "b",
        "c",
        "a",
    ]


def test_no_candidates_give_no_placements():
    assert ranked(Router(), request(), []) == []


def test_an_only_candidate_is_priced_without_a_look_at_its_cache():
    prediction = Prediction("a", wait_s=0.5, work_s=200 * UNIT_S, keys=())
    assert ranked(Router(), request(range(200)), [candidate("a", 0.5, cached=range(96))]) == [prediction]


def test_cost_is_backlog_and_what_is_not_cached():
    prediction = price(Router(), request(range(200)), candidate("a", 0.5, cached=range(96), job_s=0.25))
    assert prediction.work_s == 0.25 + (200 - 96) * UNIT_S
    assert prediction.cost_s == 0.5 + prediction.work_s


def test_a_prefix_is_worth_the_seconds_that_computing_it_takes_and_no_more():
    prompt = range(1600)
    worth_s = 1584 * UNIT_S  # the last of its 100 blocks is computed anyway
    holder = candidate("a", worth_s - 0.2, cached=prompt)
    assert first(Router(), request(prompt), holder, candidate("b")) == "a"
    holder = candidate("a", worth_s + 0.2, cached=prompt)
    assert first(Router(), request(prompt), holder, candidate("b")) == "b"


def test_the_longer_prefix_wins():
    prompt = range(800)
    found = first(Router(), request(prompt), candidate("a", cached=range(160)), candidate("b", cached=range(640)))
    assert found == "b"


def test_prefixes_of_other_tenants_are_not_seen():
    asked = request(range(800), salt="mine")
    other = price(Router(), asked, candidate("a", cached=range(800), salt="theirs"))
    own = price(Router(), asked, candidate("a", cached=range(800), salt="mine"))
    assert other.work_s == 0.8 and own.work_s == 16 * UNIT_S


def test_scoring_a_prompt_takes_all_of_it():
    scored = TextRequest(
        request_id="r", model="tiny", prompt_token_ids=tuple(range(160)), sampling=SamplingParams(max_tokens=1),
        prompt_logprobs=0,
    )  # fmt: skip
    assert price(Router(), scored, candidate("a", cached=range(160))).work_s == 160 * UNIT_S


def test_every_choice_adds_to_the_backlog():
    prediction = price(Router(), request(range(10), n=3), candidate("a", job_s=2.0))
    assert prediction.work_s == 3 * 2.0 + 10 * UNIT_S


def test_what_is_not_reported_yet_counts_as_estimated():
    router = Router()
    asked = request(range(100), request_id="first")
    router.record(asked, price(router, asked, candidate("a")))
    assert order(ranked(router, request([7] * 50), [candidate("a", unreported=["first"]), candidate("b")])) == [
        "b",
        "a",
    ]
    assert price(router, request([7] * 50), candidate("a", unreported=["first"])).cost_s == 0.1 + 0.05


def test_requests_with_a_common_prefix_that_come_together_meet():
    router = Router()
    for number in range(4):
        asked = request([*range(800), number], request_id=f"{number}")
        unreported = [f"{earlier}" for earlier in range(number)]
        prediction = ranked(router, asked, [candidate("a", unreported=unreported), candidate("b", 0.7)])[0]
        assert prediction.replica_id == "a"
        router.record(asked, prediction)


def test_a_promise_is_believed_for_a_while_only():
    now = 0.0
    router = Router(clock=lambda: now)
    asked = request(range(800))
    router.record(asked, price(router, asked, candidate("a")))
    assert price(router, asked, candidate("a")).work_s == 16 * UNIT_S
    now = PROMISE_S + 2 * 0.8 + 0.1
    assert price(router, asked, candidate("a")).work_s == 0.8


def test_a_lost_replica_holds_nothing():
    router = Router()
    asked = request(range(800))
    router.record(asked, price(router, asked, candidate("a")))
    router.forget("a")
    assert price(router, asked, candidate("a")).work_s == 0.8


def test_memory_is_bounded():
    router = Router(max_remembered=10)
    for number in range(100):
        asked = request([number] * 200, request_id=f"{number}")
        router.record(asked, price(router, asked, candidate("a")))
    assert len(router._promises) == len(router._work_s) == 10


def test_a_session_stays_where_it_is_when_others_come_or_go():
    four = [candidate(name) for name in "abcd"]
    sessions = [f"s{number}" for number in range(200)]
    before = {session: first(Router(), request(session=session), *four) for session in sessions}
    after = {session: first(Router(), request(session=session), *four[:3]) for session in sessions}
    assert all(after[session] == before[session] for session in sessions if before[session] != "d")
    assert min(Counter(before.values()).values()) > 25


def test_a_session_yields_to_more_than_a_small_difference():
    at_home = first(Router(), request(range(10), session="s"), candidate("a"), candidate("b"))
    home, other = (at_home, "b" if at_home == "a" else "a")
    asked = request(range(10), session="s")
    assert first(Router(), asked, candidate(home, TIE_S), candidate(other)) == home
    assert first(Router(), asked, candidate(home, 0.1), candidate(other)) == other


def test_an_image_counts_by_its_pixels_and_steps():
    router = Router()
    unit_s = 1e-8
    small, large = (price(router, image_request(side), candidate("a", unit_s=unit_s)) for side in (256, 1024))
    assert large.work_s == 16 * small.work_s == 20 * 1024**2 * unit_s
    router.record(image_request(1024), large)
    busy = candidate("a", unit_s=unit_s, unreported=["1024"])
    assert first(router, image_request(256), busy, candidate("b", 0.1, unit_s=unit_s)) == "b"


# -- of many ----------------------------------------------------------------------------------------------------------


def many(num: int, **of: Told) -> dict[str, Told]:
    """So many equal replicas, and those that differ."""
    return {f"r{number}": candidate(f"r{number}", 1.0) for number in range(num)} | of


def test_of_many_a_few_are_looked_at_and_the_others_only_by_who_goes_on():
    replicas = many(500)
    rounds = Router().rounds(request(), replicas)
    looked_at = order(next(rounds))
    assert len(looked_at) == NUM_DRAWN and sum(each.num_looks for each in replicas.values()) == NUM_DRAWN
    assert {*looked_at, *order(next(rounds))} == set(replicas) and sum(
        each.num_looks for each in replicas.values()
    ) == 500
    assert next(rounds, None) is None


def test_up_to_that_number_all_are_looked_at():
    assert len(ranked(Router(), request(), [candidate(f"r{number}") for number in range(NUM_DRAWN)])) == NUM_DRAWN


def test_each_gateway_draws_others_and_the_same_ones_again_from_the_same_seed():
    def drawn(seed: str) -> list[set[str]]:
        router = Router(seed=seed)
        return [{*order(next(router.rounds(request(), many(500))))} for _ in range(3)]

    assert drawn("gateway-0") == drawn("gateway-0") != drawn("gateway-1")
    assert len({frozenset(names) for names in drawn("gateway-0")}) == 3


def test_the_one_replica_of_many_that_has_the_prefix_gets_the_request():
    replicas = many(500, holder=candidate("holder", 1.0, cached=range(160)))
    assert order(next(Router().rounds(request(), replicas)))[0] == "holder"


def test_what_was_just_sent_to_one_of_many_is_found_there():
    router, replicas = Router(), many(500, holder=candidate("holder", 1.0))
    asked = request()
    router.record(asked, price(router, asked, replicas["holder"]))
    for number in range(8):
        assert order(next(router.rounds(request(request_id=f"{number}"), replicas)))[0] == "holder"


def test_a_prefix_that_all_have_is_no_reason_to_look_at_all():
    replicas = {f"r{number}": candidate(f"r{number}", cached=range(160)) for number in range(500)}
    assert NUM_DRAWN <= len(next(Router().rounds(request(), replicas))) <= NUM_DRAWN + NUM_HOLDERS


def test_of_many_equal_ones_a_session_has_its_own():
    router, replicas = Router(), many(500)
    for number in range(20):
        asked = request(range(10), session=f"s{number}")
        homes = {order(next(router.rounds(asked, replicas)))[0] for _ in range(3)}
        assert homes == {home(f"s{number}", list(replicas))}


@given(st.lists(st.integers(0, 12), max_size=60), st.integers(1, 10), st.integers())
def test_the_longest_holders_are_those_that_have_the_most(depths, num, seed):
    """Against sorting all of them by how much they have; a cache that has a block has those before it."""
    keys = list(range(100, 112))
    holdings = [(f"r{number}", {*keys[:depth]}) for number, depth in enumerate(depths)]
    found = longest_holders(keys, holdings, num, random.Random(seed))
    told = dict(zip((name for name, _ in holdings), depths))
    assert len({*found}) == len(found)
    assert sorted(told[name] for name in found) == sorted(sorted(depth for depth in depths if depth)[-num:])
