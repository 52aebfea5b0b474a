"""An authenticated connection that carries frames: handshake, framing, coalesced writes, liveness.

Both sides prove that they know the shared secret before either reads a frame; the secret itself never travels:

    server → client   magic, version, nonce_s
    client → server   magic, version, nonce_c, HMAC-SHA256(secret, "client" + purpose + nonce_s + nonce_c)
    server → client                            HMAC-SHA256(secret, "server" + purpose + nonce_s + nonce_c)

This authenticates peers and does not encrypt: over TCP the network between them must be trusted. A peer that stays
silent is lost after `SILENCE_S`, also when its host vanished without a word; both sides therefore ping when idle.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import secrets
from collections.abc import Callable, Iterable
from typing import Protocol, cast

from serve.errors import Unavailable
from serve.wire import HEADER, MAX_FRAME_BYTES, PROTOCOL_VERSION, Address, Frame, Malformed, Ping, decode, encode

log = logging.getLogger(__name__)

HANDSHAKE_S = 5.0
"""From the first byte to mutual proof; who takes longer is cut off."""
TICK_S = 0.5
SILENT_TICKS = 8
SILENCE_S = TICK_S * SILENT_TICKS
"""A peer from which nothing came for this long is lost. Counted in our own ticks: when this process itself was held up,
the bytes that wait in its socket are read before the next tick counts."""
CLOSE_S = 2.0
"""How long a closing connection may take to send what it has."""
WRITE_BUFFER_BYTES = 1 << 20
"""Beyond it `is_writable` is false: streams then wait, and their events merge at their source."""

_MAGIC = b"TANDEM" + bytes([PROTOCOL_VERSION])
_NONCE = 32
_MAC = 32


class Peer(Protocol):
    """Who uses a connection. All calls come from its event loop."""

    def received(self, frame: Frame) -> None:
        """A frame came. May raise Malformed, which ends the connection."""
        ...

    def gather(self) -> Iterable[bytes]:
        """Encoded frames that are to leave with this turn's write, after those given to `send`."""
        ...

    def writable(self) -> None:
        """`is_writable` has become true again."""
        ...

    def lost(self, reason: str) -> None:
        """The connection has ended; called once, whoever ended it."""
        ...


class Connection(asyncio.Protocol):
    """One side of a connection. `send` and `schedule` write once per turn of the event loop."""

    def __init__(
        self,
        secret: bytes,
        purpose: str,
        *,
        accepts: frozenset[type[Frame]],
        on_stranger: Callable[[Connection], bool] | None = None,
        on_ready: Callable[[Connection], None] | None = None,
    ):
        """`accepts`: the frames this side may receive. A listener gives the callbacks: whether one more unproven
        connection may stay, and what to do (`attach`) with a proven one."""
        if len(secret) < 16:
            raise ValueError(f"the secret has {len(secret)} bytes; give at least 16 random ones")
        self._secret = secret
        self._purpose = purpose.encode()
        self._is_server = on_ready is not None
        self._on_stranger = on_stranger
        self._on_ready = on_ready
        self._accepts = accepts | {Ping}
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._peer: Peer | None = None
        self._nonce = secrets.token_bytes(_NONCE)
        self._expected_proof = b""
        self._buffer = bytearray()
        self._needed = 0
        """Bytes in the buffer below which there is nothing to parse."""
        self._out: list[bytes] = []
        self._is_scheduled = False
        self._has_heard = self._has_spoken = False
        self._num_silent = 0
        self._timer: asyncio.TimerHandle | None = None
        self._reason = ""
        self._is_closing = False
        self.is_authenticated = False
        self.is_writable = True
        self.authenticated: asyncio.Future[None] = self._loop.create_future()
        """Done when both sides have proved themselves; fails with Unavailable."""
        self.closed: asyncio.Future[None] = self._loop.create_future()

    # -- for the peer ----------------------------------------------------------------------------------------------

    def attach(self, peer: Peer) -> None:
        """Deliver to `peer`. Call before the event loop runs again after `authenticated`."""
        self._peer = peer

    def send(self, frame: Frame) -> None:
        """Write `frame` at the end of this turn of the event loop. Raises FrameTooLarge."""
        self._out.append(encode(frame))
        self.schedule()

    def schedule(self) -> None:
        """Ask the peer to `gather` at the end of this turn: what others add until then leaves in the same write."""
        if not self._is_scheduled:
            self._is_scheduled = True
            self._loop.call_soon(self._flush)

    def close(self, reason: str = "closed") -> None:
        """Send what is due, then end, at the latest `CLOSE_S` later.

        The other side reads to our end of file and closes; were this side closed at once, a write of theirs that
        crosses ours would fail and take what they have not read yet with it.
        """
        if self._transport is None or self._is_closing:
            return
        self._reason = self._reason or reason
        self._flush()
        self._is_closing = True
        if self.is_authenticated and not self._transport.is_closing():
            self._transport.write_eof()
            self._loop.call_later(CLOSE_S, self._transport.abort)
        else:
            self._transport.abort()

    async def wait_closed(self) -> None:
        await asyncio.wait({self.closed})  # awaiting it itself would cancel it with the waiter

    def abort(self, reason: str) -> None:
        """End now."""
        self._reason = self._reason or reason
        if self._transport is not None:
            self._transport.abort()

    # -- for the event loop ----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport = cast(asyncio.Transport, transport)  # uvloop's is one without saying so
        transport.set_write_buffer_limits(WRITE_BUFFER_BYTES)
        self._timer = self._loop.call_later(HANDSHAKE_S, self.abort, "the handshake took too long")
        if self._on_stranger is not None and not self._on_stranger(self):
            self.abort("too many connections that have not proved themselves")
        elif self._is_server:
            transport.write(_MAGIC + self._nonce)

    def data_received(self, data: bytes) -> None:
        if self._is_closing:
            return
        self._has_heard = True
        self._buffer += data
        if len(self._buffer) < self._needed:
            return
        try:
            if self.is_authenticated or self._shake_hands():
                self._parse()
        except Malformed as error:
            log.warning("connection refused purpose=%s reason=%r", self._purpose.decode(), str(error))
            self.abort(str(error))

    def pause_writing(self) -> None:
        self.is_writable = False

    def resume_writing(self) -> None:
        self.is_writable = True
        if self._peer is not None:
            self._peer.writable()

    def connection_lost(self, error: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        reason = self._reason or (str(error) if error else "the other side closed the connection")
        self._buffer.clear()
        if not self.authenticated.done():
            self.authenticated.set_exception(Unavailable(f"{reason} before both had proved that they share a secret"))
            self.authenticated.exception()  # looked at, so that nobody is told it was not
        self.closed.set_result(None)
        if self._peer is not None:
            peer, self._peer = self._peer, None
            peer.lost(reason)

    # -- inside ----------------------------------------------------------------------------------------------------

    def _shake_hands(self) -> bool:
        """Take what the other side says of itself. True once it is believed; raises Malformed."""
        assert self._transport is not None
        if not self._is_server and not self._expected_proof:
            greeting = self._take(len(_MAGIC) + _NONCE)
            if greeting is None:
                return False
            nonce = self._check_magic(greeting)
            self._expected_proof = self._proof(b"server", nonce, self._nonce)
            self._transport.write(_MAGIC + self._nonce + self._proof(b"client", nonce, self._nonce))
        if self._is_server:
            answer = self._take(len(_MAGIC) + _NONCE + _MAC)
            if answer is None:
                return False
            nonce, proof = self._check_magic(answer[:-_MAC]), answer[-_MAC:]
            expected = self._proof(b"client", self._nonce, nonce)
        else:
            answer = self._take(_MAC)
            if answer is None:
                return False
            proof, expected = answer, self._expected_proof
        if not hmac.compare_digest(proof, expected):
            raise Malformed("the other side does not know the secret")
        if self._is_server:
            self._transport.write(self._proof(b"server", self._nonce, nonce))
        self._needed = HEADER.size
        self.is_authenticated = True
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(TICK_S, self._tick)
        self.authenticated.set_result(None)
        if self._on_ready is not None:
            self._on_ready(self)
        return True

    def _take(self, size: int) -> bytes | None:
        if len(self._buffer) < size:
            self._needed = size
            return None
        taken = bytes(self._buffer[:size])
        del self._buffer[:size]
        return taken

    def _check_magic(self, greeting: bytes) -> bytes:
        magic, nonce = greeting[: len(_MAGIC)], greeting[len(_MAGIC) :]
        if magic[:-1] != _MAGIC[:-1]:
            raise Malformed("the other side is not Tandem")
        if magic != _MAGIC:
            raise Malformed(
                f"the other side speaks protocol {magic[-1]}, this one {PROTOCOL_VERSION}; run one version of Tandem"
            )
        return nonce

    def _proof(self, role: bytes, server_nonce: bytes, client_nonce: bytes) -> bytes:
        text = b"\0".join((role, self._purpose)) + b"\0" + server_nonce + client_nonce
        return hmac.new(self._secret, text, hashlib.sha256).digest()

    def _parse(self) -> None:
        """Deliver every complete frame of the buffer."""
        buffer, start, end = self._buffer, 0, len(self._buffer)
        frames = []
        with memoryview(buffer) as view:
            while True:
                if end - start < HEADER.size:
                    self._needed = HEADER.size
                    break
                length, kind = HEADER.unpack_from(view, start)
                if length > MAX_FRAME_BYTES:
                    raise Malformed(f"a frame of {length} bytes exceeds {MAX_FRAME_BYTES}")
                if end - start < HEADER.size + length:
                    self._needed = HEADER.size + length
                    break
                start += HEADER.size
                with view[start : start + length] as payload:
                    frames.append(decode(kind, payload, self._accepts))
                start += length
        del buffer[:start]
        for frame in frames:
            if self._peer is not None and type(frame) is not Ping:
                self._peer.received(frame)

    def _flush(self) -> None:
        self._is_scheduled = False
        if self._transport is None or self._is_closing or self._transport.is_closing():
            self._out.clear()
            return
        if self._peer is not None:
            self._out.extend(self._peer.gather())
        if self._out:
            self._has_spoken = True
            self._transport.write(self._out[0] if len(self._out) == 1 else b"".join(self._out))
            self._out.clear()

    def _tick(self) -> None:
        self._num_silent = 0 if self._has_heard else self._num_silent + 1
        if self._num_silent >= SILENT_TICKS:
            self.abort(f"nothing came for {SILENCE_S:g} s")
            return
        if not self._has_spoken:
            self.send(Ping())
        self._has_heard = self._has_spoken = False
        self._timer = self._loop.call_later(TICK_S, self._tick)


async def connect(address: str, *, secret: bytes, purpose: str, accepts: frozenset[type[Frame]]) -> Connection:
    """A proven connection to `address`; attach a peer to it at once. Raises Unavailable."""
    where = Address.parse(address)
    connection = Connection(secret, purpose, accepts=accepts)
    loop = asyncio.get_running_loop()
    try:
        if where.path:
            await loop.create_unix_connection(lambda: connection, where.path)
        else:
            opening = loop.create_connection(lambda: connection, where.host, where.port)
            await asyncio.wait_for(opening, HANDSHAKE_S)
    except (OSError, TimeoutError) as error:
        raise Unavailable(f"nothing answers at {address}: {error or 'no answer in time'}") from None
    try:
        await asyncio.shield(connection.authenticated)
    except BaseException:
        connection.abort("given up")
        raise
    return connection
