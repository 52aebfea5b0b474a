"""The connection between the driver and one peer: frames over a stream socket, ordered, authenticated.

    frame: kind, slot, length (8 bytes), then `length` bytes, except for a bell, whose bytes lie in the ring

Both sides prove that they know the group's secret before either acts on a frame; the secret itself does not travel:

    driver → peer   nonce_d
    peer → driver   rank, nonce_p, HMAC-SHA256(secret, "peer" + rank + nonce_d + nonce_p)
    driver → peer                  HMAC-SHA256(secret, "driver" + rank + nonce_d + nonce_p)

This does not encrypt: across nodes the network between them must be trusted, as it must for torch.distributed. The
driver never waits for a peer that is slow to read: what the socket does not take is queued and sent by the group's
watch, up to `MAX_QUEUED_BYTES`.
"""

from __future__ import annotations

import contextlib
import enum
import hashlib
import hmac
import secrets
import socket
import struct
import threading
from collections import deque

Payload = bytes | bytearray | memoryview


class Kind(enum.IntEnum):
    """What a frame says. BELL, TELL, CALL and END go to a peer; REPLY and ERROR come from it."""

    BELL = 1
    """A message lies in the ring."""
    TELL = 2
    """A message, inline."""
    CALL = 3
    REPLY = 4
    ERROR = 5
    END = 6


MAX_FRAME_BYTES = 64 << 20
MAX_QUEUED_BYTES = 256 << 20
"""Of one peer: it has stopped reading long before."""
HANDSHAKE_S = 5.0
"""For a connection to prove itself to the driver, which takes one after the other."""
PATIENCE_S = 60.0
"""Of a peer with a driver that has others to take before it."""
_HEADER = struct.Struct("<BBxxI")
_HELLO = struct.Struct("<I32s32s")
_NONCE = 32


class LinkClosed(Exception):
    """The other side is gone, or is not who it must be."""


class Link:
    """One side of a proven connection."""

    def __init__(self, sock: socket.socket):
        self._socket = sock
        sock.settimeout(None)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _notice_vanished_host(sock)
        self._header = bytearray(_HEADER.size)
        self._received = bytearray()
        self._queue: deque[memoryview] = deque()
        self._queued_bytes = 0
        self._lock = threading.Lock()

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def own_host(self) -> str:
        """This node's address on the way to the other side; of a TCP connection."""
        return str(self._socket.getsockname()[0])

    def close(self) -> None:
        self._socket.close()

    # -- for a peer, which waits -----------------------------------------------------------------------------------

    def receive(self) -> tuple[int, int, int]:
        """Wait for a frame; its kind, slot and length. Its bytes, if any, are to be taken by `read`."""
        _read_into(self._socket, memoryview(self._header))
        kind, slot, length = _HEADER.unpack(self._header)
        if length > MAX_FRAME_BYTES:
            raise LinkClosed(f"a frame of {length} bytes came; at most {MAX_FRAME_BYTES} are allowed")
        return kind, slot, length

    def read(self, length: int) -> memoryview:
        buffer = memoryview(bytearray(length))
        _read_into(self._socket, buffer)
        return buffer

    def send(self, kind: Kind, payload: Payload = b"") -> None:
        """Wait until all is sent. Raises OSError."""
        self._socket.sendall(_HEADER.pack(kind, 0, len(payload)) + bytes(payload))

    # -- for the driver, which does not ----------------------------------------------------------------------------

    def ring_bell(self, slot: int, length: int) -> bool:
        """Tell of a message in the ring; as `offer`."""
        return self._offer(_HEADER.pack(Kind.BELL, slot, length))

    def offer(self, kind: Kind, payload: Payload = b"") -> bool:
        """Send a frame, or queue what the socket does not take now: False then. Raises OSError and LinkClosed."""
        if len(payload) > MAX_FRAME_BYTES:
            raise ValueError(f"a message of {len(payload)} bytes does not fit a frame of {MAX_FRAME_BYTES}")
        return self._offer(_HEADER.pack(kind, 0, len(payload)) + bytes(payload))

    def _offer(self, data: bytes) -> bool:
        with self._lock:
            num_sent = 0
            if not self._queue:
                with contextlib.suppress(BlockingIOError):
                    num_sent = self._socket.send(data, socket.MSG_DONTWAIT)
                if num_sent == len(data):
                    return True
            if self._queued_bytes + len(data) > MAX_QUEUED_BYTES:
                raise LinkClosed(f"it has left {self._queued_bytes} bytes unread")
            self._queue.append(memoryview(data)[num_sent:])
            self._queued_bytes += len(data) - num_sent
            return False

    def flush(self) -> bool:
        """Send of the queue what the socket takes now; True when nothing is left. Raises OSError."""
        with self._lock:
            while self._queue:
                try:
                    num_sent = self._socket.send(self._queue[0], socket.MSG_DONTWAIT)
                except BlockingIOError:
                    return False
                self._queued_bytes -= num_sent
                rest = self._queue.popleft()[num_sent:]
                if rest:
                    self._queue.appendleft(rest)
            return True

    def take(self) -> list[tuple[int, bytes]]:
        """Kinds and bytes of the frames that have come in full. Raises LinkClosed at the end, OSError."""
        with contextlib.suppress(BlockingIOError):
            data = self._socket.recv(1 << 16, socket.MSG_DONTWAIT)
            if not data:
                raise LinkClosed("it has closed its connection")
            self._received += data
        frames = []
        while len(self._received) >= _HEADER.size:
            kind, _, length = _HEADER.unpack_from(self._received)
            if length > MAX_FRAME_BYTES:
                raise LinkClosed(f"it sent a frame of {length} bytes; at most {MAX_FRAME_BYTES} are allowed")
            end = _HEADER.size + length
            if len(self._received) < end:
                break
            frames.append((kind, bytes(self._received[_HEADER.size : end])))
            del self._received[:end]
        return frames


def prove_driver(sock: socket.socket, secret: bytes) -> int:
    """The driver's side of the handshake; the rank of the proven peer. Raises LinkClosed and OSError."""
    sock.settimeout(HANDSHAKE_S)
    nonce_d = secrets.token_bytes(_NONCE)
    sock.sendall(nonce_d)
    hello = memoryview(bytearray(_HELLO.size))
    _read_into(sock, hello)
    rank, nonce_p, proof = _HELLO.unpack(hello)
    if not hmac.compare_digest(proof, _proof(secret, "peer", rank, nonce_d, nonce_p)):
        raise LinkClosed("it does not know the group's secret")
    sock.sendall(_proof(secret, "driver", rank, nonce_d, nonce_p))
    return int(rank)


def prove_peer(sock: socket.socket, secret: bytes, rank: int) -> None:
    """The peer's side. Raises LinkClosed and OSError."""
    sock.settimeout(PATIENCE_S)
    nonce_d, proof = memoryview(bytearray(_NONCE)), memoryview(bytearray(32))
    _read_into(sock, nonce_d)
    nonce_p = secrets.token_bytes(_NONCE)
    sock.sendall(_HELLO.pack(rank, nonce_p, _proof(secret, "peer", rank, bytes(nonce_d), nonce_p)))
    _read_into(sock, proof)
    if not hmac.compare_digest(bytes(proof), _proof(secret, "driver", rank, bytes(nonce_d), nonce_p)):
        raise LinkClosed("what listens there is not this group's driver")


def hand_over(sock: socket.socket, file: int) -> None:
    """Give a proven peer this open file. Of a Unix socket. Raises OSError."""
    socket.send_fds(sock, [b"f"], [file])


def take_over(sock: socket.socket) -> int:
    """The file that the driver hands over. Raises LinkClosed and OSError."""
    _, files, _, _ = socket.recv_fds(sock, 1, 1, socket.MSG_CMSG_CLOEXEC)
    if not files:
        raise LinkClosed("the driver handed over no file")
    return files[0]


def _proof(secret: bytes, role: str, rank: int, nonce_d: bytes, nonce_p: bytes) -> bytes:
    return hmac.digest(secret, f"{role} {rank} ".encode() + nonce_d + nonce_p, hashlib.sha256)


def _read_into(sock: socket.socket, buffer: memoryview) -> None:
    at = 0
    while at < len(buffer):
        num_read = sock.recv_into(buffer[at:])
        if num_read == 0:
            raise LinkClosed("the other side has closed the connection")
        at += num_read


def _notice_vanished_host(sock: socket.socket) -> None:
    """A node that loses its power says nothing: ask after 5 s of silence, give up after 15."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 2), ("TCP_USER_TIMEOUT", 15000)):
        if hasattr(socket, option):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
