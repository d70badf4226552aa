"""Frames: encoded as prefix + header beside an untouched payload, and received without copying a payload.

Sans-IO. ``FrameReader`` says which bytes it needs next and where they shall go, and is told when they are there; so a
LAYER's payload lands in its slots by the socket's own receive call. Layout: docs/design.md section 4.
"""

import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgspec
import xxhash

from hmad.facts.errors import HmadError, LocalProtocolError, RemoteProtocolError
from hmad.wire import limits as bounds
from hmad.wire.messages import STRUCT_OF, TYPE_OF, AnyMessage, FrameType, Layer, Limits, Reserve, Tokens, Via

MAGIC = b"HMAD"
PROTOCOL_VERSION = 1
DIGEST_XXH3 = "xxh3-128"
DIGEST_NONE = "none"
NO_DIGEST = bytes(16)  # of a payload that nobody checks

_FIXED = struct.Struct("<4sBBHIQ")  # magic, protocol version, frame type, number, header_len, payload_len
_CHECKSUM = struct.Struct("<I")  # xxh32, seed 0, of the fixed fields, the header, and any payload but a LAYER's
PREFIX_BYTES = _FIXED.size + _CHECKSUM.size
NUMBERS = 1 << 16  # frame numbers count to here and begin again
# A payload is received in parts that are still in the processor's cache when they are digested.
MAX_PART_BYTES = 512 << 10

_ENCODER = msgspec.msgpack.Encoder()
_DECODERS: dict[FrameType, msgspec.msgpack.Decoder[Any]] = {
    frame_type: msgspec.msgpack.Decoder(struct_type) for frame_type, struct_type in STRUCT_OF.items()
}
_TYPES = {int(frame_type): frame_type for frame_type in FrameType}

Place = Callable[[Layer, int], Sequence[memoryview]]
Payload = bytes | bytearray | memoryview


class Received(NamedTuple):
    """One whole frame.

    ``payload`` is None for LAYER, whose bytes are where ``place`` put them, and for frames without one. ``digest`` is
    what an inline LAYER's bytes hash to, or None where the digest is ``none``. ``header`` is as the peer wrote it.
    """

    message: AnyMessage
    payload: memoryview | None
    digest: bytes | None
    header: bytes


def encode_header(message: AnyMessage) -> bytes:
    """The msgpack map of a message; its fields in the order of their declaration."""
    return _ENCODER.encode(message)


def encode_frame(message: AnyMessage, payload: Payload = b"", number: int = 0) -> bytes:
    """Prefix and header of a frame; ``payload`` is sent right behind it. ``FrameWriter`` knows the ``number``."""
    header = encode_header(message)
    payload_bytes = memoryview(payload).nbytes
    fault = _payload_fault(message, payload_bytes)
    if len(header) > bounds.MAX_HEADER_BYTES:
        fault = f"a header of {len(header)} bytes, at most {bounds.MAX_HEADER_BYTES} may be sent"
    frame_type = TYPE_OF[type(message)]
    if fault:
        raise LocalProtocolError(f"{frame_type.name}: {fault}")
    fixed = _FIXED.pack(MAGIC, PROTOCOL_VERSION, frame_type, number % NUMBERS, len(header), payload_bytes)
    checksum = _checksum(fixed + header, b"" if frame_type is FrameType.LAYER else payload)
    return b"".join((fixed, _CHECKSUM.pack(checksum), header))


def payload_digest(algorithm: str, payload: Payload) -> bytes:
    """What a LAYER says of its payload."""
    return NO_DIGEST if algorithm == DIGEST_NONE else xxhash.xxh3_128_digest(payload)


def _checksum(prefix_and_header: bytes | bytearray, payload: Payload) -> int:
    checksum = xxhash.xxh32(prefix_and_header)
    checksum.update(payload)
    return checksum.intdigest()


class FrameWriter:
    """Encodes one connection's frames: numbered, so that the peer finds out when one is lost, repeated or overtaken.

    The handshake's frames have the number 0; it has an order of its own.
    """

    def __init__(self) -> None:
        self._num_frames = 0

    def encode(self, message: AnyMessage, payload: Payload = b"") -> bytes:
        """Like ``encode_frame``: the next frame of this connection."""
        if TYPE_OF[type(message)] in bounds.FRAMES_BEFORE_AUTH:
            return encode_frame(message, payload)
        frame = encode_frame(message, payload, self._num_frames)
        self._num_frames += 1
        return frame


class FrameReader:
    """Receives one connection's frames, in the manner of asyncio's BufferedProtocol.

    ``get_buffer`` is the next part of the frame still missing, never more; ``advance`` takes note of bytes received
    into it. ``limits`` bound the payloads. ``place`` is asked once for every LAYER, when its header is checked, where
    the payload goes. Set ``authenticated`` and ``digest`` when the handshake is done.
    """

    def __init__(self, limits: Limits, place: Place) -> None:
        self.authenticated = False
        self.digest = DIGEST_XXH3
        self._max_payload_bytes = {
            FrameType.RESERVE: limits.reserve_bytes,
            FrameType.LAYER: limits.layer_bytes,
            FrameType.TOKENS: limits.tokens_bytes,
        }
        self._place = place
        self._num_frames = 0  # that came, but for the handshake's
        self._prefix = bytearray(PREFIX_BYTES)
        self._error: HmadError | None = None
        self._part: memoryview
        self._part_done: Callable[[], Received | None]
        self._start_frame()

    @property
    def in_frame(self) -> bool:
        """Whether a frame has begun to come, so that more must."""
        return self._part_done != self._prefix_done or len(self._part) < PREFIX_BYTES

    def get_buffer(self) -> memoryview:
        """Where the next bytes go, all of them or the first. No side effects; never empty."""
        return self._part[:MAX_PART_BYTES]

    def advance(self, nbytes: int) -> Received | None:
        """``nbytes`` have been received into ``get_buffer()``. Returns the frame that they complete, if they do.

        Raises RemoteProtocolError for what the peer may not send, and again for whatever follows it.
        """
        if self._error is not None:
            raise self._error
        if nbytes > len(self._part):
            raise LocalProtocolError(f"{nbytes} bytes received into a buffer of {len(self._part)}")
        if self._hasher is not None:
            self._hasher.update(self._part[:nbytes])
        self._part = self._part[nbytes:]
        if self._part:
            return None
        try:
            return self._part_done()
        except HmadError as error:
            self._error = error
            self._part = memoryview(self._prefix)
            raise

    def feed(self, data: bytes) -> list[Received]:
        """Copy ``data`` in, as a socket would, and return the frames it completes."""
        frames = []
        rest = memoryview(data)
        while rest:
            part = self.get_buffer()
            nbytes = min(len(part), len(rest))
            part[:nbytes] = rest[:nbytes]
            rest = rest[nbytes:]
            if (received := self.advance(nbytes)) is not None:
                frames.append(received)
        return frames

    def _start_frame(self) -> None:
        self._hasher: xxhash.xxh3_128 | None = None
        self._views: list[memoryview] = []  # of the payload, still to be filled, the last one first
        self._payload: memoryview | None = None
        self._expect(memoryview(self._prefix), self._prefix_done)

    def _expect(self, part: memoryview, done: Callable[[], Received | None]) -> None:
        self._part = part
        self._part_done = done

    def _prefix_done(self) -> None:
        magic, version, type_id, number, header_len, payload_len = _FIXED.unpack_from(self._prefix)
        if magic != MAGIC:
            raise RemoteProtocolError(f"the peer does not speak hmad: its frame starts with {magic!r}")
        if version != PROTOCOL_VERSION:
            raise RemoteProtocolError(
                f"the peer speaks protocol version {version}, this node {PROTOCOL_VERSION}: "
                "run the same release of hmad on both"
            )
        self._frame_type = self._check_type(type_id)
        self._number: int = number
        self._payload_len: int = payload_len
        self._check_sizes(header_len, payload_len)
        self._header = bytearray(header_len)
        self._expect(memoryview(self._header), self._header_done)

    def _check_type(self, type_id: int) -> FrameType:
        frame_type = _TYPES.get(type_id)
        if frame_type is None:
            raise RemoteProtocolError(f"unknown frame type {type_id}")
        if frame_type not in (bounds.FRAMES_AFTER_AUTH if self.authenticated else bounds.FRAMES_BEFORE_AUTH):
            when = "after" if self.authenticated else "before"
            raise RemoteProtocolError(f"{frame_type.name} may not come {when} the peer is authenticated")
        return frame_type

    def _check_sizes(self, header_len: int, payload_len: int) -> None:
        most = bounds.MAX_HEADER_BYTES if self.authenticated else bounds.MAX_HEADER_BYTES_BEFORE_AUTH
        if not 0 < header_len <= most:
            name = self._frame_type.name
            raise RemoteProtocolError(f"{name} has a header of {header_len} bytes, must be 1 to {most}")
        most = self._max_payload_bytes.get(self._frame_type, 0)
        if payload_len > most:
            name = self._frame_type.name
            raise RemoteProtocolError(f"{name} has a payload of {payload_len} bytes, at most {most} are allowed")

    def _header_done(self) -> Received | None:
        if self._payload_len and self._frame_type is not FrameType.LAYER:
            self._payload = memoryview(bytearray(self._payload_len))
            self._expect(self._payload, self._control_payload_done)
            return None
        self._message = self._checked_message()
        if isinstance(self._message, Layer):
            self._views = self._layer_destinations(self._message)
        return self._next_view()

    def _control_payload_done(self) -> Received | None:
        self._message = self._checked_message()
        return self._next_view()

    def _checked_message(self) -> AnyMessage:
        """The header's message, once all that the checksum covers is here."""
        name = self._frame_type.name
        (expected,) = _CHECKSUM.unpack_from(self._prefix, _FIXED.size)
        if _checksum(self._prefix[: _FIXED.size] + self._header, self._payload or b"") != expected:
            raise RemoteProtocolError(f"{name}: the checksum is wrong")
        self._check_number()
        message = _decode_header(self._frame_type, self._header)
        fault = _payload_fault(message, self._payload_len)
        if fault:
            raise RemoteProtocolError(f"{name}: {fault}")
        return message

    def _check_number(self) -> None:
        if self._frame_type in bounds.FRAMES_BEFORE_AUTH:
            return
        expected = self._num_frames % NUMBERS
        if self._number != expected:
            raise RemoteProtocolError(
                f"{self._frame_type.name} is frame {self._number} of its connection, {expected} is next: "
                "frames were lost, repeated or reordered"
            )
        self._num_frames += 1

    def _layer_destinations(self, layer: Layer) -> list[memoryview]:
        views = [view.cast("B") for view in self._place(layer, self._payload_len)]
        if sum(map(len, views)) != self._payload_len:
            raise LocalProtocolError(f"{sum(map(len, views))} bytes of room for a LAYER of {self._payload_len}")
        if self.digest == DIGEST_XXH3 and layer.via is Via.INLINE:
            self._hasher = xxhash.xxh3_128()
        return [view for view in reversed(views) if view]

    def _next_view(self) -> Received | None:
        if self._views:
            self._expect(self._views.pop(), self._next_view)
            return None
        digest = self._hasher.digest() if self._hasher is not None else None
        received = Received(self._message, self._payload, digest, bytes(self._header))
        self._start_frame()
        return received


def _decode_header(frame_type: FrameType, header: bytearray) -> AnyMessage:
    try:
        message: AnyMessage = _DECODERS[frame_type].decode(header)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise RemoteProtocolError(f"{frame_type.name}: bad header: {error}") from error
    return message


def _payload_fault(message: AnyMessage, payload_len: int) -> str | None:
    """What is wrong with a payload of this length behind this header, or None."""
    if isinstance(message, Layer):
        return _layer_payload_fault(message, payload_len)
    expected = 0
    if isinstance(message, Reserve):
        expected = bounds.PROMPT_TOKEN_BYTES * message.num_prompt_tokens
    elif isinstance(message, Tokens):
        expected = sum(entry.payload_bytes for entry in message.entries)
    return None if payload_len == expected else f"its payload has {payload_len} bytes, its header says {expected}"


def _layer_payload_fault(layer: Layer, payload_len: int) -> str | None:
    inline = layer.via is Via.INLINE
    if inline == (payload_len == 0):
        return f"a payload of {payload_len} bytes does not go with via {layer.via}"
    if inline != (layer.descriptor is None):
        return f"via {layer.via} {'has no' if inline else 'needs a'} descriptor"
    return None
