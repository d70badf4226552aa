"""The command line: ``hmad --role ...`` serves, the named commands only speak.

torch is not imported until a node serves, so that help and checks answer at once.
"""

import argparse
import json
import os
import sys
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from hmad import __version__
from hmad.facts.config import KNOBS, ROLES, Config, Knob, Layer, Resolved, Role, format_size, knobs_of, resolve
from hmad.facts.errors import ConfigError, ModelError
from hmad.facts.keys import hashed_line

EXIT_OK, EXIT_MISTAKE = 0, 2
ENV_PREFIX = "HMAD_"
MAX_KEY_BYTES = 4096
COMMANDS = ("check-config", "print-config", "hash-key")

USAGE = """hmad --role {prefill,decode} --model DIR [OPTION ...]    serve
       hmad check-config [OPTION ...]    print the resolved configuration, or every mistake in it
       hmad print-config                 print an hmad.toml with every default
       hmad hash-key                     read an API key from stdin, print its line for --api-key-file
       hmad eval --model DIR TASK.jsonl ...    measure what precisions and KV formats cost in quality"""
EPILOG = """Each option is also a key of the file (--max-queue is max_queue) and a variable (HMAD_MAX_QUEUE).
The command line wins over variables, these over the file, the file over defaults. Sizes are bytes or
512M, 8G (binary multiples). Lists are comma-separated."""
METAVARS: Mapping[str | None, str] = {"model": "DIR", "peer": "HOST:PORT", "s": "SECONDS"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code. Mistakes of the user are told one a line, without a traceback."""
    try:
        return _run(sys.argv[1:] if argv is None else argv)
    except (ConfigError, ModelError) as error:
        print(*(f"hmad: {line}" for line in str(error).splitlines()), sep="\n", file=sys.stderr)
        return EXIT_MISTAKE


def _run(argv: Sequence[str]) -> int:
    if argv[:1] == ["eval"]:  # it has options of its own
        from hmad.edges.evaluation.command import main as evaluate

        return evaluate(argv[1:])
    command, flags, strays = _parse(argv)
    if command == "print-config":
        print(default_toml(), end="")
        return EXIT_OK
    if command == "hash-key":
        print(hashed_line(sys.stdin.buffer.read(MAX_KEY_BYTES)))
        return EXIT_OK
    resolved = resolve(_layers(flags, strays))
    if command == "check-config":
        print(resolved_toml(resolved), end="")
        return EXIT_OK
    return _serve(resolved.config)


def _serve(config: Config) -> int:
    from hmad.edges import logs, node

    logs.configure(config.log_format, config.log_level)
    return node.run(config)


# --- the command line itself ---


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def _parse(argv: Sequence[str]) -> tuple[str, dict[str, Any], list[str]]:
    """The command (empty: serve), the flags given, and the flags that do not exist."""
    known, rest = _parser().parse_known_args(argv)
    words = [word for word in rest if not word.startswith("-")]
    strays = [word.partition("=")[0] for word in rest if word.startswith("-")]
    command = words[0] if words and words[0] in COMMANDS else ""
    if words[bool(command) :] and not strays:  # after an unknown flag a word is likely its value
        raise ConfigError(f"unexpected argument {words[bool(command)]!r}")
    return command, vars(known), strays


def _parser() -> _Parser:
    parser = _Parser(
        prog="hmad",
        usage=USAGE,
        epilog=EPILOG,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"hmad {__version__}")
    parser.add_argument("--config", metavar="FILE", help="read knobs from this TOML file")
    for role in (None, *ROLES):
        group = parser.add_argument_group(f"{role} role" if role else "both roles")
        for knob in knobs_of(role):
            group.add_argument(
                knob.flag,
                dest=knob.name,
                action="append" if knob.repeats else "store",
                metavar=_metavar(knob),
                help=f"{knob.why} ({_default_note(knob)})".replace("%", "%%"),
            )
    return parser


def _metavar(knob: Knob) -> str:
    if knob.words and not knob.repeats:
        return f"{{{','.join(knob.words)}}}"
    return METAVARS.get(knob.name) or METAVARS.get(knob.unit) or (knob.unit or knob.name.rpartition("_")[2]).upper()


def _default_note(knob: Knob) -> str:
    if knob.required:
        return "required"
    texts = {role: plain(knob, knob.default(role)) for role in ROLES}
    if len(set(texts.values())) == 1:
        return f"default: {texts['prefill']}"
    return "default: " + ", ".join(f"{text} for {role}" for role, text in texts.items())


# --- the sources, strongest first ---


def _layers(flags: dict[str, Any], strays: Iterable[str]) -> list[Layer]:
    environment = _environment(os.environ)
    named = environment.pop("config", None)
    path = flags.pop("config", named)
    typed = flags | {stray.lstrip("-").replace("-", "_"): None for stray in strays}
    return [
        Layer("command line", typed, lambda name: f"--{name.replace('_', '-')}"),
        Layer("environment", environment, lambda name: f"{ENV_PREFIX}{name.upper()}"),
        *(_file_layers(Path(path)) if path else ()),
    ]


def _environment(environ: Mapping[str, str]) -> dict[str, str]:
    return {key.removeprefix(ENV_PREFIX).lower(): value for key, value in environ.items() if key.startswith(ENV_PREFIX)}


def _file_layers(path: Path) -> list[Layer]:
    """The tables [prefill] and [decode] speak to one role, the keys above them to both."""
    document = _read_toml(path)
    tables = {role: document.pop(role) for role in ROLES if isinstance(document.get(role), dict)}
    return [*(_table_layer(path, role, table) for role, table in tables.items()), _table_layer(path, None, document)]


def _table_layer(path: Path, role: Role | None, table: Mapping[str, object]) -> Layer:
    where = f"{path} [{role}]" if role else str(path)
    return Layer(where, table, lambda name: f"{where}: {name}", role)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # not TOML, or not UTF-8
        raise ConfigError(f"{path}: {error}") from error


# --- configurations as text ---


def plain(knob: Knob, value: Any) -> str:
    """A value as one types it on the command line."""
    if isinstance(value, tuple):
        return ",".join(str(item) for item in value)
    if isinstance(value, int) and (knob.unit or "").startswith("bytes"):
        return format_size(value)
    if isinstance(value, float):
        return f"{value:g}"
    return "none" if value is None else str(value)


def toml_value(knob: Knob, value: Any) -> str:
    """A value as hmad.toml writes it."""
    if isinstance(value, tuple):
        return json.dumps([str(item) for item in value])
    text = plain(knob, value)
    return text if isinstance(value, int | float) and not text[-1].isalpha() else json.dumps(text)


def resolved_toml(resolved: Resolved) -> str:
    """The configuration as a file that yields it again, each value beside where it came from."""
    role = resolved.config.role
    knobs = [knob for knob in KNOBS.values() if knob.role in (None, role)]
    lines = {knob: f"{knob.name} = {toml_value(knob, getattr(resolved.config, knob.field))}" for knob in knobs}
    width = max(len(line) for line in lines.values() if len(line) <= 60)
    return "".join(f"{line:<{width}}  # {resolved.sources[knob.name]}\n" for knob, line in lines.items())


def default_toml() -> str:
    """A file that names every knob with its default, unit and reason; the required ones as comments."""
    both = [knob for knob in knobs_of(None) if knob.default("prefill") == knob.default("decode")]
    parts = [TOML_HEAD, *(_entry(knob, "prefill") for knob in both)]
    for role in ROLES:
        own = [knob for knob in KNOBS.values() if knob not in both and knob.role in (None, role)]
        parts += [f"[{role}]\n", *(_entry(knob, role) for knob in own)]
    return "\n".join(parts)


TOML_HEAD = """# Configuration of an hmad node: every knob with its default. Keys above the tables are for both roles,
# [prefill] and [decode] for one, so that all nodes can share this file. Variables (HMAD_MAX_QUEUE for max_queue) win
# over it, and the command line (--max-queue) over both. Sizes are bytes or "512M", "8G" (binary multiples).
"""
EXAMPLES = {"role": '"prefill"', "model": '"/srv/models/Qwen3-8B"', "peer": '["10.0.0.2:7700"]'}


def _entry(knob: Knob, role: Role) -> str:
    unit = f" [{knob.unit}]" if knob.unit else ""
    if knob.required:
        return f"# {knob.why}{unit}; required\n# {knob.name} = {EXAMPLES[knob.name]}\n"
    return f"# {knob.why}{unit}\n{knob.name} = {toml_value(knob, knob.default(role))}\n"
