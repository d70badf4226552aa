"""What the REST edge asks of a prefill node, and what it gets back. The seam between edges and roles."""

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from hmad.facts.sampling import SampledToken, SamplingParams

Place = Any  # in the role's queue; the edge only carries it


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt, n choices: ``seeds`` has one seed (0..2^64-1) per choice.

    ``streamed`` means that the client gets every event at once; else it gets nothing before the end. ``received_s`` is
    when its HTTP request came (monotonic).
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    seeds: tuple[int, ...]
    streamed: bool
    received_s: float
    place: Place  # in the queue, as ``admit`` gave it


@dataclass(frozen=True)
class TokenEvent:
    """One step of one choice. The last event of a choice has a finish reason, ``stop`` or ``length``.

    ``index`` counts the tokens of the choice. Where it is 0 again, a decode node was lost and the choice begins anew:
    forget what came before. That never happens to a streamed request.
    """

    choice: int
    index: int
    token: SampledToken
    finish_reason: str | None = None


class Generation(Protocol):
    """A request under way: iterate to its end; events of different choices interleave.

    Iterating raises ``RequestError`` when it cannot be served (full, timed out, never fits) and ``RemoteError`` or
    ``LocalError`` when it breaks later.
    """

    request_id: str

    def __aiter__(self) -> AsyncIterator[TokenEvent]: ...

    def stop_choice(self, choice: int) -> None:
        """The edge has all it wants of this choice (a stop string): no more events come for it."""


class Generator(Protocol):
    """A prefill role, seen from the edge."""

    def check_room(self, client: str) -> None:
        """Raise RequestError (429 with Retry-After) when the queue has no room for this client.

        ``client`` is whose turn a request takes: the digest of an API key, or an address.
        """

    def admit(self, client: str, num_prompts: int) -> AbstractContextManager[Sequence[Place]]:
        """Places in the queue, one per prompt, held while the prompts are prepared; or RequestError as check_room."""

    def check_fits(self, requests: Sequence[GenerationRequest]) -> None:
        """Raise RequestError (400) for what this node can never compute."""

    def generate(self, request: GenerationRequest) -> AbstractAsyncContextManager[Generation]:
        """Queue the request; leaving the context cancels whatever is not finished."""
