"""The compute-transfer pipeline, as the timelines of real daemons tell it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from checkpoints import write_checkpoint
from daemons import DecodeDaemon, PrefillDaemon, running

NUM_LAYERS = 8
PROMPT = [(7 * i) % 250 for i in range(900)]
NUM_TRIES = 5  # other work on the machine may hold up one request


@dataclass(frozen=True)
class Nodes:
    layerwise: PrefillDaemon
    chunked: PrefillDaemon
    after: PrefillDaemon


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    model = tmp_path_factory.mktemp("model")
    write_checkpoint(model, num_layers=NUM_LAYERS, hidden=256, intermediate=1024, head_dim=64)
    decode = DecodeDaemon(model)
    nodes = Nodes(
        layerwise=PrefillDaemon(model, [decode]),
        chunked=PrefillDaemon(model, [decode], max_batch_tokens=256),
        after=PrefillDaemon(model, [decode], transfer="after"),
    )
    with running(decode, *vars(nodes).values()):
        yield nodes
        decode.wait_until_empty()


def timelines(prefill: PrefillDaemon) -> list[Any]:
    """Of some requests, each of which has shipped every layer."""
    for _ in range(NUM_TRIES):
        prefill.complete(PROMPT, max_tokens=2)
    requests = prefill.status["requests"]
    assert [len(request["layers"]) for request in requests] == [NUM_LAYERS] * NUM_TRIES
    return list(requests)


def layer(request: Any, layer_id: int) -> Any:
    return request["layers"][str(layer_id)]


def test_layers_are_verified_while_later_ones_compute(nodes: Nodes) -> None:
    proofs = [
        max(layer(request, i)["verified_s"] for i in range(NUM_LAYERS - 2))
        < layer(request, NUM_LAYERS - 1)["started_s"]
        for request in timelines(nodes.layerwise)
    ]
    assert any(proofs)


def test_chunks_leave_while_later_ones_compute(nodes: Nodes) -> None:
    for request in timelines(nodes.chunked):
        assert layer(request, NUM_LAYERS - 1)["sent_s"] < layer(request, 0)["kv_ready_s"]


def test_the_sequential_baseline_sends_nothing_before_the_first_token(nodes: Nodes) -> None:
    for request in timelines(nodes.after):
        assert min(layer(request, i)["sent_s"] for i in range(NUM_LAYERS)) >= request["first_token_s"]
        assert request["hidden"] <= 0.1


def test_the_ways_differ_in_nothing_else(nodes: Nodes) -> None:
    answers = [prefill.complete(PROMPT, max_tokens=8).choices[0] for prefill in (nodes.layerwise, nodes.after)]
    assert answers[0]["token_ids"] == answers[1]["token_ids"]
