"""The evaluation's positive control: a prefill node whose K and V keep only 3 bits on their way into bf16 blocks.

An evaluation that does not see this would see nothing. It is no KV format: nodes know nothing of it, it exists only in
this program, which puts itself between the device and whoever takes its encoded blocks.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from hmad.compute.device import EncodedBlocks, KVHistory, PrefillChunk, PrefillDevice, PrefillObserver, PrefillResult
from hmad.edges.devices import Prefilling, open_prefill
from hmad.edges.evaluation import node_program
from hmad.edges.node_model import NodeModel
from hmad.facts.config import Config

LARGEST = 3  # of the 3-bit integers -3..3, one scale per token and head


def coarsen(blocks: EncodedBlocks, head_dim: int) -> None:
    """Round a page of bf16 blocks in place."""
    values = torch.from_numpy(blocks.payload).view(torch.bfloat16).view(-1, head_dim)
    scale = (values.abs().amax(dim=-1, keepdim=True) / LARGEST).clamp(min=torch.finfo(torch.bfloat16).tiny)
    values.copy_((values / scale).round() * scale)


@dataclass(frozen=True)
class CoarseDevice:
    """A device whose blocks are rounded on their way out."""

    device: PrefillDevice
    head_dim: int

    def prefill(self, chunks: Sequence[PrefillChunk], observer: PrefillObserver) -> PrefillResult:
        def encoded(blocks: EncodedBlocks) -> None:
            coarsen(blocks, self.head_dim)
            observer.blocks_encoded(blocks)

        return self.device.prefill(chunks, replace(observer, blocks_encoded=encoded))

    def new_history(self, num_tokens: int) -> KVHistory:
        return self.device.new_history(num_tokens)


def open_coarse(config: Config, model: NodeModel) -> Prefilling:
    opened = open_prefill(config, model)
    return replace(opened, device=CoarseDevice(opened.device, model.geometry.head_dim))


if __name__ == "__main__":
    from hmad.edges import prefill_node

    prefill_node.open_prefill = open_coarse  # type: ignore[attr-defined]
    sys.exit(node_program.main())
