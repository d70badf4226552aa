"""The model directory: config.json, generation_config.json, safetensors and the fingerprint of all of them.

Everything in it is input: each mistake is a ModelError that names the file, the field or tensor, and what to do.
Weights are mapped, not read: a tensor is a view of the file until somebody converts it.
"""

import hashlib
import json
import math
import mmap
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from hmad.facts.errors import ModelError

MAX_JSON_BYTES = 16 << 20
MAX_HEADER_BYTES = 100 << 20  # the limit of the safetensors format
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CPU = torch.device("cpu")
DUMMY_POOL_VALUES = 4_194_301  # a prime: no row length divides it, so dummy rows differ


# --- JSON, field by field ---------------------------------------------------------------------------------------------


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) != len(pairs):
        twice = next(name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i]))
        raise ValueError(f"{twice!r} appears twice")
    return names


def _parse_object(text: bytes, where: str) -> dict[str, Any]:
    try:
        parsed = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{where}: not valid JSON ({error}); download the file again") from error
    if not isinstance(parsed, dict):
        raise ModelError(f"{where}: must be a JSON object")
    return parsed


def _read_bytes(path: Path, limit_bytes: int) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(limit_bytes + 1)
    except OSError as error:
        raise ModelError(f"{path}: cannot read ({error.strerror}); is this a Hugging Face model directory?") from error
    if len(content) > limit_bytes:
        raise ModelError(f"{path}: larger than {limit_bytes:,} bytes")
    return content


@dataclass(frozen=True)
class _Fields:
    """One JSON object of a file, read field by field with a type and bounds."""

    path: Path
    values: Mapping[str, Any]

    def fail(self, name: str, needs: str) -> ModelError:
        return ModelError(f"{self.path}: {name} {needs}, not {self.values.get(name)!r}")

    def integer(self, name: str, default: int | None = None, low: int = 1, high: int = 2**31 - 1) -> int:
        value = self.values.get(name, default)
        if type(value) is not int or not low <= value <= high:
            raise self.fail(name, f"must be an integer from {low} to {high}")
        return value

    def number(self, name: str, default: float | None, low: float, high: float) -> float:
        value = self.values.get(name, default)
        if type(value) not in (int, float) or not low <= value <= high:  # NaN fails the comparison
            raise self.fail(name, f"must be a number from {low:g} to {high:g}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.values.get(name, default)
        if type(value) is not bool:
            raise self.fail(name, "must be true or false")
        return value

    def child(self, name: str) -> "_Fields":
        value = self.values.get(name) or {}
        if not isinstance(value, dict):
            raise self.fail(name, "must be an object")
        return _Fields(self.path, value)

    def token_ids(self, name: str) -> tuple[int, ...]:
        """A token id, a list of them, or nothing."""
        value = self.values.get(name)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if len(ids) > 4096 or not all(type(i) is int and 0 <= i < 2**31 for i in ids):
            raise self.fail(name, "must be a token id or a list of at most 4096")
        return tuple(ids)


# --- config.json ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelConfig:
    """The architecture of a dense Qwen3, as config.json has it."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    tied: bool
    eos_token_ids: tuple[int, ...]

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim


def read_config(model_dir: Path) -> ModelConfig:
    """config.json of ``model_dir``; ModelError if it is not a dense Qwen3 that we compute exactly."""
    path = model_dir / "config.json"
    fields = _Fields(path, _parse_object(_read_bytes(path, MAX_JSON_BYTES), str(path)))
    _check_supported(fields)
    num_heads = fields.integer("num_attention_heads", high=4096)
    config = ModelConfig(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=fields.integer("hidden_size"),
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=fields.integer("num_hidden_layers", high=4096),
        num_heads=num_heads,
        num_kv_heads=fields.integer("num_key_value_heads", num_heads, high=4096),
        head_dim=fields.integer("head_dim", 128, high=4096),
        max_position_embeddings=fields.integer("max_position_embeddings"),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6, 0.0, 1.0),
        rope_theta=_rope_theta(fields),
        tied=fields.flag("tie_word_embeddings", False),
        eos_token_ids=fields.token_ids("eos_token_id"),
    )
    if config.num_heads % config.num_kv_heads:
        raise fields.fail("num_key_value_heads", f"must divide num_attention_heads ({config.num_heads})")
    if config.head_dim % 2:
        raise fields.fail("head_dim", "must be even")
    return config


def _check_supported(fields: _Fields) -> None:
    """Refuse what would load but compute something else."""
    if fields.values.get("model_type") != "qwen3":
        raise fields.fail("model_type", "must be 'qwen3' (dense Qwen3 is the only architecture served)")
    if fields.values.get("architectures", ["Qwen3ForCausalLM"]) != ["Qwen3ForCausalLM"]:
        raise fields.fail("architectures", "must be ['Qwen3ForCausalLM']")
    if fields.values.get("hidden_act", "silu") != "silu":
        raise fields.fail("hidden_act", "must be 'silu'")
    if fields.values.get("quantization_config") is not None:
        raise fields.fail("quantization_config", "must be absent: hmad quantizes by itself, from plain weights")
    if fields.flag("attention_bias", False):
        raise fields.fail("attention_bias", "must be false")
    sliding = fields.flag("use_sliding_window", False)
    if sliding or set(fields.values.get("layer_types") or ()) - {"full_attention"}:
        raise fields.fail("use_sliding_window" if sliding else "layer_types", "must mean full attention in all layers")


def _rope_theta(fields: _Fields) -> float:
    """The rotary base, in either spelling: ``rope_theta``, or ``rope_parameters.rope_theta``."""
    for name in ("rope_parameters", "rope_scaling"):
        rope = fields.child(name).values
        if rope.get("rope_type", rope.get("type", "default")) != "default" or rope.get("partial_rotary_factor", 1) != 1:
            raise fields.fail(name, "must be the default rotary embedding (no yarn, no scaling)")
    parameters = fields.child("rope_parameters")
    source = parameters if "rope_theta" in parameters.values else fields
    return source.number("rope_theta", None, 1.0, 1e12)


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor the checkpoint must hold, and its shape."""
    hidden, wide = config.hidden_size, config.intermediate_size
    per_layer = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (config.q_size, hidden),
        "self_attn.k_proj": (config.kv_size, hidden),
        "self_attn.v_proj": (config.kv_size, hidden),
        "self_attn.o_proj": (hidden, config.q_size),
        "self_attn.q_norm": (config.head_dim,),
        "self_attn.k_norm": (config.head_dim,),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (wide, hidden),
        "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for i in range(config.num_layers):
        tensors |= {f"model.layers.{i}.{name}.weight": shape for name, shape in per_layer.items()}
    tensors["model.norm.weight"] = (hidden,)
    if not config.tied:
        tensors["lm_head.weight"] = (config.vocab_size, hidden)
    return tensors


# --- generation_config.json -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GenerationDefaults:
    """What a request that names nothing gets; neutral where generation_config.json is silent."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    eos_token_ids: tuple[int, ...] = field(default=())


def read_generation_defaults(model_dir: Path, config: ModelConfig) -> GenerationDefaults:
    """generation_config.json, where there is one; EOS ids fall back to those of config.json."""
    path = model_dir / "generation_config.json"
    if not path.exists():
        return GenerationDefaults(eos_token_ids=config.eos_token_ids)
    values = _parse_object(_read_bytes(path, MAX_JSON_BYTES), str(path))
    fields = _Fields(path, {name: value for name, value in values.items() if value is not None})
    sampled = fields.flag("do_sample", "temperature" in fields.values)
    return GenerationDefaults(
        temperature=fields.number("temperature", 1.0, 0.0, 100.0) if sampled else 0.0,
        top_p=fields.number("top_p", 1.0, 1e-6, 1.0),
        top_k=fields.integer("top_k", 0, low=0),
        min_p=fields.number("min_p", 0.0, 0.0, 1.0),
        repetition_penalty=fields.number("repetition_penalty", 1.0, 1e-6, 100.0),
        eos_token_ids=fields.token_ids("eos_token_id") or config.eos_token_ids,
    )


# --- safetensors ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorSpan:
    """Where one tensor lies in its file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int  # bytes from the start of the file
    end: int


@dataclass(frozen=True)
class Shard:
    """One safetensors file whose header has been checked."""

    path: Path
    size_bytes: int
    header_sha256: str
    spans: dict[str, TensorSpan]


def open_shard(path: Path) -> Shard:
    """Read and check the header: every byte of the file belongs to exactly one tensor of a known dtype."""
    header, size_bytes = _read_header(path)
    entries = _parse_object(header, f"{path}: header")
    entries.pop("__metadata__", None)
    data_begin = 8 + len(header)
    spans = {name: _span(path, name, entry, data_begin) for name, entry in entries.items()}
    _check_tiling(path, spans, data_begin, size_bytes)
    return Shard(path, size_bytes, hashlib.sha256(header).hexdigest(), spans)


def _read_header(path: Path) -> tuple[bytes, int]:
    try:
        with path.open("rb") as file:
            header_len = int.from_bytes(file.read(8), "little")
            size_bytes = path.stat().st_size
            if size_bytes < 8 or header_len > min(MAX_HEADER_BYTES, size_bytes - 8):
                raise ModelError(f"{path}: truncated, or not a safetensors file; download it again")
            return file.read(header_len), size_bytes
    except OSError as error:
        raise ModelError(f"{path}: cannot read ({error.strerror}); download the missing file") from error


def _is_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(i) is int and 0 <= i < 2**48 for i in value)


def _span(path: Path, name: str, entry: Any, data_begin: int) -> TensorSpan:
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets) != 2:
        raise ModelError(f"{path}: tensor {name}: damaged header entry; download the file again")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ModelError(f"{path}: tensor {name}: dtype {dtype!r} is not one of {', '.join(DTYPES)}; convert it")
    begin, end = offsets
    if end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
        fault = f"{end - begin} bytes do not hold {dtype} {shape}"
        raise ModelError(f"{path}: tensor {name}: {fault}; download the file again")
    return TensorSpan(dtype, tuple(shape), data_begin + begin, data_begin + end)


def _check_tiling(path: Path, spans: dict[str, TensorSpan], data_begin: int, size_bytes: int) -> None:
    position = data_begin
    for name, span in sorted(spans.items(), key=lambda item: (item[1].begin, item[1].end)):
        if span.begin != position:
            fault = "overlaps its neighbour" if span.begin < position else "leaves a gap before it"
            raise ModelError(f"{path}: tensor {name} {fault}; download the file again")
        position = span.end
        if position > size_bytes:
            raise ModelError(f"{path}: truncated inside tensor {name}; download the file again")
    if position != size_bytes:
        raise ModelError(f"{path}: {size_bytes - position} bytes after the last tensor; download the file again")


def open_shards(model_dir: Path) -> list[Shard]:
    """The weight files: those the index names, else the single file."""
    index_path = model_dir / INDEX_FILE
    if not index_path.exists():
        return [open_shard(model_dir / SINGLE_FILE)]
    weight_map = _parse_object(_read_bytes(index_path, MAX_HEADER_BYTES), str(index_path)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index_path}: weight_map must be an object that names the file of each tensor")
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or Path(file_name).name != file_name:
            raise ModelError(f"{index_path}: tensor {name}: {file_name!r} is not a file name in this directory")
    shards = [open_shard(model_dir / file_name) for file_name in sorted(set(weight_map.values()))]
    _check_index(index_path, weight_map, shards)
    return shards


def _check_index(index_path: Path, weight_map: dict[str, str], shards: list[Shard]) -> None:
    for shard in shards:
        named = {name for name, file_name in weight_map.items() if file_name == shard.path.name}
        for name in sorted(named ^ shard.spans.keys()):
            fault = "lacks it" if name in named else "has it all the same"
            raise ModelError(f"{index_path}: tensor {name}: the index and {shard.path.name} disagree, which {fault}")


def _check_tensors(config: ModelConfig, shards: list[Shard]) -> None:
    expected = expected_tensors(config)
    # A tied checkpoint may carry its head all the same: it is the embedding again, and ignored.
    allowed = expected | {"lm_head.weight": (config.vocab_size, config.hidden_size)}
    for shard in shards:
        for name, span in shard.spans.items():
            if name not in allowed:
                raise ModelError(f"{shard.path}: tensor {name} is not part of this Qwen3; is config.json another's?")
            if span.shape != allowed[name]:
                raise ModelError(
                    f"{shard.path}: tensor {name} has shape {list(span.shape)}, config.json means {list(allowed[name])}"
                )
    missing = sorted(expected.keys() - {name for shard in shards for name in shard.spans})
    if missing:
        files = ", ".join(shard.path.name for shard in shards)
        raise ModelError(
            f"{shards[0].path.parent}: tensor {missing[0]} is missing from {files}"
            f" ({len(missing)} missing in all); download the checkpoint again"
        )


# --- weights ----------------------------------------------------------------------------------------------------------


class Weights(Protocol):
    """Where tensors come from, by their name in the checkpoint."""

    def read(self, name: str) -> torch.Tensor:
        """The tensor, in the dtype it is stored in. Not to be written to."""


class MappedWeights:
    """The safetensors of a directory; each tensor is a view of its mapped file."""

    def __init__(self, model_dir: Path, config: ModelConfig) -> None:
        shards = open_shards(model_dir)
        _check_tensors(config, shards)
        self._at = {name: (_map(shard.path), span) for shard in shards for name, span in shard.spans.items()}

    def read(self, name: str) -> torch.Tensor:
        mapping, span = self._at[name]
        dtype = DTYPES[span.dtype]
        if span.begin % dtype.itemsize:  # legal in the format, but kernels rely on alignment
            return torch.frombuffer(bytearray(mapping[span.begin : span.end]), dtype=dtype).view(span.shape)
        count = math.prod(span.shape)
        return torch.frombuffer(mapping, dtype=dtype, count=count, offset=span.begin).view(span.shape)


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        # Copy on write, though nobody writes: torch warns of read-only buffers.
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


class DummyWeights:
    """Random weights made from config.json and a seed: the same in every precision and on every device.

    Every tensor is a stretch of one pool of random values, scaled so that activations keep their magnitude.
    """

    def __init__(self, config: ModelConfig, seed: int, device: torch.device) -> None:
        self._shapes = expected_tensors(config)
        self._seed = seed
        self._device = device
        generator = torch.Generator().manual_seed(seed)
        limit = math.sqrt(3.0)  # uniform within +-sqrt(3) has variance 1
        pool = torch.empty(DUMMY_POOL_VALUES).uniform_(-limit, limit, generator=generator)
        self._pool = pool.bfloat16().to(device)

    def read(self, name: str) -> torch.Tensor:
        shape = self._shapes[name]
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16, device=self._device)
        key = hashlib.sha256(f"{self._seed} {name}".encode()).digest()
        values = torch.empty(math.prod(shape), dtype=torch.bfloat16, device=self._device)
        self._fill(values, int.from_bytes(key[:8], "little") % DUMMY_POOL_VALUES)
        return values.mul_(shape[1] ** -0.5).view(shape)

    def _fill(self, values: torch.Tensor, start: int) -> None:
        filled = 0
        while filled < len(values):
            stretch = self._pool[start : start + len(values) - filled]
            values[filled : filled + len(stretch)] = stretch
            filled, start = filled + len(stretch), 0


def open_weights(
    model_dir: Path, config: ModelConfig, load_format: str, seed: int, device: torch.device = CPU
) -> Weights:
    """``load_format`` safetensors or dummy; only dummy weights are made on the device."""
    if load_format == "dummy":
        return DummyWeights(config, seed, device)
    return MappedWeights(model_dir, config)


# --- fingerprint ------------------------------------------------------------------------------------------------------


def fingerprint(model_dir: Path, load_format: str = "safetensors", seed: int = 0) -> bytes:
    """32 bytes that two nodes share exactly if they serve the same model; independent of their precisions."""
    config = read_config(model_dir)
    is_dummy = load_format == "dummy"
    shards = [] if is_dummy else open_shards(model_dir)
    if is_dummy:
        tensors = [(name, "dummy", shape) for name, shape in expected_tensors(config).items()]
    else:
        tensors = [(name, span.dtype, span.shape) for shard in shards for name, span in shard.spans.items()]
    architecture = asdict(config)
    del architecture["eos_token_ids"]  # when to stop, not what to compute
    facts = {
        "architecture": architecture,
        "tensors": sorted(tensors),
        "files": [(shard.path.name, shard.size_bytes, shard.header_sha256) for shard in shards],
        "tokenizer": _file_sha256(model_dir / "tokenizer.json"),
        "dummy_seed": seed if is_dummy else None,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).digest()


def _file_sha256(path: Path) -> str:
    """Hex digest, or "" where there is no such file (a dummy needs no tokenizer)."""
    if not path.exists():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
