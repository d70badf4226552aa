"""Every error hmad raises, named after whose fault it is.

``Local...`` is ours, ``Remote...`` the peer's, ``RequestError`` the client's. The message always names the
culprit and what to do; anything a program needs stands in a field.
"""


class HmadError(Exception):
    """Base of all errors that hmad raises on purpose."""


class ConfigError(HmadError):
    """The configuration, a key file or an address is wrong: the process ends with exit code 2."""


class ModelError(HmadError):
    """The model directory is wrong (names the file and the tensor): the process ends with exit code 2."""


class LocalError(HmadError):
    """We failed, through no fault of a peer or a client."""


class LocalProtocolError(LocalError):
    """We were about to break the wire protocol: a bug of ours, caught before a byte left."""


class NonFiniteKVError(LocalError):
    """K or V holds a NaN or an infinity: never encoded, the request fails.

    ``rows`` are the offending token rows of the encoded batch, so that only their sequences fail.
    """

    def __init__(self, message: str, rows: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.rows = rows


class NonFiniteLogitsError(LocalError):
    """The logits of one sequence hold a NaN or +infinity, or nothing but -infinity: no token can be drawn from them."""


class DeviceFault(LocalError):
    """A device has failed for good, such as by an illegal access: whatever it holds is lost, and the node must go."""


class RemoteError(HmadError):
    """A peer failed or is gone."""


class RemoteProtocolError(RemoteError):
    """A peer broke the wire protocol: its session ends, the process goes on."""


class HandshakeRejected(RemoteError):
    """A peer does not want to talk to us, or we not to it; the message says why in words a person can act on."""


class TransferAborted(RemoteError):
    """A transfer ended before its last token. ``reason`` is a word of ``hmad.wire.messages.AbortReason``."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class RequestError(HmadError):
    """A client's request cannot be served: carries everything the OpenAI error shape needs.

    ``param`` names the offending field; ``retry_after_s`` becomes the Retry-After header.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s
