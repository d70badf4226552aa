"""What a node says before it loads anything, of a GPU that does not do (made up here: there is none like it), and of
memory that no machine has.
"""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkpoints import write_checkpoint
from daemons import PrefillDaemon

from hmad.compute.checkpoint import ModelConfig, read_config
from hmad.compute.cuda_backend import check_precision
from hmad.compute.cuda_memory import check_budget, open_device
from hmad.edges.devices import enough_memory
from hmad.facts.config import GIB
from hmad.facts.errors import ConfigError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    write_checkpoint(directory, head_dim=64)
    return directory


@pytest.fixture
def config(model: Path) -> ModelConfig:
    return read_config(model)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[int, int]]:
    """One GPU, by its compute capability."""
    facts = {"capability": (8, 0)}
    monkeypatch.setattr(torch.version, "hip", None)
    for name, value in {
        "is_available": True,
        "device_count": 1,
        "set_device": None,
        "get_device_name": "a GPU",
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: facts["capability"])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10 * GIB, 16 * GIB))
    return facts


def test_a_gpu_that_does(gpu: dict[str, tuple[int, int]], config: ModelConfig) -> None:
    assert open_device("cuda", config) == torch.device("cuda", 0)


def test_a_gpu_that_is_too_old(gpu: dict[str, tuple[int, int]], config: ModelConfig) -> None:
    gpu["capability"] = (7, 5)
    with pytest.raises(ConfigError, match=r"a GPU has compute capability 7\.5, and hmad needs 8\.0 or more"):
        open_device("cuda:0", config)


def test_a_gpu_beyond_the_last(gpu: dict[str, tuple[int, int]], config: ModelConfig) -> None:
    with pytest.raises(ConfigError, match=r"--device cuda:1: this machine has 1 GPUs, counted from 0"):
        open_device("cuda:1", config)


def test_a_precision_that_it_lacks(gpu: dict[str, tuple[int, int]]) -> None:
    check_precision("int8", torch.device("cuda", 0))
    with pytest.raises(ConfigError, match=r"fp8 needs .* 8\.9 or more, a GPU has 8\.0: choose another --precision"):
        check_precision("fp8", torch.device("cuda", 0))


def test_sums_that_do_not_fit(gpu: dict[str, tuple[int, int]]) -> None:
    check_budget(torch.device("cuda", 0), 8 * GIB, {"weights": 5 * GIB, "arena": 3 * GIB})
    with pytest.raises(
        ConfigError, match=r"10\.00 of 16\.00 GiB free, .* take 8\.00 .* 9\.00: weights 5\.00, arena 4\.00"
    ):
        check_budget(torch.device("cuda", 0), 8 * GIB, {"weights": 5 * GIB, "arena": 4 * GIB})


@pytest.mark.parametrize(("code", "told"), [(2, ConfigError), (700, torch.AcceleratorError)])
def test_memory_that_another_process_took(code: int, told: type[Exception]) -> None:
    """What the driver lacks at the start is told as such; what it says of a fault is not."""
    error = torch.AcceleratorError("the driver's words")
    error.error_code = code
    config = SimpleNamespace(device="cuda:0")
    with pytest.raises(told, match="the driver's words"), enough_memory(config):  # type: ignore[arg-type]
        raise error


def test_staging_that_no_machine_has(model: Path) -> None:
    nobody = SimpleNamespace(peer="127.0.0.1:9")
    prefill = PrefillDaemon(model, [nobody], staging_bytes=1 << 48)
    prefill.start()
    assert prefill.end() == 2
    assert "does not give 262144.00 GiB of memory: lower --staging-bytes" in prefill.log
    prefill.kill()
