"""The evaluation's positive control: a prefill node whose K and V keep only 3 bits on their way into bf16 blocks.

An evaluation that does not see this would see nothing. It is no KV format: nodes know nothing of it, it exists only in
this program, which puts itself between the device and whoever takes its encoded blocks.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace

import torch

from hmad.compute.cpu import CpuPrefill
from hmad.compute.device import EncodedBlocks, PrefillChunk, PrefillObserver, PrefillResult
from hmad.edges.evaluation import node_program

LARGEST = 3  # of the 3-bit integers -3..3, one scale per token and head


def coarsen(blocks: EncodedBlocks, head_dim: int) -> None:
    """Round a page of bf16 blocks in place."""
    values = torch.from_numpy(blocks.payload).view(torch.bfloat16).view(-1, head_dim)
    scale = (values.abs().amax(dim=-1, keepdim=True) / LARGEST).clamp(min=torch.finfo(torch.bfloat16).tiny)
    values.copy_((values / scale).round() * scale)


class CoarsePrefill(CpuPrefill):
    def prefill(self, chunks: Sequence[PrefillChunk], observer: PrefillObserver) -> PrefillResult:
        def encoded(blocks: EncodedBlocks) -> None:
            coarsen(blocks, self.geometry.head_dim)
            observer.blocks_encoded(blocks)

        return super().prefill(chunks, replace(observer, blocks_encoded=encoded))


if __name__ == "__main__":
    from hmad.edges import prefill_node

    prefill_node.CpuPrefill = CoarsePrefill  # type: ignore[attr-defined]
    sys.exit(node_program.main())
