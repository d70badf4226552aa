"""Configuration: every knob from every source, every mistake named, nothing secret told."""

import hashlib
import io
import os
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

import hmad.edges
from hmad.edges import cli
from hmad.facts import config as knobs
from hmad.facts import keys
from hmad.facts.config import KNOBS, ROLES, Config
from hmad.facts.errors import ConfigError
from hmad.facts.formats import FORMATS, KVGeometry

ROOT = Path(__file__).parent.parent
D_FLAGS = "--host 127.0.0.1 --port 8001 --stream-port 7700 --precision bf16 --arena-bytes 512M"
P_FLAGS = "--host 127.0.0.1 --port 8000 --precision int8 --kv-format auto"
SECRET = "correct horse battery staple"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("HMAD_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "Qwen3-tiny"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    return directory


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    return write_key(tmp_path / "cluster.key", SECRET)


def write_key(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def resolved(*argv: object) -> knobs.Resolved:
    _, flags, strays = cli._parse([str(arg) for arg in argv])
    return knobs.resolve(cli._layers(flags, strays))


def decode(model: Path, *argv: object) -> Config:
    return resolved("--role", "decode", "--model", model, *argv).config


def prefill(model: Path, *argv: object) -> Config:
    return resolved("--role", "prefill", "--model", model, "--peer", "127.0.0.1:7700", *argv).config


def mistakes(*argv: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        resolved(*argv)
    return str(caught.value).splitlines()


# --- what a node gets ---


def test_the_two_commands_of_the_issue(model: Path) -> None:
    d = decode(model, *D_FLAGS.split())
    p = prefill(model, *P_FLAGS.split())
    assert (d.role, d.port, d.stream_port, d.precision, d.arena_bytes) == ("decode", 8001, 7700, "bf16", 512 << 20)
    assert (p.role, p.port, p.precision, p.kv_format, p.peers) == (
        "prefill",
        8000,
        "int8",
        "auto",
        (("127.0.0.1", 7700),),
    )


def test_auto_is_resolved_before_the_object_exists(model: Path) -> None:
    d, p = decode(model, "--host", "::1"), prefill(model)
    assert (d.port, d.precision, d.stream_host) == (8001, "bf16", "::1")
    assert (p.port, p.precision, p.served_model_names) == (8000, "int8", ("Qwen3-tiny",))
    assert p.threads == len(os.sched_getaffinity(0))
    assert (p.max_model_len, p.stream_bytes_per_s, p.cluster_key_file) == (None, None, None)


def test_nothing_mutates_it_later(model: Path) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        decode(model).port = 1


def test_auto_and_none_undo_weaker_sources(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HMAD_THREADS", "77")
    monkeypatch.setenv("HMAD_STREAM_RATE", "5M")
    config = prefill(model, "--threads", "auto", "--stream-rate", "none")
    assert (config.threads, config.stream_bytes_per_s) == (len(os.sched_getaffinity(0)), None)
    assert prefill(model).threads == 77


def test_lists_repeat_and_split(model: Path) -> None:
    config = prefill(
        model,
        "--peer",
        "node-b:1,[fd00::2]:2",
        "--served-model-name",
        "a",
        "--served-model-name",
        "b",
        "--cluster-key-file",
        write_key(model / "key", SECRET),
    )
    assert config.peers == (("127.0.0.1", 7700), ("node-b", 1), ("fd00::2", 2))
    assert config.served_model_names == ("a", "b")
    assert [str(peer) for peer in config.peers][1:] == ["node-b:1", "[fd00::2]:2"]
    assert decode(model, "--accept-formats", "bf16, bfp8").accept_formats == ("bf16", "bfp8")


# --- sizes and addresses ---


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("1", 1),
        ("4096", 4096),
        ("3B", 3),
        ("2K", 2048),
        ("512M", 512 << 20),
        ("8G", 8 << 30),
        ("1T", 1 << 40),
        ("2KiB", 2048),
        (" 5 MiB ", 5 << 20),
    ],
)
def test_sizes(text: str, num_bytes: int) -> None:
    assert knobs.parse_size(text) == num_bytes


@pytest.mark.parametrize("text", ["", "M", "512MB", "-1M", "1.5G", "1e9", "8 gigs", "5m", "1_000", "٣M"])
def test_sizes_that_are_none(model: Path, text: str) -> None:
    assert "should be a size such as 512M" in mistakes("--role", "decode", "--model", model, f"--arena-bytes={text}")[0]


@given(st.integers(1, 2**48))
def test_sizes_survive_printing(num_bytes: int) -> None:
    assert knobs.parse_size(knobs.format_size(num_bytes)) == num_bytes


@pytest.mark.parametrize(
    "text", ["host", "host:", ":7700", "host:0", "host:65536", "a b:1", "fd00::2:1", "h:77x", "h:٣"]
)
def test_addresses_that_are_none(model: Path, text: str) -> None:
    assert mistakes("--role", "prefill", "--model", model, f"--peer={text}") == [
        f"--peer: should be HOST:PORT, not {text!r}"
    ]


# --- where values come from ---


def test_precedence(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "node.toml"
    file.write_text(f'role = "decode"\nmodel = "{model}"\nport = 1\nlog_level = "error"\nlease = 1.5\nthreads = 3\n')
    monkeypatch.setenv("HMAD_CONFIG", str(file))
    monkeypatch.setenv("HMAD_PORT", "2")
    monkeypatch.setenv("HMAD_LOG_LEVEL", "debug")
    found = resolved("--port", "3")
    config, sources = found.config, found.sources
    assert (config.port, sources["port"]) == (3, "command line")
    assert (config.log_level, sources["log_level"]) == ("debug", "environment")
    assert (config.lease_s, sources["lease"]) == (1.5, str(file))
    assert (config.host, sources["host"]) == ("127.0.0.1", "default")
    other = tmp_path / "other.toml"
    other.write_text(file.read_text().replace("1.5", "2.5"))
    assert resolved("--config", other).config.lease_s == 2.5


def test_one_file_serves_both_roles(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "hmad.toml"
    file.write_text('threads = 1\nport = 9\n[prefill]\npeer = "127.0.0.1:5"\n[decode]\narena_bytes = "2G"\nport = 10\n')
    d = resolved("--config", file, "--role", "decode", "--model", model)
    p = resolved("--config", file, "--role", "prefill", "--model", model)
    assert (d.config.threads, d.config.port, d.config.arena_bytes) == (1, 10, 2 << 30)
    assert (p.config.threads, p.config.port, p.config.peers) == (1, 9, (("127.0.0.1", 5),))
    assert d.sources["arena_bytes"] == f"{file} [decode]"


SAMPLES: dict[str, tuple[str, Any]] = {
    "host": ("127.0.0.2", "127.0.0.2"),
    "port": ("9001", 9001),
    "precision": ("fp32", "fp32"),
    "device": ("cuda:1", "cuda:1"),
    "device_memory": ("40G", 40 << 30),
    "threads": ("3", 3),
    "load_format": ("dummy", "dummy"),
    "dummy_seed": ("7", 7),
    "max_model_len": ("4096", 4096),
    "digest": ("none", "none"),
    "drain_timeout": ("2.5", 2.5),
    "log_level": ("debug", "debug"),
    "log_format": ("text", "text"),
    "peer": ("127.0.0.1:1,localhost:2", (("127.0.0.1", 1), ("localhost", 2))),
    "kv_format": ("mxfp8", "mxfp8"),
    "served_model_name": ("a,b", ("a", "b")),
    "default_max_tokens": ("5", 5),
    "max_batch_tokens": ("64", 64),
    "max_queue": ("5", 5),
    "queue_timeout": ("0.5", 0.5),
    "timelines": ("0", 0),
    "request_timeout": ("2.5", 2.5),
    "transfer": ("after", "after"),
    "stream_rate": ("100M", 100 << 20),
    "frame_bytes": ("64K", 64 << 10),
    "staging_bytes": ("1M", 1 << 20),
    "history_bytes": ("1M", 1 << 20),
    "bulk_connections": ("4", 4),
    "stream_host": ("127.0.0.3", "127.0.0.3"),
    "stream_port": ("7", 7),
    "accept_formats": ("bf16,int8", ("bf16", "int8")),
    "arena_bytes": ("1M", 1 << 20),
    "landing_bytes": ("64M", 64 << 20),
    "max_batch_size": ("5", 5),
    "lease": ("2", 2.0),
}


def test_every_knob_has_a_sample() -> None:
    assert {*SAMPLES, "role", "model", "cluster_key_file", "api_key_file"} == {*KNOBS}


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("source", ["command line", "environment", "file"])
def test_every_knob_from_every_source(
    name: str, source: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, value = SAMPLES[name]
    knob = KNOBS[name]
    role = knob.role or "decode"
    argv = ["--role", role, "--model", str(model)]
    if role == "prefill" and name != "peer":
        argv += ["--peer", "127.0.0.1:7700"]
    if source == "command line":
        argv += [knob.flag, text]
    elif source == "environment":
        monkeypatch.setenv(f"HMAD_{name.upper()}", text)
    else:
        file = tmp_path / "hmad.toml"
        file.write_text(f'[{role}]\n{name} = "{text}"\n')
        argv += ["--config", str(file)]
    found = resolved(*argv)
    assert getattr(found.config, knob.field) == value
    assert found.sources[name] == (f"{tmp_path}/hmad.toml [{role}]" if source == "file" else source)


@pytest.mark.parametrize("name", ["int8", "fp8_e4m3", "mxfp8", "bfp8"])
def test_a_frame_holds_a_whole_batch_of_a_layer_by_default(name: str) -> None:
    """Of every Qwen3 from 4B to 32B: eight KV heads of 128."""
    most_tokens, frame_bytes = (Config.model_fields[knob].default for knob in ("max_batch_tokens", "frame_bytes"))
    num_bytes = FORMATS[name].num_blocks(most_tokens) * KVGeometry(64, 8, 128).block_bytes(FORMATS[name])
    assert num_bytes <= frame_bytes


# --- the shipped file ---


def test_shipped_file_names_every_knob_as_the_model_has_it() -> None:
    assert (ROOT / "hmad.toml").read_text() == cli.default_toml(), "run: hmad print-config > hmad.toml"


def test_shipped_file_tells_default_unit_and_reason() -> None:
    text = (ROOT / "hmad.toml").read_text()
    for knob in KNOBS.values():
        entry = re.search(rf"^# (.+)\n(?:# )?{knob.name} = (.+)$", text, re.MULTILINE)
        assert entry is not None, knob.name
        assert knob.why in entry[1]
        assert knob.unit is None or f"[{knob.unit}]" in entry[1]
    assert 'landing_bytes = "256M"' in text
    assert "queue_timeout = 30" in text


@pytest.mark.parametrize("role", ROLES)
def test_shipped_file_yields_the_defaults(role: str, model: Path) -> None:
    argv = ["--role", role, "--model", str(model), *(("--peer", "127.0.0.1:7700") if role == "prefill" else ())]
    assert resolved(*argv, "--config", ROOT / "hmad.toml").config == resolved(*argv).config


# --- mistakes ---


def test_every_mistake_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HMAD_LEESE", "4")
    monkeypatch.setenv("HMAD_PORT", "99999")
    file = tmp_path / "h.toml"
    file.write_text('frobnicate = 1\nmax-batch-size = 3\n[prefill]\nlease = 3\nrole = "decode"\n')
    told = mistakes(
        "--config",
        file,
        "--role",
        "decode",
        "--model",
        "/nowhere",
        "--peer",
        "a:1",
        "--arena-bytes",
        "lots",
        "--arena-byte",
        "5",
        "--host",
        "0.0.0.0",
        "--precision",
        "int8",
        "--accept-formats",
        "int8,int9",
        "--api-key-file",
        "/nowhere/keys",
    )
    assert sorted(told) == sorted(
        [
            "--peer belongs to the prefill role, this is decode",
            "--arena-byte: unknown; did you mean --arena-bytes?",
            "HMAD_LEESE: unknown; did you mean HMAD_LEASE?",
            f"{file}: frobnicate: unknown",
            f"{file}: max-batch-size: unknown; did you mean {file}: max_batch_size?",
            f"{file} [prefill]: lease belongs to the decode role, this is prefill",
            f"{file} [prefill]: role belongs above the tables",
            "HMAD_PORT: input should be less than or equal to 65535, not '99999'",
            "--precision: a decode node computes in bf16 or fp32, not 'int8'",
            "--arena-bytes: should be a size such as 512M, 8G or 1048576 (binary multiples), not 'lots'",
            "--accept-formats: input should be 'fp32', 'bf16', 'int8', 'fp8_e4m3', 'mxfp8' or 'bfp8', not 'int9'",
            "--cluster-key-file: required, because 0.0.0.0 is not a loopback address",
            "--model: /nowhere is not a directory",
            "--api-key-file: cannot read /nowhere/keys: No such file or directory",
        ]
    )


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--port", "0"], "input should be greater than or equal to 1, not '0'"),
        (["--threads", "two"], "input should be a valid integer, unable to parse string as an integer, not 'two'"),
        (["--lease", "nan"], "input should be a finite number, not 'nan'"),
        (["--lease", "0"], "input should be greater than 0, not '0'"),
        (["--arena-bytes", "0"], "input should be greater than or equal to 1, not '0'"),
        (["--host", ""], "string should have at least 1 character, not ''"),
        (["--accept-formats", ""], "value should have at least 1 item after validation, not 0, not ['']"),
    ],
)
def test_values_out_of_bounds(argv: list[str], complaint: str, model: Path) -> None:
    assert mistakes("--role", "decode", "--model", model, *argv) == [f"{argv[0]}: {complaint}"]


def test_a_switch_is_no_number(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "h.toml"
    file.write_text("port = true\n")
    assert mistakes("--config", file, "--role", "decode", "--model", model) == [
        f"{file}: port: should not be true or false, not True"
    ]


def test_chunks_end_on_blocks(model: Path) -> None:
    with pytest.raises(ConfigError, match=r"--max-batch-tokens: should be a multiple of 32, not '100'"):
        prefill(model, "--max-batch-tokens", "100")


def test_role_model_and_peer_are_required(model: Path) -> None:
    assert [line.partition(":")[0] for line in mistakes()] == ["--role is required", "--model is required"]
    assert mistakes("--role", "prefill", "--model", model) == [
        "--peer: a prefill node needs at least one HOST:PORT of a decode node"
    ]
    assert mistakes("--role", "both", "--model", model) == ["--role: input should be 'prefill' or 'decode', not 'both'"]


@pytest.mark.parametrize("role", ROLES)
def test_knobs_of_the_other_role_are_named(role: str, model: Path) -> None:
    foreign = [name for name, knob in KNOBS.items() if knob.role not in (None, role)]
    own_peer = ["--peer", "127.0.0.1:1"] if role == "prefill" else []
    argv = [word for name in foreign for word in (KNOBS[name].flag, SAMPLES[name][0])]
    other = "decode" if role == "prefill" else "prefill"
    told = mistakes("--role", role, "--model", model, *own_peer, *argv)
    assert sorted(told) == sorted(f"{KNOBS[name].flag} belongs to the {other} role, this is {role}" for name in foreign)


@pytest.mark.parametrize(
    ("role", "argv", "exposed"),
    [
        ("decode", ["--host", "0.0.0.0"], "0.0.0.0"),
        ("decode", ["--stream-host", "10.0.0.2"], "10.0.0.2"),
        ("decode", ["--host", "::"], "::"),
        ("prefill", ["--peer", "node-b:7700"], "node-b"),
        ("prefill", ["--peer", "127.0.0.1:1", "--host", "192.168.1.1"], "192.168.1.1"),
    ],
)
def test_strangers_need_the_cluster_key(role: str, argv: list[str], exposed: str, model: Path, key_file: Path) -> None:
    base = ["--role", role, "--model", model, *argv]
    assert mistakes(*base) == [f"--cluster-key-file: required, because {exposed} is not a loopback address"]
    assert resolved(*base, "--cluster-key-file", key_file).config.cluster_key_file == key_file


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_no_key(host: str, model: Path) -> None:
    assert decode(model, "--host", host).cluster_key_file is None


def test_broken_files_are_named(tmp_path: Path, model: Path) -> None:
    broken = tmp_path / "broken.toml"
    broken.write_text("port = = 3\n")
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe")
    (tmp_path / "empty").mkdir()
    assert mistakes("--config", tmp_path / "none.toml") == [
        f"cannot read {tmp_path}/none.toml: No such file or directory"
    ]
    assert mistakes("--config", broken)[0].startswith(f"{broken}: ")
    assert mistakes("--config", binary)[0].startswith(f"{binary}: ")
    assert mistakes("--role", "decode", "--model", tmp_path / "empty") == [
        f"--model: {tmp_path}/empty has no config.json: not a model directory"
    ]


# --- keys ---


def test_cluster_key_is_read_without_white_space(tmp_path: Path) -> None:
    assert keys.load_cluster_key(write_key(tmp_path / "k", f"\n{SECRET}\n")) == SECRET.encode()
    assert keys.load_cluster_key(write_key(tmp_path / "k2", "x" * 16, 0o640)) == b"x" * 16


@pytest.mark.parametrize(
    ("text", "mode", "complaint"),
    [
        ("x" * 15, 0o600, "holds 15 bytes"),
        (" " * 40, 0o600, "holds 0 bytes"),
        (SECRET, 0o604, "open to every user"),
        (SECRET, 0o602, "open to every user"),
    ],
)
def test_weak_cluster_keys_are_refused(text: str, mode: int, complaint: str, tmp_path: Path, model: Path) -> None:
    path = write_key(tmp_path / "k", text, mode)
    with pytest.raises(ConfigError, match=complaint):
        keys.load_cluster_key(path)
    told = mistakes("--role", "decode", "--model", model, "--cluster-key-file", path)
    assert len(told) == 1
    assert told[0].startswith("--cluster-key-file: ")
    assert complaint in told[0]
    assert SECRET not in told[0]


def test_api_keys_are_kept_as_digests(tmp_path: Path) -> None:
    digests = [hashlib.sha256(key).digest() for key in (b"sk-one", b"sk-two")]
    file = write_key(tmp_path / "keys", f"# clients\n sk-one \n\nsha256:{digests[1].hex().upper()}\n")
    assert keys.load_api_keys(file) == frozenset(digests)


@pytest.mark.parametrize(
    ("text", "complaint"), [("# none\n\n", "holds no key"), ("sk-one\nsha256:12ab\n", "line 2: sha256: needs 64")]
)
def test_bad_api_key_files_are_refused(text: str, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=complaint):
        keys.load_api_keys(write_key(tmp_path / "keys", text))


# --- the program ---


def test_check_config_prints_a_file_that_yields_the_same(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [
        "--role",
        "prefill",
        "--model",
        str(model),
        "--peer",
        "[::1]:7700",
        "--stream-rate",
        "3M",
        "--queue-timeout",
        "2.5",
    ]
    assert cli.main(["check-config", *argv]) == 0
    out = capsys.readouterr().out
    assert re.search(r'^stream_rate = "3M" +# command line$', out, re.MULTILINE)
    assert re.search(r"^max_queue = 256 +# default$", out, re.MULTILINE)
    assert "arena_bytes" not in out
    assert tomllib.loads(out)["peer"] == ["[::1]:7700"]
    (tmp_path / "again.toml").write_text(out)
    assert resolved("--config", tmp_path / "again.toml").config == resolved(*argv).config


def test_keys_are_never_printed(model: Path, key_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["check-config", "--role", "decode", "--model", str(model), "--cluster-key-file", str(key_file)]
    assert cli.main([*argv, "--api-key-file", str(key_file)]) == 0
    assert cli.main([*argv, "--port", "x"]) == 2
    printed = capsys.readouterr()
    assert SECRET not in printed.out + printed.err
    assert str(key_file) in printed.out


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["check-config", "--port"], "hmad: argument --port: expected one argument\n"),
        (["check-confg"], "hmad: unexpected argument 'check-confg'\n"),
        (["check-config", "more"], "hmad: unexpected argument 'more'\n"),
        (["--role", "decode", "--model", "/nowhere"], "hmad: --model: /nowhere is not a directory\n"),
        (
            ["check-config", "--role", "decode", "--model", "/nowhere", "-x"],
            "hmad: --x: unknown\nhmad: --model: /nowhere is not a directory\n",
        ),
    ],
)
def test_mistakes_end_with_code_2(argv: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 2
    assert capsys.readouterr().err == told


def test_help_tells_every_knob(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--help"])
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    words = " ".join(out.split())
    for knob in KNOBS.values():
        assert re.search(rf" {knob.flag} \S+ {re.escape(knob.why)} \((default: |required)", words), knob.name
    assert "(default: 8000 for prefill, 8001 for decode)" in out
    assert "--arena-bytes BYTES" in out
    assert out.index("both roles:") < out.index("prefill role:") < out.index("decode role:")


def test_program_answers_at_once_and_without_torch() -> None:
    code = "import sys; from hmad.edges import cli; cli.main(['print-config']); assert 'torch' not in sys.modules"
    start_s = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert tomllib.load(io.BytesIO(done.stdout.encode()))["decode"]["stream_port"] == 7700
    assert time.monotonic() - start_s < 5


def test_python_m_hmad_is_the_same_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hmad", "--version"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert re.fullmatch(r"hmad \d+\.\d+\.\d+\n", done.stdout)
    failed = subprocess.run([sys.executable, "-m", "hmad"], capture_output=True, text=True, cwd=ROOT, check=False)
    assert failed.returncode == 2
    assert "Traceback" not in failed.stderr


def test_serving_hands_the_configuration_to_the_node(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[Config] = []

    def run(config: Config) -> int:
        served.append(config)
        return 7

    monkeypatch.setattr(hmad.edges, "node", SimpleNamespace(run=run), raising=False)
    assert cli.main(["--role", "decode", "--model", str(model)]) == 7
    assert served == [decode(model)]
