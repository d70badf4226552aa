"""The one seam to a vendor: what a device does for each phase, and what goes in and out.

The seam is coarse, so that a compiled-graph vendor fits behind it: a whole prefill batch, a whole decode step.
Encoded layers are emitted while the batch still computes; the caller decides what happens to them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import msgspec
import numpy as np
import torch

from hmad.compute.batch import DecodeBatch
from hmad.facts.errors import HmadError, NonFiniteKVError
from hmad.facts.formats import KVFormat, KVGeometry
from hmad.facts.sampling import SampledToken, SamplingParams

CPU = torch.device("cpu")


@dataclass(eq=False)
class PrefillSequence:
    """One prompt on its way through prefill. ``format`` is None when its KV is never shipped (one output token)."""

    prompt_token_ids: Sequence[int]
    params: SamplingParams
    seeds: tuple[int, ...]
    format: KVFormat | None
    num_computed: int = 0
    history: "KVHistory | None" = None
    error: HmadError | None = None
    cancelled: bool = False

    @property
    def num_remaining(self) -> int:
        return len(self.prompt_token_ids) - self.num_computed


@dataclass(frozen=True)
class PrefillChunk:
    """The next ``num_tokens`` positions of a sequence."""

    sequence: PrefillSequence
    num_tokens: int

    @property
    def start(self) -> int:
        return self.sequence.num_computed

    @property
    def end(self) -> int:
        return self.start + self.num_tokens

    @property
    def is_last(self) -> bool:
        return self.end == len(self.sequence.prompt_token_ids)


class KVHistory:
    """P's own unquantized K and V of a prompt's earlier chunks, for a prompt of more than one."""

    def __init__(self, geometry: KVGeometry, num_tokens: int, dtype: torch.dtype, device: torch.device = CPU) -> None:
        shape = (geometry.num_layers, num_tokens, geometry.num_kv_heads, geometry.head_dim)
        self.k = torch.empty(shape, dtype=dtype, device=device)
        self.v = torch.empty(shape, dtype=dtype, device=device)

    @property
    def num_bytes(self) -> int:
        return self.k.nbytes + self.v.nbytes

    @staticmethod
    def bytes_per_token(geometry: KVGeometry, dtype: torch.dtype) -> int:
        return 2 * geometry.num_layers * geometry.num_kv_heads * geometry.head_dim * dtype.itemsize


@dataclass(frozen=True)
class EncodedBlocks:
    """Blocks [first_block, first_block + num_blocks) of a run of layers, one after the other, encoded, in a staging
    page."""

    sequence: PrefillSequence
    first_layer: int
    num_layers: int
    first_block: int
    num_blocks: int
    page: int
    payload: np.ndarray  # uint8 [num_layers * num_blocks * block_bytes], the page's memory


@dataclass(frozen=True)
class LayerClock:
    """When layers of a batch that a device computes at once began, and when the K and V of all of them existed
    (monotonic seconds).
    """

    layers: range
    started_s: float
    kv_ready_s: float


@dataclass(frozen=True)
class PrefillObserver:
    """What a device calls while a batch computes, from one thread at a time, before ``prefill`` returns."""

    blocks_encoded: Callable[[EncodedBlocks], None]
    layers_computed: Callable[[LayerClock], None]


@dataclass
class PrefillResult:
    """First tokens of the sequences whose prompt is complete: one per seed, or the error of that sequence."""

    first_tokens: dict[PrefillSequence, list[SampledToken]] = field(default_factory=dict)


class PackedChunks:
    """Chunks of several sequences laid end to end: iterate for (chunk, its rows)."""

    def __init__(self, chunks: Sequence[PrefillChunk]) -> None:
        ends = torch.tensor([c.num_tokens for c in chunks]).cumsum(0).tolist()
        self._rows = [slice(end - c.num_tokens, end) for c, end in zip(chunks, ends, strict=True)]
        self._chunks = list(chunks)
        token_ids = [t for c in chunks for t in c.sequence.prompt_token_ids[c.start : c.end]]
        self.token_ids = torch.tensor(token_ids, dtype=torch.int64)
        self.positions = torch.cat([torch.arange(c.start, c.end) for c in chunks])

    @property
    def num_chunks(self) -> int:
        return len(self._chunks)

    def __iter__(self) -> Iterator[tuple[PrefillChunk, slice]]:
        return iter(zip(self._chunks, self._rows, strict=True))


def non_finite(layer_id: int | None, position: int) -> NonFiniteKVError:
    """K or V at a position cannot be stored; not every device knows in which layer."""
    where = "" if layer_id is None else f" of layer {layer_id}"
    return NonFiniteKVError(
        f"K or V{where} at position {position} is NaN or infinite and cannot be stored. "
        "If other requests fail too, the weights or this precision are at fault",
        (position,),
    )


class PrefillDevice(Protocol):
    """A device in the prefill role."""

    def prefill(self, chunks: Sequence[PrefillChunk], observer: PrefillObserver) -> PrefillResult:
        """Run one packed batch. A sequence that fails gets its ``error`` set and disturbs no other."""

    def new_history(self, num_tokens: int) -> KVHistory:
        """Room for the KV of a prompt that needs more than one chunk."""


Outcome: TypeAlias = SampledToken | HmadError
NO_TOKEN = -2  # and no stop token either


class Outcomes(msgspec.Struct, frozen=True, eq=False):
    """A step's outcomes in columns. Nearly all are a token id and nothing else: no object is made before they are read.

    token_ids int64 [B]; ``special`` has, by row, errors, and tokens about which more was asked. ``may_stop``: unless
    the device knows that no row drew one of its stop tokens.
    """

    token_ids: np.ndarray
    special: dict[int, Outcome]
    may_stop: bool = True

    @classmethod
    def of(cls, outcomes: Sequence[Outcome]) -> "Outcomes":
        token_ids = [NO_TOKEN if isinstance(outcome, HmadError) else outcome.token_id for outcome in outcomes]
        return cls(np.array(token_ids, np.int64), dict(enumerate(outcomes)))

    @property
    def failed(self) -> list[int]:
        """Rows that drew no token."""
        return [row for row, outcome in self.special.items() if isinstance(outcome, HmadError)]

    def __iter__(self) -> Iterator[Outcome]:
        for row, token_id in enumerate(self.token_ids.tolist()):
            yield self.special.get(row) or SampledToken(token_id)


class DecodeDevice(Protocol):
    """A device in the decode role."""

    runs_ahead: bool  # whether a step is to be launched while the one before it is still under way

    def launch(self, batch: DecodeBatch) -> Callable[[], Outcomes]:
        """Begin one step. The returned call waits for it: one token for every sequence, or the error of that sequence
        alone. ``batch`` is advanced as soon as this returns. A device that reads what its sequences say of their tails
        and outputs settles it before.
        """
