"""What has been measured so far, on disk: a killed evaluation goes on where it was.

One JSON line per answer, appended as it comes, under a digest of its question. The first line says what all results
have in common, so that those of another model are never mixed in. The baseline's logits stand in files of their own.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import msgspec
import numpy as np

from hmad.edges.evaluation.questions import Item
from hmad.edges.evaluation.statistics import Logits
from hmad.facts.errors import ConfigError


class Header(msgspec.Struct, tag="header", frozen=True):
    """What all results in one journal have in common."""

    version: str
    model_fingerprint: str
    baseline: str
    kl_tokens: int
    node_config: str = ""  # SHA-256 of the nodes' hmad.toml, where there is one


class Free(msgspec.Struct, tag="free", frozen=True):
    """A greedy answer."""

    row: str
    task: str
    question: str
    token_ids: list[int]
    right: bool


class Forced(msgspec.Struct, tag="forced", frozen=True):
    """An answer along given tokens: -log p of each, and the KL from the baseline's distribution (empty in its own)."""

    row: str
    task: str
    question: str
    surprises: list[float]
    divergences: list[float]


class Traffic(msgspec.Struct, tag="traffic", frozen=True):
    """What a prefill node sent while it ran."""

    row: str
    link_bytes: int
    prompt_tokens: int


Record = Header | Free | Forced | Traffic


class Journal:
    """The results of one output directory."""

    def __init__(self, directory: Path, header: Header) -> None:
        self._logits = directory / "logits"
        self._logits.mkdir(parents=True, exist_ok=True)
        self.free: dict[tuple[str, str, str], Free] = {}
        self.forced: dict[tuple[str, str, str], Forced] = {}
        self.traffic: list[Traffic] = []
        path = directory / "journal.jsonl"
        records = list(_whole_records(path))
        _check_header(directory, records[:1], header)
        for record in records:
            self._keep(record)
        self._file: IO[bytes] = path.open("ab")
        if not records:
            self.add(header)

    def add(self, record: Record) -> None:
        self._file.write(msgspec.json.encode(record) + b"\n")
        self._file.flush()
        self._keep(record)

    def close(self) -> None:
        self._file.close()

    def save_logits(self, item: Item, logits: Logits) -> None:
        """Whole or not at all: a half file would pass for a short answer."""
        path = self._logits_path(item)
        partial = path.with_suffix(".partial")
        partial.write_bytes(logits.astype("<f4").tobytes())
        os.replace(partial, path)

    def load_logits(self, item: Item, num_tokens: int) -> Logits:
        """The baseline's [num_tokens, vocab] of this question."""
        logits: Logits = np.fromfile(self._logits_path(item), dtype="<f4").reshape(num_tokens, -1)
        return logits

    def _logits_path(self, item: Item) -> Path:
        return self._logits / "{}-{}.f32".format(*item.key)

    def _keep(self, record: Record) -> None:
        if isinstance(record, Free):
            self.free[record.row, record.task, record.question] = record
        elif isinstance(record, Forced):
            self.forced[record.row, record.task, record.question] = record
        elif isinstance(record, Traffic):
            self.traffic.append(record)


def _whole_records(path: Path) -> Iterator[Record]:
    """All records; a line that a kill cut short is cut off the file."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            yield msgspec.json.decode(line, type=Record)
        except msgspec.DecodeError as error:
            raise ConfigError(f"{path}:{number} is damaged ({error}): remove the directory, or name another") from error


def _check_header(directory: Path, first: list[Record], expected: Header) -> None:
    if not first:
        return
    found = msgspec.structs.asdict(first[0])
    wrong = [name for name, value in msgspec.structs.asdict(expected).items() if found.get(name) != value]
    if wrong:
        raise ConfigError(
            f"{directory} holds another evaluation, of which {', '.join(wrong)} differs: name another --output"
        )
