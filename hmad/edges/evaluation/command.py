"""The command line of ``hmad eval``."""

import argparse
import asyncio
import datetime
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, TypeVar, get_args

from hmad import __version__
from hmad.compute.checkpoint import ModelConfig, fingerprint, read_config
from hmad.compute.tokenizer import Tokenizer
from hmad.edges.evaluation import table
from hmad.edges.evaluation.journal import Header, Journal
from hmad.edges.evaluation.measures import measure_all
from hmad.edges.evaluation.nodes import EvaluationError
from hmad.edges.evaluation.questions import BrokenLineError, Encode, OnBrokenLine, Question, read_tasks
from hmad.edges.evaluation.run import run
from hmad.edges.evaluation.settings import DEFAULT_BASELINE, DEFAULT_CANDIDATES, Pair, Settings, half_of_the_cores
from hmad.facts.config import check_model_dir, parse_size
from hmad.facts.errors import ConfigError
from hmad.facts.formats import FORMATS, KVGeometry

T = TypeVar("T")

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
    return Header(__version__, model, str(settings.baseline), settings.kl_tokens)


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
    given = vars(_parser().parse_args(argv))
    files, candidates = tuple(given.pop("files")), tuple(given.pop("candidates") or DEFAULT_CANDIDATES)
    return Settings(files=files, candidates=candidates, **given)


def _parser() -> _Parser:
    parser = _Parser(prog="hmad eval", description=DESCRIPTION, allow_abbrev=False)
    add = parser.add_argument
    add("files", type=Path, nargs="+", metavar="TASK.jsonl", help="questions of one task")
    add("--model", type=Path, required=True, metavar="DIR", help="Hugging Face directory of the model (required)")
    add("--output", type=Path, default=Path("build/eval"), metavar="DIR", help="where results go, and are gone on from")
    add("--baseline", type=_pair, default=DEFAULT_BASELINE, metavar="P/F", help="prefill precision and KV format")
    known = f"what to compare with it; repeatable (default: {', '.join(map(str, DEFAULT_CANDIDATES))})"
    add("--candidate", dest="candidates", type=_pair, action="append", metavar="P/F", help=known)
    add("--questions", dest="num_questions", type=_count, metavar="N", help="the first N of each file (default: all)")
    add("--kl-questions", type=_count, default=100, metavar="N", help="whose distributions are compared, of each file")
    add(
        "--kl-tokens",
        type=_count,
        default=32,
        metavar="N",
        help="tokens of each of these, whose logits are kept on disk",
    )
    add("--at-once", dest="concurrency", type=_count, default=16, metavar="N", help="questions asked at once")
    add("--margin", type=_points, default=0.005, metavar="POINTS", help="loss in percentage points that would matter")
    add("--max-kl", type=float, default=1e-3, metavar="NATS", help="mean KL that would matter")
    add("--on-broken-line", choices=get_args(OnBrokenLine), default="stop", help="leave such questions out, or stop")
    add("--arena-bytes", type=_size, default=1 << 30, metavar="BYTES", help="the decode node's memory for KV: 512M, 8G")
    half = half_of_the_cores()
    add("--threads", type=_count, default=half, metavar="N", help="of each node (default: half of the cores)")
    return parser


def _pair(text: str) -> Pair:
    return _told_of(Pair.parse, text)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"should be a whole number above 0, not {text!r}")
    return int(text)


def _points(text: str) -> float:
    return float(text) / 100


def _size(text: str) -> int:
    return int(str(_told_of(parse_size, text)))


def _told_of(parse_text: Callable[[str], T], text: str) -> T:
    """argparse names the option whose value could not be read."""
    try:
        return parse_text(text)
    except (ConfigError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error
