"""Key files: the secret that nodes share, and the keys of REST clients. What they hold is never printed."""

import hashlib
import re
from pathlib import Path

from hmad.facts.errors import ConfigError

MIN_CLUSTER_KEY_BYTES = 16
MIN_HASHED_KEY_BYTES = 16
HASHED = b"sha256:"


def load_cluster_key(path: Path) -> bytes:
    """The secret that proves nodes to each other, without surrounding white space."""
    key = _read(path).strip()
    if path.stat().st_mode & 0o007:
        raise ConfigError(f"{path} is open to every user of this machine: chmod o= it")
    if len(key) < MIN_CLUSTER_KEY_BYTES:
        raise ConfigError(f"{path} holds {len(key)} bytes, a cluster key needs at least {MIN_CLUSTER_KEY_BYTES}")
    return key


def load_api_keys(path: Path) -> frozenset[bytes]:
    """SHA-256 digests of the clients' keys; the keys themselves are not kept. Lines starting with # are comments."""
    lines = [line.strip() for line in _read(path).splitlines()]
    keys = [(number, line) for number, line in enumerate(lines, 1) if line and not line.startswith(b"#")]
    if not keys:
        raise ConfigError(f"{path} holds no key: nobody could get in")
    return frozenset(_digest_of_key(line, f"{path}, line {number}") for number, line in keys)


def key_digest(api_key: bytes) -> bytes:
    """Keys are kept and compared as SHA-256, so that all have one length and none stands in memory."""
    return hashlib.sha256(api_key).digest()


def hashed_line(api_key: bytes) -> str:
    """A key as an API key file may hold it: enough to know the key by, useless to whoever reads it.

    Plain SHA-256, for keys are long and random: there is nothing to guess, and each request is checked at once.
    """
    key = api_key.strip()
    if not key or len(key.split()) > 1 or key.startswith((b"#", HASHED)):
        raise ConfigError("an API key is one word on one line, without # or sha256: before it")
    if len(key) < MIN_HASHED_KEY_BYTES:
        raise ConfigError(
            f"a key of {len(key)} bytes can be guessed from its hash: take at least {MIN_HASHED_KEY_BYTES} random "
            "ones, such as openssl rand -hex 24 prints"
        )
    return f"{HASHED.decode()}{key_digest(key).hex()}"


def _digest_of_key(line: bytes, where: str) -> bytes:
    if not line.startswith(HASHED):
        return key_digest(line)
    if not re.fullmatch(rb"sha256:[0-9a-fA-F]{64}", line):
        raise ConfigError(f"{where}: sha256: needs 64 hexadecimal digits")
    return bytes.fromhex(line.removeprefix(HASHED).decode())


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
