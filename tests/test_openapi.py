"""docs/openapi.json is what scripts/openapi makes of the types, and what a real node does."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import schemathesis
from checkpoints import write_checkpoint
from daemons import ROOT, DecodeDaemon, PrefillDaemon, running
from hypothesis import HealthCheck, settings
from schemathesis.checks import positive_data_acceptance

DOCUMENT = ROOT / "docs" / "openapi.json"
schema = schemathesis.openapi.from_dict(json.loads(DOCUMENT.read_text()))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[PrefillDaemon, DecodeDaemon]]:
    """Of a model with a short context: a request that asks for all of it is soon answered."""
    model: Path = tmp_path_factory.mktemp("model")
    write_checkpoint(model, max_positions=48)
    decode = DecodeDaemon(model)
    prefill = PrefillDaemon(model, [decode], default_max_tokens=4, queue_timeout=10)
    with running(decode, prefill):
        yield prefill, decode
        decode.wait_until_empty()


def test_the_document_is_up_to_date() -> None:
    made = subprocess.run([sys.executable, "scripts/openapi"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert made.stdout == DOCUMENT.read_text(), "run scripts/openapi > docs/openapi.json"


def operation_test(operation: schemathesis.schemas.APIOperation) -> Callable[..., None]:
    @schema.include(method=operation.method, path=operation.path).parametrize()
    @settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    def does_what_the_document_says(case: schemathesis.Case, pair: tuple[PrefillDaemon, ...]) -> None:
        # A schema cannot say what spans fields, or depends on the model: its vocabulary, its context.
        case.call_and_validate(base_url=pair[0].url, timeout=30, excluded_checks=[positive_data_acceptance])

    return does_what_the_document_says


# Tests by name: as parameters of one test, all operations would have the same id.
for found in schema.get_all_operations():
    name = re.sub(r"\W+", "_", found.ok().label).lower()
    globals()[f"test_a_prefill_node_does_what_the_document_says_of_{name}"] = operation_test(found.ok())
