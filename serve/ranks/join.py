"""Joins torch.distributed: gloo between CPU devices, NCCL between CUDA devices.

The ranks of one node meet in a file of their private directory, and gloo listens on loopback only. Across nodes they
meet at the driver's TCPStore, and gloo listens where the connection to the driver leaves the node. Neither proves who
connects: the network between nodes must be trusted.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from datetime import timedelta

import torch
import torch.distributed as dist

COLLECTIVE_TIMEOUT_S = 1800.0
"""torch's own default. What hangs is found by the engine's `step_timeout_s`, long before."""
_SIOCGIFADDR = 0x8915


def make_store(address: str, world_size: int, *, is_master: bool = False) -> tuple[dist.Store, str]:
    """The store at `file:PATH` or `tcp:HOST:PORT`, and its address (port 0 becomes a free one)."""
    scheme, _, place = address.partition(":")
    if scheme == "file":
        return dist.FileStore(place, world_size), address
    host, _, port = place.rpartition(":")
    timeout = timedelta(seconds=COLLECTIVE_TIMEOUT_S)
    store = dist.TCPStore(host, int(port), is_master=is_master, timeout=timeout, wait_for_workers=False)
    return store, f"tcp:{host}:{store.port}"


def join(store: dist.Store, *, rank: int, world_size: int, device: str, host: str | None) -> None:
    """Meet the other ranks; returns when all are there. `host`: this node's address; None: all are on this node."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo" if host is None else interface_of(host)
    if device == "cpu":
        backend = "gloo"
    else:
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
        if host is not None:
            os.environ.setdefault("NCCL_SOCKET_IFNAME", os.environ["GLOO_SOCKET_IFNAME"])
    timeout = timedelta(seconds=COLLECTIVE_TIMEOUT_S)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def leave() -> None:
    """The counterpart of `join`, in a process that lives on."""
    if dist.is_initialized():
        dist.destroy_process_group()


def interface_of(host: str) -> str:
    """The name of the network interface that has this IPv4 address. Raises OSError."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue  # an interface without an address
            if socket.inet_ntoa(answer[20:24]) == host:
                return name
    raise OSError(f"no network interface of this node has the address {host!r}")
