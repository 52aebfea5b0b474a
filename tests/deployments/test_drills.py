"""Parts of a running application die, come, go and are replaced under twenty streaming clients, who notice a pause.

The tests share one cluster and follow each other; each leaves it whole.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from clusters import drilled

from loadtest import drills
from loadtest.drills import NUM_CLIENTS, Outcome, Site

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Iterator[Site]:
    with drilled(tmp_path_factory.mktemp("models"), num_tokens=200) as site:
        yield site


def nobody_noticed(outcome: Outcome) -> bool:
    """Nothing but a pause: every client read to the end what it would have read, and every new request was answered."""
    assert (outcome.errors, outcome.probe_errors, outcome.left_behind) == ([], [], [])
    return outcome.num_same == NUM_CLIENTS and outcome.num_probes > 0


def no_stream_noticed(outcome: Outcome) -> bool:
    """The same where there may be no replica for a while: a new request is then told to come back."""
    assert (outcome.errors, outcome.left_behind) == ([], [])
    return outcome.num_same == NUM_CLIENTS and all(error.startswith("503") for error in outcome.probe_errors)


def test_killed_replica_costs_a_pause(site):
    assert nobody_noticed(outcome := drills.run(site, drills.kill_replica))
    assert outcome.num_moves


def test_streams_outlast_the_death_of_all_replicas_at_once(site):
    assert no_stream_noticed(drills.run(site, drills.kill_replicas))


def test_replicas_come_and_go_unnoticed_though_streams_outlast_the_drain(site):
    assert nobody_noticed(drills.run(site, drills.scale_up))
    assert nobody_noticed(drills.run(site, drills.scale_down))


def test_killed_gateway_costs_its_own_connections_and_their_jobs_are_freed(site):
    outcome = drills.run(site, drills.kill_gateway)
    assert len(outcome.errors) + outcome.num_same == NUM_CLIENTS and outcome.errors
    assert outcome.left_behind == []


def test_every_process_is_replaced_and_streams_go_on_at_the_new_ones(site):
    assert nobody_noticed(drills.run(site, drills.redeploy))


def test_killed_node_costs_a_pause_and_its_replicas_come_up_elsewhere(site):
    """Serve may have put both there."""
    outcome = drills.run(site, drills.kill_node)
    drills.add_node(site)
    assert no_stream_noticed(outcome) and outcome.known_s is not None


def test_other_weights_and_ranks_are_rolled_out_and_ranks_die_and_hang(site):
    """Streams of the old model end on it; then each fault of a rank costs a pause."""
    with drills.updated(site, tensor_parallel_size=2, step_timeout_s=drills.RANK_PATIENCE_S) as update:
        assert nobody_noticed(drills.run(site, update))
        before = site.expected
        site.learn()
        assert site.expected != before
        assert nobody_noticed(drills.run(site, drills.kill_rank))
        assert nobody_noticed(drills.run(site, drills.hang_rank))
