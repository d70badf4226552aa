"""The one table of bounds of the wire. Each is checked before the bytes it bounds are read or allocated."""

from hmad.wire.messages import FrameType

MAX_HEADER_BYTES = 65_536
MAX_HEADER_BYTES_BEFORE_AUTH = 4_096  # a stranger gets no more of our memory than this
MAX_STRANGERS = 256  # connections to the stream port that are not authenticated yet ...
MAX_STRANGERS_PER_ADDRESS = 64  # ... and of those, from one address
MAX_SESSIONS = 256  # of all peers
MAX_BULK_CHANNELS = 64  # of one session
MAX_REASON_CHARS = 2_048  # of a REJECT: fits a header before authentication
MAX_OPEN_TRANSFERS = 4_096  # of one session, ended ones whose bytes are still on their way included
MAX_TOP_LOGPROBS = 20
DIGEST_STRIKES = 3  # this many wrong digests ...
DIGEST_STRIKES_WINDOW_S = 60.0  # ... in this time end the session

PROMPT_TOKEN_BYTES = 4  # a prompt token id in RESERVE's payload: u32

# What may come before the peer is authenticated, and after. P counts D as authenticated after WELCOME, when D can
# still refuse P's AUTH: hence REJECT in both.
FRAMES_BEFORE_AUTH = frozenset({FrameType.HELLO, FrameType.WELCOME, FrameType.AUTH, FrameType.REJECT})
FRAMES_AFTER_AUTH = frozenset(FrameType) - {FrameType.HELLO, FrameType.WELCOME, FrameType.AUTH}
