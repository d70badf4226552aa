"""The model directory as input: what is read right, what is refused and in which words, what it costs in memory."""

import json
import math
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_checkpoint
from safetensors.torch import load_file, save_file

from hmad.compute.checkpoint import (
    MappedWeights,
    expected_tensors,
    fingerprint,
    open_shards,
    open_weights,
    read_config,
    read_generation_defaults,
)
from hmad.facts.errors import ModelError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pristine")
    write_checkpoint(directory, num_layers=1, tied=False)
    return directory


@pytest.fixture(scope="module")
def pristine_sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sharded")
    write_checkpoint(directory, num_layers=1, sharded=True)
    return directory


@pytest.fixture
def model_dir(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "model"))


@pytest.fixture
def sharded_dir(pristine_sharded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine_sharded, tmp_path / "model"))


def edit_json(path: Path, **changes: Any) -> None:
    """Set fields; None removes one."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


def edit_header(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite a safetensors header, leaving its data alone."""
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])


def edit_tensors(path: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    edit(tensors)
    save_file(tensors, path)


def load(model_dir: Path) -> MappedWeights:
    return MappedWeights(model_dir, read_config(model_dir))


# --- config.json ------------------------------------------------------------------------------------------------------


def test_config_is_read(model_dir: Path) -> None:
    config = read_config(model_dir)
    assert (config.hidden_size, config.head_dim, config.q_size, config.kv_size) == (64, 32, 128, 64)
    assert (config.tied, config.rope_theta, config.eos_token_ids) == (False, 10_000.0, (258,))


def test_both_rope_spellings_are_one(model_dir: Path) -> None:
    before = read_config(model_dir), fingerprint(model_dir)
    edit_json(model_dir / "config.json", rope_parameters=None, rope_theta=10_000)
    assert (read_config(model_dir), fingerprint(model_dir)) == before


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "llama"),
        ("architectures", ["Qwen3MoeForCausalLM"]),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("use_sliding_window", True),
        ("layer_types", ["sliding_attention"]),
        ("quantization_config", {"bits": 4}),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4}),
        ("rope_scaling", {"type": "yarn", "factor": 4}),
        ("rope_parameters", 7),
        ("rope_parameters", {"rope_theta": "big"}),
        ("hidden_size", 0),
        ("hidden_size", "64"),
        ("hidden_size", True),
        ("num_hidden_layers", 10**9),
        ("num_key_value_heads", 3),
        ("head_dim", 31),
        ("rms_norm_eps", float("nan")),
        ("vocab_size", None),
        ("eos_token_id", "end"),
    ],
)
def test_config_errors_name_file_and_field(model_dir: Path, field: str, value: object) -> None:
    edit_json(model_dir / "config.json", **{field: value})
    with pytest.raises(ModelError, match=f"config.json: (.*{field}|rope_theta)"):
        read_config(model_dir)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1, "a": 2}', "[" * 100_000, "\xff"])
def test_config_that_is_no_json_object(model_dir: Path, text: str) -> None:
    (model_dir / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ModelError, match=r"config\.json: "):
        read_config(model_dir)


def test_missing_directory_is_said_plainly(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config.json: cannot read \(No such file"):
        read_config(tmp_path / "nowhere")


# --- generation_config.json -------------------------------------------------------------------------------------------


def test_generation_defaults(model_dir: Path) -> None:
    config, path = read_config(model_dir), model_dir / "generation_config.json"
    sampling = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}
    path.write_text(json.dumps(sampling | {"eos_token_id": [1, 2]}))
    defaults = read_generation_defaults(model_dir, config)
    assert (defaults.eos_token_ids, defaults.temperature, defaults.top_k, defaults.top_p) == ((1, 2), 0.6, 20, 0.95)
    path.write_text(json.dumps({"do_sample": False, "temperature": 0.6, "top_p": None}))
    defaults = read_generation_defaults(model_dir, config)
    assert (defaults.eos_token_ids, defaults.temperature, defaults.top_p) == ((258,), 0.0, 1.0)
    path.unlink()
    defaults = read_generation_defaults(model_dir, config)
    assert (defaults.eos_token_ids, defaults.temperature) == ((258,), 1.0)


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", -1), ("top_p", 2), ("top_k", 1.5), ("repetition_penalty", 0), ("eos_token_id", [1, "x"])],
)
def test_generation_config_errors_name_file_and_field(model_dir: Path, field: str, value: object) -> None:
    (model_dir / "generation_config.json").write_text(json.dumps({field: value}))
    with pytest.raises(ModelError, match=f"generation_config.json: {field}"):
        read_generation_defaults(model_dir, read_config(model_dir))


# --- safetensors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fixture", ["model_dir", "sharded_dir"])
def test_every_tensor_is_what_safetensors_reads(fixture: str, request: pytest.FixtureRequest) -> None:
    directory = request.getfixturevalue(fixture)
    weights = load(directory)
    files = sorted(directory.glob("*.safetensors"))
    assert len(files) == (1 if fixture == "model_dir" else len(open_shards(directory)))
    for path in files:
        for name, tensor in load_file(path).items():
            assert torch.equal(weights.read(name), tensor)


def test_misaligned_data_is_read_all_the_same(model_dir: Path) -> None:
    path = model_dir / WEIGHTS
    expected = load_file(path)[Q_PROJ].clone()  # load_file maps the file, which changes below
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    path.write_bytes(struct.pack("<Q", size + 1) + content[8 : 8 + size] + b" " + content[8 + size :])
    assert torch.equal(load(model_dir).read(Q_PROJ), expected)


def test_tied_checkpoint_may_carry_its_head(model_dir: Path) -> None:
    edit_json(model_dir / "config.json", tie_word_embeddings=True)
    load(model_dir)


def overlap(header: dict[str, Any]) -> None:
    a, b = header["model.layers.0.self_attn.k_proj.weight"], header["model.layers.0.self_attn.v_proj.weight"]
    b["data_offsets"] = a["data_offsets"]


def move_out(header: dict[str, Any]) -> None:
    header[Q_PROJ]["data_offsets"] = [offset + 2**40 for offset in header[Q_PROJ]["data_offsets"]]


def set_entry(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header[Q_PROJ].update(changes)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (overlap, r"tensor .*\.(k|v)_proj\.weight overlaps"),
        (move_out, r"tensor .* (leaves a gap|truncated)"),
        (set_entry(dtype="I64"), f"tensor {Q_PROJ}: dtype 'I64' is not one of"),
        (set_entry(dtype=["F32"]), f"tensor {Q_PROJ}: dtype"),
        (set_entry(shape=[1, 2]), f"tensor {Q_PROJ}: .* bytes do not hold F32"),
        (set_entry(shape=[-1, -8192]), f"tensor {Q_PROJ}: damaged"),
        (set_entry(shape="x"), f"tensor {Q_PROJ}: damaged"),
        (set_entry(data_offsets=[1]), f"tensor {Q_PROJ}: damaged"),
        (lambda header: header.update({Q_PROJ: 3}), f"tensor {Q_PROJ}: damaged"),
        (lambda header: header.pop(Q_PROJ), "tensor .* leaves a gap before it"),
    ],
)
def test_damaged_header_names_file_and_tensor(model_dir: Path, edit: Callable[..., None], message: str) -> None:
    edit_header(model_dir / WEIGHTS, edit)
    with pytest.raises(ModelError, match=f"{WEIGHTS}: {message}"):
        load(model_dir)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: b[:-1], "truncated inside tensor"),
        (lambda b: b[:5], "truncated, or not a safetensors"),
        (lambda b: b[:100], "truncated, or not a safetensors"),
        (lambda b: b"PK\3\4" + b"\xff" * 60, "truncated, or not a safetensors"),
        (lambda b: b + b"x", "1 bytes after the last tensor"),
        (lambda b: b[:8] + b"!" + b[9:], "header: not valid JSON"),
        (lambda b: struct.pack("<Q", 2) + b"[]", "header: must be a JSON object"),
        (lambda b: b.replace(b".k_proj.", b".v_proj.", 1), "appears twice"),
    ],
)
def test_damaged_file_is_refused(model_dir: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    path = model_dir / WEIGHTS
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ModelError, match=f"{WEIGHTS}: .*{message}"):
        load(model_dir)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(Q_PROJ), f"tensor {Q_PROJ} is missing"),
        (lambda t: t.update(extra=torch.zeros(1)), "tensor extra is not part of"),
        (
            lambda t: t.update({Q_PROJ: t[Q_PROJ].T.contiguous()}),
            rf"tensor {Q_PROJ} has shape \[64, 128\], .*\[128, 64\]",
        ),
        (lambda t: t.update({Q_PROJ: t[Q_PROJ].double()}), f"tensor {Q_PROJ}: dtype 'F64'"),
    ],
)
def test_wrong_tensors_are_named(model_dir: Path, edit: Callable[..., Any], message: str) -> None:
    edit_tensors(model_dir / WEIGHTS, edit)
    with pytest.raises(ModelError, match=message):
        load(model_dir)


def test_index_errors_name_the_shard(sharded_dir: Path) -> None:
    path = sharded_dir / INDEX
    weight_map = json.loads(path.read_text())["weight_map"]
    shards = sorted(set(weight_map.values()))
    assert len(shards) > 1
    elsewhere = next(shard for shard in shards if shard != weight_map[Q_PROJ])
    for wrong, message in (
        ({**weight_map, Q_PROJ: elsewhere}, f"tensor {Q_PROJ}: .*{elsewhere} disagree"),
        ({**weight_map, "ghost": shards[0]}, "tensor ghost: "),
        ({**weight_map, Q_PROJ: "../x.safetensors"}, f"tensor {Q_PROJ}: .*not a file name"),
        ({**weight_map, Q_PROJ: 3}, f"tensor {Q_PROJ}: .*not a file name"),
        ({}, "weight_map must be"),
    ):
        edit_json(path, weight_map=wrong)
        with pytest.raises(ModelError, match=f"{INDEX}: {message}"):
            load(sharded_dir)
    edit_json(path, weight_map=weight_map)
    (sharded_dir / elsewhere).unlink()
    with pytest.raises(ModelError, match=f"{elsewhere}: cannot read"):
        load(sharded_dir)


# --- fingerprint ------------------------------------------------------------------------------------------------------


def test_fingerprint_sees_what_changes_the_model(model_dir: Path) -> None:
    seen = [fingerprint(model_dir)]
    (model_dir / "tokenizer.json").write_text("{}")
    seen.append(fingerprint(model_dir))
    edit_json(model_dir / "config.json", rms_norm_eps=1e-5)
    seen.append(fingerprint(model_dir))
    edit_header(model_dir / WEIGHTS, lambda header: header.update(__metadata__={"format": "other"}))
    seen.append(fingerprint(model_dir))
    edit_tensors(model_dir / WEIGHTS, lambda t: t.update({Q_PROJ: t[Q_PROJ].half()}))
    seen.append(fingerprint(model_dir))
    seen += [fingerprint(model_dir, "dummy", seed) for seed in (0, 1)]
    assert len(set(seen)) == len(seen)
    assert {len(f) for f in seen} == {32}


def test_fingerprint_ignores_where_the_model_lies_and_what_only_ends_a_text(pristine: Path, model_dir: Path) -> None:
    edit_json(model_dir / "config.json", eos_token_id=[1, 2], transformers_version="9")
    assert fingerprint(model_dir) == fingerprint(pristine)


def test_dummy_needs_only_config(model_dir: Path) -> None:
    for name in (WEIGHTS, "tokenizer.json"):
        (model_dir / name).unlink()
    config = read_config(model_dir)
    assert len(fingerprint(model_dir, "dummy")) == 32
    weights = open_weights(model_dir, config, "dummy", 3)
    for name, shape in expected_tensors(config).items():
        tensor = weights.read(name)
        assert tuple(tensor.shape) == shape
        if len(shape) == 2:
            assert 0.8 < tensor.float().std() * shape[1] ** 0.5 < 1.2


# --- memory -----------------------------------------------------------------------------------------------------------

PEAK_SCRIPT = """
import sys, threading, time
from pathlib import Path
import torch
from hmad.compute.linears import make_linear
from hmad.compute.loading import load_model

def anonymous_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))

def watch():
    while not done.wait(0.001):
        peaks.append(anonymous_bytes())

precision = sys.argv[2]
torch.set_num_threads(1)
linear = make_linear(precision, torch.ones(64, 64))  # libraries and kernels are not weights
linear(torch.ones(1, 64, dtype=torch.float32 if precision == "fp32" else torch.bfloat16))
done, peaks, base = threading.Event(), [], anonymous_bytes()
watcher = threading.Thread(target=watch)
watcher.start()
model = load_model(Path(sys.argv[1]), precision)
done.set()
watcher.join()
print(max(peaks) - base, anonymous_bytes() - base, model.weight_bytes)
"""


@pytest.fixture(scope="module")
def large_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 300 MB in bf16, most of it in linear layers."""
    directory = tmp_path_factory.mktemp("large")
    shape = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 9, "vocab_size": 8192}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 1024}
    facts = {"model_type": "qwen3", "rope_theta": 1e6, "tie_word_embeddings": True}
    (directory / "config.json").write_text(json.dumps(shape | heads | facts))
    config = read_config(directory)
    dummy = open_weights(directory, config, "dummy", 0)
    save_file({name: dummy.read(name) for name in expected_tensors(config)}, directory / WEIGHTS)
    return directory


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "bfp8"])  # fp8 converts as bfp8 does
def test_anonymous_memory_peaks_below_the_weights_and_a_quarter(large_dir: Path, precision: str) -> None:
    assert (large_dir / WEIGHTS).stat().st_size > 290e6
    command = [sys.executable, "-c", PEAK_SCRIPT, str(large_dir), precision]
    # What malloc keeps of what was freed is chance, up to a third of these weights: here it keeps nothing of size.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(128 << 10)}
    run = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent, env=environment
    )
    peak_bytes, end_bytes, weight_bytes = map(int, run.stdout.split())
    assert peak_bytes < 1.25 * weight_bytes
    # And the measurement measures: what is held is there.
    assert end_bytes > 0.7 * weight_bytes


@pytest.mark.parametrize(
    ("name", "billions"),
    [("Qwen3-0.6B", 0.596), ("Qwen3-4B", 4.02), ("Qwen3-8B", 8.19), ("Qwen3-14B", 14.77), ("Qwen3-32B", 32.76)],
)
def test_shipped_shapes_have_the_published_numbers_of_parameters(name: str, billions: float) -> None:
    config = read_config(Path(__file__).parent.parent / "scripts" / "models" / name)
    num_parameters = sum(math.prod(shape) for shape in expected_tensors(config).values())
    assert num_parameters / 1e9 == pytest.approx(billions, abs=0.005)
    assert (config.num_kv_heads, config.head_dim) == (8, 128)
