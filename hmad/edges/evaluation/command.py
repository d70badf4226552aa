"""The command line of ``hmad eval``."""

import argparse
import asyncio
import datetime
import hashlib
import json
import math
import os
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

from hmad import __version__
from hmad.compute.checkpoint import ModelConfig, fingerprint, read_config
from hmad.compute.tokenizer import Tokenizer
from hmad.edges.evaluation import table
from hmad.edges.evaluation.journal import Header, Journal
from hmad.edges.evaluation.measures import measure_all
from hmad.edges.evaluation.nodes import EvaluationError
from hmad.edges.evaluation.questions import BrokenLineError, Encode, OnBrokenLine, Question, read_tasks
from hmad.edges.evaluation.run import run
from hmad.edges.evaluation.settings import Pair, Settings
from hmad.facts.config import check_model_dir
from hmad.facts.errors import ConfigError
from hmad.facts.formats import FORMATS, KVGeometry

EXIT_OK, EXIT_FAILED, EXIT_INTERRUPTED = 0, 1, 130

DESCRIPTION = """Measure what prefill precisions and KV formats cost in quality, through a real prefill node and a real
decode node that this command starts. Questions are JSON lines, one task per file; docs/evaluation.md has their fields.
The table has two rows that nobody asks for: the baseline again in other batches, which shows the noise, and KV of 3
bits, which must be found out. An evaluation that was interrupted goes on when the same command is given again."""


def main(argv: Sequence[str]) -> int:
    """Run an evaluation; the exit code is 0 where its result can be believed. Raises ConfigError."""
    settings = parse(argv)
    try:
        return evaluate(settings)
    except EvaluationError as error:
        tell(f"hmad eval: {error}")
    except KeyboardInterrupt:
        tell(f"hmad eval: interrupted; the same command goes on from {settings.output}")
        return EXIT_INTERRUPTED
    return EXIT_FAILED


def evaluate(settings: Settings) -> int:
    model, geometry = open_model(settings)
    encode = encoder(settings, model)
    tasks = read_tasks(settings.files, encode, settings.num_questions, settings.on_broken_line, tell)
    settings.output.mkdir(parents=True, exist_ok=True)
    journal = Journal(settings.output, header(settings))
    try:
        asyncio.run(run(settings, tasks, journal))
        rows = measure_all(settings, tasks, journal, geometry)
    finally:
        journal.close()
    head = {"date": str(datetime.date.today()), "machine": machine()}
    text = table.as_markdown(settings, rows, head)
    (settings.output / "quality.md").write_text(text)
    (settings.output / "quality.json").write_text(json.dumps(table.as_json(settings, rows, head), indent=1) + "\n")
    print(text)
    return EXIT_FAILED if table.trouble(settings, rows) else EXIT_OK


def open_model(settings: Settings) -> tuple[ModelConfig, KVGeometry]:
    """Raises ConfigError for a format that is not defined for the model's head_dim."""
    check_model_dir(settings.model)
    model = read_config(settings.model)
    for row in settings.rows:
        if not FORMATS[row.pair.kv_format].fits(model.head_dim):
            fitting = ", ".join(name for name, fmt in FORMATS.items() if fmt.fits(model.head_dim))
            raise ConfigError(f"{row.pair}: for this model's head_dim of {model.head_dim} there are {fitting}")
    return model, KVGeometry(model.num_layers, model.num_kv_heads, model.head_dim)


def encoder(settings: Settings, model: ModelConfig) -> Encode:
    """Questions to tokens, as every row gets them."""
    tokenizer = Tokenizer(settings.model)

    def encode(question: Question) -> tuple[list[int], list[int]]:
        text = question.prompt
        if question.chat:
            message = {"role": "user", "content": question.prompt}
            text = tokenizer.render_chat([message], add_generation_prompt=True, enable_thinking=False)
        prompt = tokenizer.encode(text, add_special_tokens=not question.chat)
        answer = tokenizer.encode(question.answer, add_special_tokens=False)
        needed = len(prompt) + (question.max_tokens if question.is_answered else settings.kl_tokens)
        if needed > model.max_position_embeddings:
            raise BrokenLineError(f"{needed} tokens, but the model's context is {model.max_position_embeddings}")
        return prompt, answer

    return encode


def header(settings: Settings) -> Header:
    model = fingerprint(settings.model, "safetensors", 0).hex()
    config = settings.node_config
    config_digest = hashlib.sha256(config.read_bytes()).hexdigest() if config else ""
    return Header(__version__, model, str(settings.baseline), settings.kl_tokens, config_digest)


def machine() -> str:
    """Processor and cores."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {len(os.sched_getaffinity(0))} cores"


def tell(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


# --- the command line itself ---


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"eval: {message}")


def parse(argv: Sequence[str]) -> Settings:
    """What is not said has the default of ``Settings``."""
    given = vars(_parser().parse_args(argv))
    given |= {name: tuple(given[name]) for name in ("files", "candidates") if name in given}
    return Settings(**given)


def _parser() -> _Parser:
    parser = _Parser(prog="hmad eval", description=DESCRIPTION, allow_abbrev=False, argument_default=argparse.SUPPRESS)

    def add(flag: str, convert: Callable[[str], object], why: str, default: object = "", **more: Any) -> None:
        note = f" (default: {default})" if default else ""
        parser.add_argument(flag, type=convert, help=f"{why}{note}", **more)

    known = Settings
    candidates = ", ".join(map(str, known.candidates))
    add("files", Path, "questions of one task", nargs="+", metavar="TASK.jsonl")
    add("--model", Path, "Hugging Face directory of the model; required", required=True, metavar="DIR")
    add("--output", Path, "where results go, and are gone on from", known.output, metavar="DIR")
    add("--baseline", _pair, "prefill precision and KV format to compare with", known.baseline, metavar="P/F")
    repeats = {"action": "append", "dest": "candidates", "metavar": "P/F"}
    add("--candidate", _pair, "what to compare; repeatable", candidates, **repeats)
    add("--questions", _count, "the first N of each file", "all", dest="num_questions", metavar="N")
    add("--kl-questions", _count, "of each file, to compare distributions", known.kl_questions, metavar="N")
    add("--kl-tokens", _count, "of each of these; their logits stay on disk", known.kl_tokens, metavar="N")
    add("--at-once", _count, "questions asked at once", known.concurrency, dest="concurrency", metavar="N")
    add("--margin", _points, "loss in percentage points that matters", 100 * known.margin, metavar="POINTS")
    add("--max-kl", _positive, "mean KL in nats that matters", known.max_kl, metavar="NATS")
    parser.add_argument(
        "--on-broken-line",
        choices=get_args(OnBrokenLine),
        help=f"stop at a line that cannot be asked, or leave it out (default: {known.on_broken_line})",
    )
    add("--config", Path, "hmad.toml with more knobs of both nodes", "none", dest="node_config", metavar="FILE")
    add("--threads", _count, "compute threads of each node", "half of the cores", metavar="N")
    return parser


def _pair(text: str) -> Pair:
    try:
        return Pair.parse(text)
    except ConfigError as error:  # argparse names the option
        raise argparse.ArgumentTypeError(str(error)) from error


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"should be a whole number above 0, not {text!r}")
    return int(text)


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"should be a number above 0, not {text!r}")
    return number


def _points(text: str) -> float:
    return _positive(text) / 100
