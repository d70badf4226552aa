"""What happened to one request, and when: seconds of the prefill node's monotonic clock.

*Exposed* is the time from the first sampled token until the last byte was verified; *hidden* the share of the time
on the wire that was not exposed (docs/design.md section 8).
"""

from dataclasses import dataclass, field

MAX_SPANS = 4096  # of each kind in one request: a very long prompt's later ones are left out


def name_of(layers: range) -> str:
    """A run of layers in words."""
    return f"layer {label_of(layers)}" if len(layers) == 1 else f"layers {label_of(layers)}"


def label_of(layers: range) -> str:
    """A run of layers where there is little room."""
    return str(layers.start) if len(layers) == 1 else f"{layers.start}..{layers.stop - 1}"


@dataclass
class ComputeSpan:
    """A layer of one chunk, or layers that were computed at once."""

    layers: range
    started_s: float
    kv_ready_s: float
    ended_s: float | None = None  # the next one began, or the first token was there


@dataclass
class FrameSpan:
    """One frame of KV on its way: encoded, first byte sent, copied by the kernel, landed, verified."""

    first_layer: int
    num_layers: int
    first_block: int
    num_blocks: int
    num_bytes: int
    encoded_s: float
    sent_s: float | None = None
    copied_s: float | None = None
    landed_s: float | None = None
    verified_s: float | None = None

    @property
    def layers(self) -> range:
        return range(self.first_layer, self.first_layer + self.num_layers)


@dataclass
class Spans:
    """What happened in detail, for pictures: at most ``limit`` of each kind."""

    limit: int = MAX_SPANS
    compute: list[ComputeSpan] = field(default_factory=list)
    frames: list[FrameSpan] = field(default_factory=list)
    tokens: list[tuple[int, float]] = field(default_factory=list)  # choice, when it came

    def computed(self, layers: range, started_s: float, kv_ready_s: float) -> None:
        """K and V of these layers exist; those before them have ended."""
        self.compute_ended(started_s)
        if len(self.compute) < self.limit:
            self.compute.append(ComputeSpan(layers, started_s, kv_ready_s))

    def compute_ended(self, at_s: float) -> None:
        if self.compute and self.compute[-1].ended_s is None:
            self.compute[-1].ended_s = at_s

    def frame(self, span: FrameSpan) -> FrameSpan:
        """Take note of an encoded frame; whoever carries it fills in the rest."""
        if len(self.frames) < self.limit:
            self.frames.append(span)
        return span

    def token(self, choice: int, at_s: float) -> None:
        if len(self.tokens) < self.limit:
            self.tokens.append((choice, at_s))


@dataclass
class LayerTimes:
    """One layer of one request. The compute times span its chunks, the wire times its frames. Layers that a device
    computes at once have the same.
    """

    started_s: float  # the layer's compute began
    kv_ready_s: float  # its K and V existed
    wire_bytes: int = 0
    sent_s: float | None = None  # first byte handed to the socket
    landed_s: float | None = None  # last byte in the decode node's memory
    verified_s: float | None = None  # its digest checked


@dataclass
class Timeline:
    """One request's life. Fields stay None for what has not happened."""

    request_id: str
    num_prompt_tokens: int
    received_s: float  # its HTTP request
    arrived_s: float  # in the queue, tokenized
    kv_format: str | None = None
    peer: str | None = None
    granted_s: float | None = None
    prefill_started_s: float | None = None
    first_token_s: float | None = None
    committed_s: float | None = None
    finished_s: float | None = None
    num_output_tokens: int = 0
    layers: dict[int, LayerTimes] = field(default_factory=dict)
    clock_offset_s: float | None = None  # of the decode node's clock against ours, as estimated
    spans: Spans = field(default_factory=Spans)

    def frame_sent(self, frame: FrameSpan) -> None:
        """A frame's first byte has left: its bytes are as many of each of its layers."""
        for layer_id in frame.layers:
            times = self.layers[layer_id]
            times.sent_s = times.sent_s or frame.sent_s
            times.wire_bytes += frame.num_bytes // frame.num_layers

    def frame_landed(self, layers: range, landed_s: float, verified_s: float) -> None:
        """A frame of these layers is in the decode node's memory, and right."""
        for layer_id in layers:
            self.layers[layer_id].landed_s, self.layers[layer_id].verified_s = landed_s, verified_s

    @property
    def wire_s(self) -> float | None:
        """Time on the wire: first byte sent until last byte verified."""
        sent = [layer.sent_s for layer in self.layers.values() if layer.sent_s is not None]
        return None if not sent or self.verified_s is None else self.verified_s - min(sent)

    @property
    def verified_s(self) -> float | None:
        """When the last byte of the last layer was verified; None until all are."""
        times = [layer.verified_s for layer in self.layers.values()]
        known = [t for t in times if t is not None]
        return max(known) if known and len(known) == len(times) else None

    @property
    def exposed_s(self) -> float | None:
        """Transfer time that the request had to wait for after its first token."""
        if self.verified_s is None or self.first_token_s is None:
            return None
        return max(0.0, self.verified_s - self.first_token_s)

    @property
    def hidden(self) -> float | None:
        """Share of the wire time hidden behind compute, 0 to 1."""
        if not self.wire_s or self.exposed_s is None:
            return None
        return max(0.0, 1 - self.exposed_s / self.wire_s)

    @property
    def handoff_s(self) -> float | None:
        """Token 0 sampled until COMMITTED."""
        if self.committed_s is None or self.first_token_s is None:
            return None
        return self.committed_s - self.first_token_s
