"""A decode engine over an arena that raw prefixes were put into: on any device, without nodes around it."""

from collections.abc import Callable, Iterable
from queue import Queue

import numpy as np
import torch

from hmad.compute.arena import Arena
from hmad.compute.codecs import encode
from hmad.compute.device import DecodeDevice
from hmad.compute.model import Qwen3
from hmad.compute.sequence import DecodeSequence, Segment, tail_tokens
from hmad.facts.formats import FORMATS, KVFormat, KVGeometry
from hmad.facts.sampling import SampledToken, SamplingParams
from hmad.roles.decode_engine import DecodeEngine, StepOutput

NUM_SLOTS = 200
PATIENCE_S = 60.0


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(4, 4000, length).tolist()


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


def logits_of(token: SampledToken) -> torch.Tensor:
    return torch.frombuffer(bytearray(token.logits or b""), dtype=torch.float32)


def poison_token(model: Qwen3, token_id: int) -> None:
    model._head = model._head.clone()  # which is the embedding, too
    model._embedding[token_id] = float("nan")
    if model.device.type == "cuda":
        torch.cuda.synchronize()  # devices have streams of their own


class Decoder:
    """Tails in the model's own type; ``make`` gives the device."""

    def __init__(self, model: Qwen3, make: Callable[[Arena, KVFormat], DecodeDevice], max_batch_size: int) -> None:
        self.model = model
        self.geometry = KVGeometry(model.config.num_layers, model.config.num_kv_heads, model.config.head_dim)
        num_bytes = NUM_SLOTS * self.geometry.num_layers * self.geometry.slot_bytes
        self.arena = Arena(self.geometry, num_bytes, model.device)
        self.arena.bytes.random_(256)  # whatever was here before must not matter
        self.tail = FORMATS["fp32" if model.dtype == torch.float32 else "bf16"]
        self.device = make(self.arena, self.tail)
        self.outputs: Queue[StepOutput] = Queue()
        self.left: Queue[DecodeSequence] = Queue()
        self.engine = DecodeEngine(self.device, max_batch_size, self._deliver)
        self.engine.start()

    def _deliver(self, outputs: Iterable[StepOutput], left: list[DecodeSequence]) -> None:
        for output in outputs:
            self.outputs.put(output)
        for sequence in left:
            self.left.put(sequence)

    def sequence(self, fmt: KVFormat, num_tokens: int, params: SamplingParams, seed: int = 3) -> DecodeSequence:
        """Random KV, the same on every device."""
        slots = self.arena.reserve(fmt.num_blocks(num_tokens))
        generator = torch.Generator().manual_seed(num_tokens)
        heads = self.geometry.num_kv_heads, self.geometry.head_dim
        for layer_id in range(self.geometry.num_layers):
            k, v = torch.randn(2, num_tokens, *heads, generator=generator).bfloat16()
            blocks = encode(fmt, k, v)
            self.arena.layer(layer_id)[torch.from_numpy(slots).long(), : blocks.shape[1]] = blocks.to(self.model.device)
        tail = self.arena.reserve(self.tail.num_blocks(tail_tokens(params)))
        prompt = np.array(prompt_of(num_tokens), np.uint32) % self.model.config.vocab_size
        return DecodeSequence(prompt, params, seed, (Segment(fmt, num_tokens, slots),), self.tail, tail, [11])

    def join(self, *sequences: DecodeSequence) -> None:
        """Let them decode, over what was put into the arena on another stream than the engine's."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        self.engine.join_batch(sequences)

    def decode(self, *sequences: DecodeSequence) -> dict[DecodeSequence, list[SampledToken]]:
        """Until all have ended and left."""
        tokens: dict[DecodeSequence, list[SampledToken]] = {s: [] for s in sequences}
        self.join(*sequences)
        ended = set[DecodeSequence]()
        while len(ended) < len(sequences):
            output = self.outputs.get(timeout=PATIENCE_S)
            assert output.error is None, output.error
            assert output.sequence not in ended
            if output.token:
                tokens[output.sequence].append(output.token)
            if output.ends:
                ended.add(output.sequence)
        for _ in sequences:
            sequence = self.left.get(timeout=PATIENCE_S)
            self.arena.release(sequence.prefix[0].slots)
            self.arena.release(sequence.tail_slots)
        return tokens

    def close(self) -> None:
        self.engine.stop()
        assert self.engine.join(PATIENCE_S)
        assert self.engine.failure is None, self.engine.failure
        self.arena.check_integrity([])
