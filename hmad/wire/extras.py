"""What a TOKENS entry carries beside its token: log-probabilities, then the logits row. Little-endian."""

import math
import struct

from hmad.facts.errors import RemoteProtocolError
from hmad.facts.sampling import SampledToken, TokenLogprobs
from hmad.wire.limits import MAX_TOP_LOGPROBS

_SAMPLED = struct.Struct("<fH")  # log-probability of the sampled token, number of top entries
_TOP = struct.Struct("<If")  # token id, log-probability
_LOGIT_BYTES = 4  # float32


def pack_extras(token: SampledToken) -> bytes:
    """The bytes of one entry; empty when nothing beside the token was asked for."""
    return _pack_logprobs(token.logprobs) + (token.logits or b"")


def unpack_extras(
    view: bytes | memoryview, want_logprobs: bool, want_logits: bool, vocab_size: int
) -> tuple[TokenLogprobs | None, bytes | None]:
    """The exact inverse, for what the request asked for. Raises RemoteProtocolError."""
    logits_bytes = _LOGIT_BYTES * vocab_size if want_logits else 0
    split = len(view) - logits_bytes
    if split < 0 or (split > 0 and not want_logprobs):
        raise RemoteProtocolError(f"extras of {len(view)} bytes, {logits_bytes} of them should be logits")
    logprobs = _unpack_logprobs(view[:split], vocab_size) if want_logprobs else None
    return logprobs, bytes(view[split:]) if want_logits else None


def _pack_logprobs(logprobs: TokenLogprobs | None) -> bytes:
    if logprobs is None:
        return b""
    top = b"".join(_TOP.pack(token_id, logprob) for token_id, logprob in logprobs.top)
    return _SAMPLED.pack(logprobs.logprob, len(logprobs.top)) + top


def _unpack_logprobs(view: bytes | memoryview, vocab_size: int) -> TokenLogprobs:
    if len(view) < _SAMPLED.size:
        raise RemoteProtocolError(f"log-probabilities of {len(view)} bytes, at least {_SAMPLED.size} are needed")
    logprob, count = _SAMPLED.unpack_from(view)
    if count > MAX_TOP_LOGPROBS or len(view) != _SAMPLED.size + count * _TOP.size:
        raise RemoteProtocolError(f"{count} top log-probabilities do not make {len(view)} bytes")
    top = tuple(_TOP.iter_unpack(view[_SAMPLED.size :]))
    if any(token_id >= vocab_size for token_id, _ in top):
        raise RemoteProtocolError(f"a top token id is outside the vocabulary of {vocab_size}")
    if not all(map(math.isfinite, (logprob, *(value for _, value in top)))):
        raise RemoteProtocolError("a log-probability is not finite")
    return TokenLogprobs(logprob, top)
