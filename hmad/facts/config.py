"""Configuration: every knob once, with its type, bounds, default, unit and reason.

``Config`` is the single description. The command line, its help, hmad.toml, the ``HMAD_*`` variables and
``hmad check-config`` are all read off it. ``resolve`` lays the sources over each other and reports every mistake in
them together, each under the name its source gave the knob.
"""

import difflib
import ipaddress
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from hmad.facts.errors import ConfigError
from hmad.facts.keys import load_api_keys, load_cluster_key

Role = Literal["prefill", "decode"]
Precision = Literal["fp32", "bf16", "int8", "fp8", "bfp8"]
FormatName = Literal["fp32", "bf16", "int8", "fp8_e4m3", "mxfp8", "bfp8"]

ROLES: tuple[Role, ...] = get_args(Role)
DECODE_PRECISIONS = ("bf16", "fp32")
CHUNK_MULTIPLE_TOKENS = 32  # chunk boundaries fall on block boundaries of every KV format

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
SIZE_UNITS = {"": 1, "K": KIB, "M": MIB, "G": GIB, "T": 1 << 40}
SIZE_PATTERN = re.compile(r"([0-9]+) *(?:B|([KMGT])(?:iB)?)?")


class Address(NamedTuple):
    """Where a peer listens; compares equal to a plain (host, port)."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


# --- how text becomes values ---


def parse_size(value: object) -> object:
    """``512M`` in bytes (binary multiples); what is no text is left for the type to judge."""
    if not isinstance(value, str):
        return value
    match = SIZE_PATTERN.fullmatch(value.strip())
    if match is None:
        raise ValueError("should be a size such as 512M, 8G or 1048576 (binary multiples)")
    return int(match[1]) * SIZE_UNITS[match[2] or ""]


def format_size(num_bytes: int) -> str:
    """The shortest exact spelling: 1073741824 is 1G."""
    unit = next(u for u in reversed(SIZE_UNITS) if num_bytes % SIZE_UNITS[u] == 0)
    return f"{num_bytes // SIZE_UNITS[unit]}{unit}"


def parse_list(value: object) -> object:
    """``a,b`` or ``["a", "b,c"]`` as a tuple of words."""
    if isinstance(value, str):
        return tuple(word.strip() for word in value.split(",") if word.strip())
    if isinstance(value, list):
        return tuple(word for item in value for word in _as_words(item))
    return value


def _as_words(item: object) -> Iterable[object]:
    words = parse_list(item)
    return words if isinstance(words, tuple) and isinstance(item, str) else (item,)


def parse_address(value: object) -> object:
    """``10.0.0.2:7700``, ``node-b:7700`` or ``[fd00::2]:7700``."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([^\s:\[\]]+)):([0-9]{1,5})", value)
    if match is None or not 1 <= int(match[3]) <= 65535:
        raise ValueError("should be HOST:PORT")
    return Address(match[1] or match[2], int(match[3]))


def is_loopback(host: str) -> bool:
    """Whether bytes to this host stay on the machine. A name other than localhost could point anywhere."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


# --- what a knob's type says besides its bounds ---


@dataclass(frozen=True)
class Unit:
    """What a knob's number counts."""

    name: str


@dataclass(frozen=True)
class Of:
    """The only role that has this knob."""

    role: Role


@dataclass(frozen=True)
class PerRole:
    """A default that the role decides."""

    prefill: Any
    decode: Any

    def __call__(self, data: dict[str, Any]) -> Any:
        return getattr(self, data["role"])


OF_PREFILL, OF_DECODE = Of("prefill"), Of("decode")

Port = Annotated[int, Field(ge=1, le=65535)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
TokenCount = Annotated[Count, Unit("tokens")]
Size = Annotated[int, BeforeValidator(parse_size), Field(ge=1, le=2**48), Unit("bytes")]
Rate = Annotated[int, BeforeValidator(parse_size), Field(ge=1, le=2**48), Unit("bytes/s")]
Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False), Unit("s")]
Peers = Annotated[tuple[Annotated[Address, BeforeValidator(parse_address)], ...], BeforeValidator(parse_list)]
FormatNames = Annotated[tuple[FormatName, ...], BeforeValidator(parse_list), Field(min_length=1)]
Name = Annotated[str, Field(min_length=1, max_length=255)]
Device = Annotated[str, Field(pattern=r"^(cpu|cuda(:[0-9]{1,2})?)$")]
Names = Annotated[tuple[Name, ...], BeforeValidator(parse_list), Field(min_length=1)]


def _all_cores() -> int:
    return len(os.sched_getaffinity(0))


def _format_of_stderr() -> Literal["json", "text"]:
    return "text" if sys.stderr.isatty() else "json"


def _host_of(data: dict[str, Any]) -> str:
    return str(data["host"])


def _directory_name(data: dict[str, Any]) -> tuple[str, ...]:
    return (os.path.basename(os.path.abspath(data["model"])),)


class Config(BaseModel):
    """One node's configuration: complete, checked and frozen.

    A knob's name is its field's, or the validation alias where the field also says its unit or number.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_by_name=True, validate_by_alias=True)

    role: Role = Field(description="what this node does: compute prompts, or write answers")
    model: Path = Field(description="Hugging Face directory of a dense Qwen3 model, the same on every node")
    host: Name = Field("127.0.0.1", description="address REST listens on; loopback is for this machine alone")
    port: Port = Field(default_factory=PerRole(8000, 8001), description="TCP port of REST")
    precision: Precision = Field(
        default_factory=PerRole("int8", "bf16"),
        description="what linears compute in; a decode node knows bf16 and fp32 (fp32 is for exact tests)",
    )
    device: Device = Field("cpu", description="what to compute on: cpu, or a GPU such as cuda:0")
    device_memory: Annotated[Size | None, Unit("bytes")] = Field(
        None, description="GPU memory that this node may take; none is 90 percent of what is free when it starts"
    )
    threads: Count = Field(default_factory=_all_cores, description="compute threads; auto is every core we may use")
    load_format: Literal["safetensors", "dummy"] = Field(
        "safetensors", description="dummy makes random weights from config.json alone, to measure speed"
    )
    dummy_seed: int = Field(0, ge=0, le=2**63 - 1, description="seed of the dummy weights; must agree on all nodes")
    max_model_len: Annotated[TokenCount | None, Unit("tokens")] = Field(
        None, description="longest prompt plus answer; none is as long as the model allows"
    )
    digest: Literal["xxh3-128", "none"] = Field(
        "xxh3-128", description="checksum of each KV frame; none trusts the network for a little speed"
    )
    api_key_file: Path | None = Field(
        None, description="keys of REST clients, one a line, plain or sha256:HEX; none lets everyone in"
    )
    drain_timeout_s: Seconds = Field(
        30.0,
        validation_alias="drain_timeout",
        description="how long a node that was asked to stop finishes what it has",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least level that is logged")
    log_format: Literal["json", "text"] = Field(
        default_factory=_format_of_stderr,
        description="a log line's form; auto is text on a terminal, for eyes, and json elsewhere, for programs",
    )

    peers: Annotated[Peers, OF_PREFILL] = Field(
        (), validation_alias="peer", validate_default=True, description="stream HOST:PORT of a decode node; repeatable"
    )
    kv_format: Annotated[Literal["auto", FormatName], OF_PREFILL] = Field(
        "auto", description="KV format on the wire; auto is the precision's own if the peer reads it"
    )
    served_model_names: Annotated[Names, OF_PREFILL] = Field(
        default_factory=_directory_name,
        validation_alias="served_model_name",
        description="model name that requests give; repeatable; auto is the directory's name",
    )
    default_max_tokens: Annotated[TokenCount, OF_PREFILL] = Field(
        1024, description="answer length of requests that name none; memory for it is reserved up front"
    )
    max_batch_tokens: Annotated[TokenCount, OF_PREFILL] = Field(
        2048, description="prompt tokens of one forward pass; longer prompts go in chunks; a multiple of 32"
    )
    max_queue: Annotated[Count, Unit("requests"), OF_PREFILL] = Field(
        256, description="requests that may wait; the next one gets 429"
    )
    queue_timeout_s: Annotated[Seconds, OF_PREFILL] = Field(
        30.0, validation_alias="queue_timeout", description="longest wait for a free decode node"
    )
    timelines: Annotated[int, Field(ge=0, le=100_000), Unit("requests"), OF_PREFILL] = Field(
        64, description="timelines of the last requests that are kept, each up to 1 MB; 0 records none"
    )
    request_timeout_s: Annotated[Seconds | None, Unit("s"), OF_PREFILL] = Field(
        None, validation_alias="request_timeout", description="longest life of a request, from its arrival to its end"
    )
    transfer: Annotated[Literal["layerwise", "after"], OF_PREFILL] = Field(
        "layerwise", description="send each layer's KV while later ones compute, or all of it after (the baseline)"
    )
    stream_bytes_per_s: Annotated[Rate | None, Unit("bytes/s"), OF_PREFILL] = Field(
        None, validation_alias="stream_rate", description="cap on the KV sent, to share a link; none is no cap"
    )
    frame_bytes: Annotated[Size, Field(ge=4 * KIB, le=64 * MIB), OF_PREFILL] = Field(
        # A layer of 2,048 tokens, which is a batch, of eight KV heads of 128 in any format of 8 bits.
        4352 * KIB,
        description="KV bytes of one frame at most, and of one page of staging",
    )
    staging_bytes: Annotated[Size, OF_PREFILL] = Field(
        512 * MIB, description="encoded KV that may wait for the wire, in pages of one frame; when full, prefill waits"
    )
    history_bytes: Annotated[Size, OF_PREFILL] = Field(
        GIB, description="unquantized KV of earlier chunks that later chunks of a prompt attend to"
    )
    bulk_connections: Annotated[int, Field(ge=1, le=64), OF_PREFILL] = Field(
        2, description="TCP connections per peer that carry KV, beside the one for control; each keeps a core busy"
    )

    stream_host: Annotated[Name, OF_DECODE] = Field(
        default_factory=_host_of, description="address the KV port listens on; auto is that of REST"
    )
    stream_port: Annotated[Port, OF_DECODE] = Field(7700, description="TCP port that prefill nodes dial")
    accept_formats: Annotated[FormatNames, OF_DECODE] = Field(
        get_args(FormatName), description="KV formats this node takes, comma-separated"
    )
    arena_bytes: Annotated[Size | None, Unit("bytes"), OF_DECODE] = Field(
        None, description="memory for KV, taken at the start; none is 1G on a CPU, on a GPU what its other needs leave"
    )
    landing_bytes: Annotated[Size, OF_DECODE] = Field(
        256 * MIB, description="with a GPU, pinned host memory that KV is received into: 16M per bulk connection"
    )
    max_batch_size: Annotated[Count, Unit("sequences"), OF_DECODE] = Field(
        64, description="sequences in one decode step; more of them wait"
    )
    lease_s: Annotated[Seconds, OF_DECODE] = Field(
        300.0,
        validation_alias="lease",
        description="how long reserved memory waits for a living node's next KV frame; longer than any prefill",
    )

    # Last, so that its check sees every address.
    cluster_key_file: Path | None = Field(
        None, validate_default=True, description="secret shared by the nodes; required beyond loopback addresses"
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_knob_is_a_switch(cls, value: object) -> object:
        if isinstance(value, bool):  # true would pass for 1
            raise ValueError("should not be true or false")
        return value

    @field_validator("precision")
    @classmethod
    def _decodes_in_full_precision(cls, precision: str, info: ValidationInfo) -> str:
        if info.data.get("role") == "decode" and precision not in DECODE_PRECISIONS:
            raise ValueError("a decode node computes in bf16 or fp32")
        return precision

    @field_validator("peers")
    @classmethod
    def _prefill_has_peers(cls, peers: tuple[Address, ...], info: ValidationInfo) -> tuple[Address, ...]:
        if info.data.get("role") == "prefill" and not peers:
            raise ValueError("a prefill node needs at least one HOST:PORT of a decode node")
        return peers

    @field_validator("max_batch_tokens")
    @classmethod
    def _chunks_end_on_blocks(cls, num_tokens: int) -> int:
        if num_tokens % CHUNK_MULTIPLE_TOKENS:
            raise ValueError(f"should be a multiple of {CHUNK_MULTIPLE_TOKENS}")
        return num_tokens

    @field_validator("cluster_key_file")
    @classmethod
    def _strangers_need_the_key(cls, path: Path | None, info: ValidationInfo) -> Path | None:
        peer_hosts = (peer.host for peer in info.data.get("peers", ()))
        hosts = (info.data.get("host"), info.data.get("stream_host"), *peer_hosts)
        exposed = [host for host in hosts if host is not None and not is_loopback(host)]
        if path is None and exposed:
            raise ValueError(f"required, because {exposed[0]} is not a loopback address")
        return path


# --- knobs as the user sees them ---


@dataclass(frozen=True)
class Knob:
    """A field of ``Config`` under the name the user knows it by."""

    name: str
    field: str

    @property
    def flag(self) -> str:
        return f"--{self.name.replace('_', '-')}"

    @property
    def why(self) -> str:
        return Config.model_fields[self.field].description or ""

    @property
    def role(self) -> Role | None:
        """The only role that has the knob, None for both."""
        return next((m.role for m in self._metadata if isinstance(m, Of)), None)

    def foreign_to(self, role: object) -> bool:
        """Whether only the other role has it; nothing is foreign to a role that does not exist."""
        return self.role is not None and role in ROLES and role != self.role

    @property
    def unit(self) -> str | None:
        return next((m.name for m in self._metadata if isinstance(m, Unit)), None)

    @property
    def words(self) -> tuple[str, ...]:
        """The values to choose from, empty where there are too many to list."""
        annotation = Config.model_fields[self.field].annotation
        nested = get_args(annotation)[:1] if self.repeats else (annotation,)
        return tuple(word for word in get_args(nested[0]) if isinstance(word, str))

    @property
    def repeats(self) -> bool:
        """Whether the knob holds a list."""
        return get_origin(Config.model_fields[self.field].annotation) is tuple

    @property
    def required(self) -> bool:
        """Whether a node of the knob's role cannot start without it."""
        return Config.model_fields[self.field].is_required() or self.field == "peers"

    def default(self, role: Role) -> Any:
        """The default as one would write it: ``none`` for no value, ``auto`` for one that depends on other knobs."""
        field = Config.model_fields[self.field]
        if isinstance(field.default_factory, PerRole):
            return field.default_factory({"role": role})
        if field.default_factory is not None:
            return "auto"
        return "none" if field.default is None else field.default

    def leaves_default(self, value: object) -> bool:
        """Whether the value is the word for "as if I had not said it"."""
        return value in ("auto", "none") and value == self.default("prefill")

    @property
    def _metadata(self) -> list[Any]:
        return Config.model_fields[self.field].metadata


def _all_knobs() -> dict[str, Knob]:
    names = {field: info.validation_alias or field for field, info in Config.model_fields.items()}
    return {str(name): Knob(str(name), field) for field, name in names.items()}


KNOBS = _all_knobs()


def knobs_of(role: Role | None) -> tuple[Knob, ...]:
    """The knobs that only this role has; None: those of both."""
    return tuple(knob for knob in KNOBS.values() if knob.role == role)


# --- sources laid over each other ---


@dataclass(frozen=True)
class Layer:
    """What one source says, by knob name, and how that source spells a knob.

    A layer with a role (a table of the file) speaks to nodes of that role alone.
    """

    source: str
    values: Mapping[str, object]
    spell: Callable[[str], str]
    role: Role | None = None

    def name_mistakes(self, node_role: object) -> list[str]:
        """Knobs that do not exist, or that belong to the other role."""
        role = self.role or node_role
        return [mistake for name in self.values if (mistake := self._name_mistake(name, role))]

    def _name_mistake(self, name: str, role: object) -> str | None:
        knob = KNOBS.get(name)
        if knob is None:
            return f"{self.spell(name)}: unknown{self._nearest(name)}"
        if name == "role" and self.role:
            return f"{self.spell(name)} belongs above the tables"
        if knob.foreign_to(role):
            return f"{self.spell(name)} belongs to the {knob.role} role, this is {role}"
        return None

    def _nearest(self, name: str) -> str:
        near = difflib.get_close_matches(name.replace("-", "_").lower(), KNOBS, n=1)
        return f"; did you mean {self.spell(near[0])}?" if near else ""


@dataclass(frozen=True)
class Resolved:
    """A configuration, and of each knob (by name) where its value came from."""

    config: Config
    sources: Mapping[str, str]


def resolve(layers: Sequence[Layer]) -> Resolved:
    """Lay the sources over each other, strongest first. Raises ConfigError with every mistake, one a line."""
    role = next((layer.values["role"] for layer in layers if layer.role is None and "role" in layer.values), None)
    mistakes = [mistake for layer in layers for mistake in layer.name_mistakes(role)]
    chosen = _strongest(layers, role)
    config = _build(chosen, mistakes)
    mistakes += _file_mistakes(chosen)
    if config is None or mistakes:
        raise ConfigError("\n".join(mistakes))
    return Resolved(config, {name: chosen[name].source if name in chosen else "default" for name in KNOBS})


def _strongest(layers: Sequence[Layer], role: object) -> dict[str, Layer]:
    """Of each knob that this role has, the first layer that speaks of it to this role."""
    heard = [layer for layer in layers if layer.role in (None, role)]
    own = {name for name, knob in KNOBS.items() if not knob.foreign_to(role)}
    return {name: layer for layer in reversed(heard) for name in layer.values if name in own}


def _build(chosen: Mapping[str, Layer], mistakes: list[str]) -> Config | None:
    values = {name: layer.values[name] for name, layer in chosen.items()}
    said = {name: value for name, value in values.items() if not KNOBS[name].leaves_default(value)}
    try:
        return Config.model_validate(said)
    except ValidationError as error:
        mistakes += [_explain(dict(e), chosen) for e in error.errors() if e["type"] != "default_factory_not_called"]
        return None


def _explain(error: dict[str, Any], chosen: Mapping[str, Layer]) -> str:
    """One of pydantic's findings in one line, under the name that the user wrote."""
    knob = _knob_at(str(error["loc"][0]))
    if error["type"] == "missing":
        return f"{knob.flag} is required: {knob.why}"
    message = error["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if knob.name not in chosen:
        return f"{knob.flag}: {message}"
    return f"{chosen[knob.name].spell(knob.name)}: {message}, not {error['input']!r}"


def _knob_at(location: str) -> Knob:
    """pydantic names a given value by its alias, a default by its field."""
    return KNOBS.get(location) or next(knob for knob in KNOBS.values() if knob.field == location)


def _file_mistakes(chosen: Mapping[str, Layer]) -> list[str]:
    checks = {"model": check_model_dir, "cluster_key_file": load_cluster_key, "api_key_file": load_api_keys}
    mistakes = []
    for name in checks.keys() & chosen.keys():
        value = chosen[name].values[name]
        if not KNOBS[name].leaves_default(value):
            mistakes += _mistake_of(checks[name], Path(str(value)), chosen[name].spell(name))
    return sorted(mistakes)


def _mistake_of(check: Callable[[Path], object], path: Path, spelled: str) -> list[str]:
    try:
        check(path)
    except ConfigError as error:
        return [f"{spelled}: {error}"]
    return []


def check_model_dir(path: Path) -> None:
    """A quick look, so that a wrong path is told beside the other mistakes; the loader checks what is inside."""
    if not path.is_dir():
        raise ConfigError(f"{path} is not a directory")
    if not (path / "config.json").is_file():
        raise ConfigError(f"{path} has no config.json: not a model directory")
