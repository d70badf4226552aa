"""Prompts through a prefill device, without a node around it."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from hmad.compute.device import (
    EncodedBlocks,
    LayerClock,
    PrefillChunk,
    PrefillDevice,
    PrefillObserver,
    PrefillSequence,
)
from hmad.compute.staging import StagingPool
from hmad.facts.formats import KVFormat
from hmad.facts.sampling import SampledToken, SamplingParams


class Prefilled:
    """Prompts through a device: every block it emits, in order, and the first tokens."""

    def __init__(self, device: PrefillDevice, staging: StagingPool) -> None:
        self.device, self.staging = device, staging
        self.blocks: dict[tuple[PrefillSequence, int, int], np.ndarray] = {}
        self.clocks: list[LayerClock] = []

    def keep(self, blocks: EncodedBlocks) -> None:
        payloads = blocks.payload.reshape(blocks.num_layers, blocks.num_blocks, -1)
        for layer, number in np.ndindex(payloads.shape[:2]):
            place = (blocks.sequence, blocks.first_layer + layer, blocks.first_block + number)
            self.blocks[place] = payloads[layer, number].copy()
        self.staging.release(blocks.page)

    def run(self, *chunks: PrefillChunk) -> dict[PrefillSequence, list[SampledToken]]:
        return self.device.prefill(chunks, PrefillObserver(self.keep, self.clocks.append)).first_tokens

    def raw(self, sequence: PrefillSequence, layer_id: int) -> np.ndarray:
        """uint8 [num_blocks, block_bytes]"""
        assert sequence.format is not None
        num_blocks = sequence.format.num_blocks(len(sequence.prompt_token_ids))
        return np.stack([self.blocks[sequence, layer_id, number] for number in range(num_blocks)])


def sequence_of(prompt: Sequence[int], fmt: KVFormat | None, **params: Any) -> PrefillSequence:
    return PrefillSequence(prompt, SamplingParams(max_tokens=8, temperature=0.0, want_logits=True, **params), (7,), fmt)
