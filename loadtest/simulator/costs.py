"""What the parts around the replicas take of a core, in seconds an item, and how much of a core a fleet takes of each.

Measured from the code that serves by `python -m loadtest.simulate costs`; the figures below are what that gave on the
machine of `loadtest/results/simulator.md`, so that nothing has to be measured to simulate.
"""

from __future__ import annotations

from dataclasses import dataclass

from serve.channel_server import LOAD_PERIOD_S
from serve.gateway.routing import MAX_KEYS
from serve.hub_client import PUSH_PERIOD_S


@dataclass(frozen=True, kw_only=True, slots=True)
class Costs:
    """CPU seconds. One process has one core for its event loop."""

    request_s: float = 0.00225
    """Gateway: HTTP, checks, tokens, submit, end of the stream; without ranking."""
    token_s: float = 47e-6
    """Gateway: an output token as an event of its own."""
    listed_s: float = 0.67e-6
    """Gateway: placing a request, for each replica of its model."""
    candidate_s: float = 5.5e-6
    """Gateway: ranking, for each replica that is looked at."""
    block_s: float = 1.1e-6
    """Gateway: ranking, for each block of a prompt's hashes."""
    report_s: float = 13e-6
    """Gateway: a load report that comes in."""
    send_report_s: float = 13e-6
    """Replica: a load report that leaves."""
    push_s: float = 38e-6
    """Hub: a snapshot of a process, once a second."""
    change_s: float = 90e-6
    """Hub: a change of the list of a thousand replicas, told to nobody yet."""
    follower_s: float = 4e-6
    """Hub: telling one gateway of a change."""
    update_s: float = 0.86e-6
    """Gateway: a change of the list, for each replica on it."""

    def rank_s(self, num_replicas: int, num_drawn: int, num_prompt: int, block_size: int = 16) -> float:
        """Placing one request."""
        if num_replicas < 2:
            return 0.0
        ranked_s = min(num_replicas, num_drawn) * self.candidate_s
        return num_replicas * self.listed_s + ranked_s + min(MAX_KEYS, num_prompt // block_size) * self.block_s

    def reports_share(self, num_replicas: int) -> float:
        """Of a gateway's core, spent on the reports of all replicas."""
        return num_replicas / LOAD_PERIOD_S * self.report_s

    def loads(
        self,
        *,
        num_replicas: int,
        num_gateways: int,
        num_drawn: int,
        requests_per_s: float,
        tokens_per_s: float,
        num_prompt: float,
    ) -> dict[str, float]:
        """Share of one core that a process of each kind takes, by what it does."""
        members = num_replicas + num_gateways
        per_gateway = requests_per_s / num_gateways
        return {
            "gateway: ranking": per_gateway * self.rank_s(num_replicas, num_drawn, round(num_prompt)),
            "gateway: requests": per_gateway * self.request_s,
            "gateway: tokens": tokens_per_s / num_gateways * self.token_s,
            "gateway: load reports": self.reports_share(num_replicas),
            "replica: load reports": num_gateways / LOAD_PERIOD_S * self.send_report_s,
            "hub: pushes": members / PUSH_PERIOD_S * self.push_s,
        }

    def announce_s(self, num_gateways: int) -> float:
        """Hub: one change of the list of replicas, told to all gateways."""
        return self.change_s + num_gateways * self.follower_s

    def adopt_s(self, num_replicas: int) -> float:
        """Gateway: the same, once it is told."""
        return num_replicas * self.update_s


NOTHING = Costs(
    request_s=0.0, token_s=0.0, listed_s=0.0, candidate_s=0.0, block_s=0.0, report_s=0.0, send_report_s=0.0, push_s=0.0,
    change_s=0.0, follower_s=0.0, update_s=0.0,
)  # fmt: skip
"""Replicas alone."""
