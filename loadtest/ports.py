"""What a running Tandem listens on: every listening socket of a process and all below it, and which of them are meant.

    python -m loadtest.ports PID

The rules are the table in deploy/README.md. Ends with 1 when something listens that no rule knows or allows.
"""

from __future__ import annotations

import argparse
import ipaddress
import re
from dataclasses import dataclass

import psutil


@dataclass(frozen=True, slots=True)
class Listener:
    process: str
    """What tells it from others: `ray::ServeReplica:tandem:hub`, `raylet`, `serve.process`."""
    pid: int
    address: str
    port: int

    @property
    def reach(self) -> str:
        """`loopback`, `node` (one address of this machine) or `any` (all of them)."""
        address = ipaddress.ip_address(self.address.removeprefix("::ffff:"))
        return "any" if address.is_unspecified else "loopback" if address.is_loopback else "node"


@dataclass(frozen=True, slots=True)
class Rule:
    """Which processes may listen, how far they may be reached, and what for."""

    process: str
    """A regular expression over `Listener.process`."""
    reach: tuple[str, ...]
    purpose: str
    is_api: bool = False
    """Whether it is for the port of the API alone."""


RULES = (
    Rule(
        r"serve\.process|ray::ServeReplica:.*:gateway",
        ("loopback", "node", "any"),
        "the API, on --host and --port; without keys loopback only",
        is_api=True,
    ),
    Rule(r"serve\..*", ("loopback",), "ranks of one model (torch.distributed)"),
    Rule(
        r"ray::ServeReplica:.*",
        ("loopback",),
        "channels of hub and replicas, which ask for a secret; ranks of one model",
    ),
    Rule(r"gcs_server|raylet|tandem serve|ray::.*", ("any", "node", "loopback"), "Ray, which asks for its token"),
    Rule(r"ray::(DashboardAgent|RuntimeEnvAgent)", ("node", "loopback"), "Ray's agents, which ask for its token"),
    Rule(r"ray (monitor|dashboard)", ("loopback",), "figures of Ray's own for a Prometheus on this machine"),
)
"""Of one machine. On a cluster that is joined, channels are on the node's address: k8s/README.md has that table."""


def listeners(pid: int) -> list[Listener]:
    """The listening TCP sockets of a process and all below it, as its own network namespace has them. One that several
    processes share (SO_REUSEPORT, or inherited) is told for each."""
    root = psutil.Process(pid)
    found: list[Listener] = []
    for process in [root, *root.children(recursive=True)]:
        try:
            name = _name(process)
            for connection in process.net_connections(kind="tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    found.append(Listener(name, process.pid, *connection.laddr))
        except psutil.Error:  # it has ended meanwhile
            continue
    return sorted(found, key=lambda item: (item.process, item.address, item.port))


def rule_for(listener: Listener, api_port: int) -> Rule | None:
    """The rule that allows it, if one does."""
    for rule in RULES:
        is_meant = re.fullmatch(rule.process, listener.process) and listener.reach in rule.reach
        if is_meant and (listener.port == api_port or not rule.is_api):
            return rule
    return None


def _name(process: psutil.Process) -> str:
    line = " ".join(process.cmdline())
    if match := re.search(r"(ray::[\w:.-]+)|from (serve[\w.]*) import main", line):
        return match[1] or match[2]
    if match := re.search(r"/ray/(?:autoscaler/_private|dashboard)/(monitor|dashboard)\.py", line):
        return f"ray {match[1]}"
    return "tandem serve" if re.search(r"-m serve\.cli|/tandem ", line) else process.name()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("pid", type=int, metavar="PID", help="of `tandem serve`; in a container 1")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="the API's")
    arguments = parser.parse_args()
    found = listeners(arguments.pid)
    unmeant = 0
    for listener in found:
        rule = rule_for(listener, arguments.port)
        unmeant += rule is None
        where = f"[{listener.address}]" if ":" in listener.address else listener.address
        purpose = rule.purpose if rule else "NOT MEANT"
        print(f"{where + ':' + str(listener.port):<24} {listener.process} ({listener.pid}): {purpose}")
    beyond = sum(item.reach != "loopback" for item in found)
    print(f"{len(found)} listening, {beyond} beyond loopback, {unmeant} not meant")
    raise SystemExit(1 if unmeant or not found else 0)


if __name__ == "__main__":
    main()
