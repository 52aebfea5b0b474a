"""What a pod of a Ray cluster runs before Kubernetes ends it: what it serves moves elsewhere, or ends, first.

    python -m serve.deployments.leave --timeout-s 100           (a preStop hook)

Without it Ray ends its workers at once when the pod gets SIGTERM. Ray is told that this node will be taken away: Serve
starts what runs here on other nodes, then stops it here as it stops every replica, letting accepted requests end. This
returns when no replica is left here, or when time is up. Where no other node has room, Serve stops the replicas here in
time for them to drain before the deadline.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import time

import psutil

REPLICA = "ray::ServeReplica:"
"""How Ray titles the processes of Serve's replicas."""
POLL_S = 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description="Leave the Ray cluster: what this node serves moves or ends.")
    parser.add_argument("--timeout-s", type=float, required=True, metavar="N", help="return after this at the latest")
    timeout_s = parser.parse_args().timeout_s
    until = time.monotonic() + timeout_s
    announce(timeout_s)
    while num_replicas() and time.monotonic() < until:
        time.sleep(POLL_S)  # other processes' children give no sign when they end


def announce(timeout_s: float) -> None:
    """Tell Ray that this node ends in `timeout_s`. Its command is the only public way; a failure is told and no more,
    for the pod ends all the same."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    command += ["--reason-message", "the pod ends", "--deadline-remaining-seconds", str(int(timeout_s))]
    try:
        subprocess.run(command, check=True, timeout=timeout_s)
    except (subprocess.SubprocessError, OSError) as error:
        print(f"this node could not leave the cluster: {error}", file=sys.stderr, flush=True)


def num_replicas() -> int:
    """Serve's replicas among this pod's processes."""
    count = 0
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            count += process.cmdline()[:1] != [] and process.cmdline()[0].startswith(REPLICA)
    return count


if __name__ == "__main__":
    main()
