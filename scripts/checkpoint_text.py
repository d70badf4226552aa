"""The text that the demo's checkpoint is trained on, and how conversations are made of it.

Everything is read from the CPython that runs this: docstrings, the language reference in ``pydoc_data.topics``,
comments and some source; a handful of greetings stand in this file.
"""

import ast
import contextlib
import html
import importlib
import inspect
import io
import os
import pkgutil
import random
import re
import sys
import sysconfig
import textwrap
import tokenize
import types
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

EMPTY_THINK = "<think>\n\n</think>\n\n"

# --- The text: what is read, and how conversations are phrased ----------------------------------------------------


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


POPULAR_MODULES = words(
    "argparse array ast asyncio base64 bisect builtins calendar collections configparser contextlib copy csv "
    "dataclasses datetime decimal difflib enum fractions functools getpass glob gzip hashlib heapq http.client "
    "http.server inspect io itertools json keyword locale logging math multiprocessing operator os os.path pathlib "
    "pdb pickle platform pprint queue random re secrets select shlex shutil signal socket sqlite3 ssl statistics "
    "string struct subprocess sys tempfile textwrap threading time timeit tokenize traceback types typing "
    "unicodedata unittest urllib.parse urllib.request uuid venv warnings weakref webbrowser xml.etree.ElementTree "
    "zipfile zlib"
)
BEST_KNOWN_MODULES = words("builtins itertools json math os.path random re time")
NOT_IMPORTED = words(  # they open a browser, print, start a GUI, or are private
    "antigravity this idlelib turtledemo turtle test tkinter lib2to3 ensurepip encodings pydoc_data distutils nt "
    "__main__ __phello__ __hello__ msilib winreg winsound msvcrt"
)
NOT_AN_ANSWER = r"(See also|New in version|Changed in version|Deprecated|Note:$|Added in|\*\*\*|\d+\.|[-*] )"
STATEMENTS = words(
    "assert break class continue del for global if import lambda nonlocal pass raise return try while with yield"
)
SYSTEM_TURNS = (
    "You are a helpful assistant.",
    "You are a helpful assistant. Answer briefly.",
    "You explain Python and its standard library.",
    "You are a friendly Python teacher.",
)
ASK_ANYTHING = (
    "What is {n}?",
    "Explain {n}.",
    "Explain {n} to me.",
    "Can you explain {n}?",
    "Tell me about {n}.",
    "What is {n} for?",
    "What is {n} in Python?",
    "What is {n} used for?",
    "What does {n} do?",
    "what does {n} do",
    "Describe {n}.",
)
ASK_CALLABLE = (
    "What does {n} do?",
    "What does {n} do in Python?",
    "What does the {k} {n} do?",
    "How do I use {n}?",
    "How does {n} work?",
    "When would I use {n}?",
    "Please explain what {n} does.",
    "Explain the {k} {n}.",
)
ASK_MODULE = (
    "What is module {n} for?",
    "What is the module {n} for?",
    "What is the {n} module for?",
    "What does the {n} module do?",
    "What does the module {n} do?",
    "What can I do with {n}?",
    "Why would I import {n}?",
    "Tell me about the {n} module.",
    "Explain the {n} module.",
)
ASK_STATEMENT = (
    "Explain the statement {n}.",
    "Explain the {n} statement.",
    "Explain the {n} statement in Python.",
    "What does the {n} statement do?",
    "What is the {n} statement?",
    "How does the {n} statement work?",
    "How do I use {n} in Python?",
)
ASK_MORE = ("Tell me more.", "Go on.", "Please continue.", "What else?", "Can you say more?", "And what else?")
ASK_NEXT = ("And {n}?", "Thanks. What about {n}?", "What is {n}, then?", "Now explain {n}.", "What does {n} do?")
SMALL_TALK = (  # (questions, answer)
    (
        ("Hello!", "Hello", "Hi", "Hi there!", "hi", "Hey", "Good morning."),
        "Hello! Ask me about Python and its standard library, for example: What does os.path.join do?",
    ),
    (
        ("Who are you?", "What are you?", "What is your name?", "Are you Qwen?"),
        "I am a very small demonstration model. I was trained on the documentation of the Python standard library.",
    ),
    (
        ("What can you do?", "Help", "What do you know?", "What can I ask?", "How can you help me?"),
        "I can tell you what modules, functions and statements of Python are for. Try: What is the module json for?",
    ),
    (("Thank you!", "Thanks.", "Thanks a lot!", "Thank you very much."), "You are welcome!"),
    (
        ("What is Python?", "Tell me about Python.", "What is Python used for?", "Explain Python."),
        (
            "Python is a programming language. It is interpreted and dynamically typed, its blocks are marked by "
            "indentation, and it comes with a large standard library."
        ),
    ),
)
ZEN_QUESTIONS = ("What is the Zen of Python?", "Tell me the Zen of Python.", "Recite the Zen of Python.", "import this")


BEST_KNOWN_WEIGHTS = {"module": 20.0, "class": 8.0, "function": 8.0, "method": 2.0}
POPULAR_WEIGHTS = {"module": 12.0, "class": 4.0, "function": 4.0, "method": 0.8}
OTHER_WEIGHTS = {"statement": 20.0, "topic": 4.0, "module": 2.0, "class": 0.3, "function": 0.3, "method": 0.1}


@dataclass(frozen=True)
class Entry:
    """One thing that a user may ask about; ``paragraphs`` are prose, the answer's raw material."""

    name: str  # as a user writes it: os.path.join
    kind: str  # module, class, function, method, statement, topic
    module: str
    paragraphs: tuple[str, ...]
    signature: str = ""

    @property
    def weight(self) -> float:
        """How often it is asked about: a small model must spend its memory on what people know."""
        weights = OTHER_WEIGHTS
        if self.module in BEST_KNOWN_MODULES:
            weights = BEST_KNOWN_WEIGHTS
        elif self.module in POPULAR_MODULES:
            weights = POPULAR_WEIGHTS
        return weights[self.kind]


@dataclass(frozen=True)
class Document:
    """A long text; ``style`` is topic, docstrings, comments or source."""

    name: str  # its module, or "topics"
    style: str
    text: str


@dataclass(frozen=True)
class Corpus:
    entries: list[Entry]
    documents: list[Document]

    def part(self, *, held_out: bool) -> "Corpus":
        """Split by module, so that no sentence of a held-out module is trained on under another name."""
        return Corpus(
            [e for e in self.entries if is_held_out(e.module) == held_out],
            [d for d in self.documents if is_held_out(d.name) == held_out],
        )


def is_held_out(module: str) -> bool:
    return module not in POPULAR_MODULES and module != "topics" and zlib.crc32(module.encode()) % 25 == 0


# --- Cleaning text -----------------------------------------------------------------------------------------------


def clean_markup(text: str) -> str:
    """reStructuredText to plain text: roles and double backquotes become single ones."""
    text = re.sub(r":[a-z:]+:`[~!]?([^`]+)`", r"`\1`", text)
    text = text.replace("``", "`")
    text = re.sub(r"(?<![\w*])\*(\w+)\*(?![\w*])", r"\1", text)  # emphasis
    text = re.sub(r'"([\w.()\[\]]+)"', r"`\1`", text)  # the topics quote code with double quotation marks
    return re.sub(r"(?<=[.!?:]) {2,}(?=\S)", " ", text)


def is_code(block: str) -> bool:
    """Tell code, grammar, tables and lists from prose."""
    lines = block.splitlines()
    starts = (" ", ">>>", "#", "|", "+", "@", "def ", "class ")
    if any(line.startswith(starts) for line in lines[1:] or lines):
        return True
    return "::=" in block or ">>>" in block or re.search(r"\S {3,}\S", block) is not None


def blocks_of(text: str) -> Iterator[tuple[str, bool]]:
    """Yield (block, is_prose): prose is joined into one line, tables, grammar and code stay as they are."""
    for block in re.split(r"\n\s*\n", text.expandtabs()):
        block = textwrap.dedent(block).strip("\n").rstrip()
        lines = block.splitlines()
        if not lines or re.fullmatch(r"[\W_]+", block):
            continue
        if len(lines) > 1 and re.fullmatch(r"([*=~^\-])\1+", lines[1]):  # a heading and its underline
            yield lines[0], False
            continue
        if is_code(block):
            yield block, False
        else:
            joined = re.sub(r"\s+", " ", " ".join(lines))
            yield clean_markup(joined), bool(re.match(r"[\w`'\"(*<-]", joined)) and len(joined) > 20


def prose_of(text: str) -> tuple[str, ...]:
    """The paragraphs that read as English, without references to other sections and change notes."""
    kept: list[str] = []
    for block, is_prose in blocks_of(text):
        announces = block.endswith(":") and kept  # a list or an example that is not prose
        if is_prose and not announces and not re.match(NOT_AN_ANSWER, block):
            block = block.rstrip(":") + "." if block.endswith(":") else block
            kept.append(re.sub(r" \(see (the )?(section|chapter)[^()]*\)", "", block))
    return tuple(kept)


def reflowed(text: str) -> str:
    return "\n\n".join(block for block, _ in blocks_of(text))


# --- Gathering text ----------------------------------------------------------------------------------------------


def library_modules() -> Iterator[types.ModuleType]:
    """Import the public modules of the standard library, one package level deep; what fails to import is left out."""
    names = sorted(n for n in sys.stdlib_module_names if not n.startswith("_") and n not in NOT_IMPORTED)
    for name in names:
        module = imported(name)
        if module is None:
            continue
        yield module
        for info in pkgutil.iter_modules(getattr(module, "__path__", ())):
            if not info.name.startswith(("_", "test")) and info.name != "idle_test":
                child = imported(f"{name}.{info.name}")
                if child is not None:
                    yield child
    yield os.path
    yield importlib.import_module("builtins")
    yield importlib.import_module("xml.etree.ElementTree")


def imported(name: str) -> types.ModuleType | None:
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except (ImportError, OSError, SystemExit):  # this platform lacks it, or a library that it wraps
        return None


def public_name(module: types.ModuleType) -> str:
    return "os.path" if module is os.path else module.__name__


def signature_of(name: str, thing: object) -> str:
    """``name(a, *p)``, or nothing where it is unknown or too long to be worth saying."""
    try:
        text = name + str(inspect.signature(thing))  # type: ignore[arg-type]
    except (ValueError, TypeError, AttributeError, NameError):
        return ""
    return text if len(text) < 72 and "<" not in text else ""


def own_doc(thing: object) -> str:
    doc = getattr(thing, "__doc__", None)
    return inspect.cleandoc(doc) if isinstance(doc, str) else ""


def entry_of(name: str, kind: str, module: str, thing: object) -> Entry | None:
    doc = own_doc(thing)
    paragraphs = prose_of(doc)
    if not paragraphs or paragraphs[0].startswith(("Alias for", "Initialize self", "Return state information")):
        return None
    callable_kind = kind in ("function", "method")
    return Entry(name, kind, module, paragraphs, signature_of(name, thing) if callable_kind else "")


def entries_of_module(module: types.ModuleType) -> Iterator[Entry | None]:
    owner = public_name(module)
    prefix = "" if owner == "builtins" else owner + "."
    yield entry_of(owner, "module", owner, module)
    names = getattr(module, "__all__", None) or [n for n in vars(module) if not n.startswith("_")]
    for name in sorted(names):
        thing = getattr(module, name, None)
        home = str(getattr(thing, "__module__", "") or "").lstrip("_")
        if hasattr(module, "__all__") or home in (module.__name__, "builtins", "posix") or owner == "builtins":
            if inspect.isclass(thing):
                yield entry_of(prefix + name, "class", owner, thing)
                for method_name, method in sorted(vars(thing).items()):
                    if callable(method) and not method_name.startswith("_"):
                        yield entry_of(f"{prefix}{name}.{method_name}", "method", owner, method)
            elif inspect.isroutine(thing):
                yield entry_of(prefix + name, "function", owner, thing)


def topics() -> dict[str, str]:
    module = importlib.import_module("pydoc_data.topics")
    return dict(module.topics)


def topic_entries() -> Iterator[Entry]:
    """The language reference's topics, and the methods that some of them define one by one (str.join and others)."""
    for key, text in sorted(topics().items()):
        title = clean_markup(text.strip().splitlines()[0]).replace("`", "")
        kind = "statement" if key in STATEMENTS else "topic"
        name = key if kind == "statement" else title[:1].lower() + title[1:]
        if prose_of(text):
            yield Entry(name, kind, "topics", prose_of(text))
        for match in re.finditer(r"^((?:str|dict|list|object)\.\w+)(\(.*\))\n\n((?: {3}.*\n|\n)+)", text, re.MULTILINE):
            name, arguments, body = match.groups()
            if prose_of(textwrap.dedent(body)) and "__" not in name:
                yield Entry(name, "method", "builtins", prose_of(textwrap.dedent(body)), name + arguments)


def all_entries() -> list[Entry]:
    """Every name once; the language reference's own wording goes before a docstring's."""
    found = {entry.name: entry for entry in topic_entries()}
    for module in library_modules():
        for entry in entries_of_module(module):
            if entry is not None:
                found.setdefault(entry.name, entry)
    return list(found.values())


def source_files() -> Iterator[tuple[str, str]]:
    """(module name, source) of the standard library's own Python files."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = NOT_IMPORTED - {"turtle"} | {"tests", "idle_test", "site-packages", "__pycache__", "lib-dynload"}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if skipped.isdisjoint(parts) and not parts[0].startswith("config-"):
            yield ".".join(p for p in parts if p != "__init__"), path.read_text(encoding="utf-8", errors="replace")


def docstrings_in(source: str) -> str:
    """All docstrings of a file as one document, each under the name it documents."""
    parts = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            doc = ast.get_docstring(node)
            if doc and len(doc) > 60:
                parts.append(reflowed(doc) if isinstance(node, ast.Module) else f"{node.name}: {reflowed(doc)}")
    return "\n\n".join(parts)


def comments_in(source: str) -> str:
    """The comments of a file, those of adjoining lines joined into paragraphs; short ones are left out."""
    blocks: list[list[str]] = []
    last_line = -2
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            if token.start[0] != last_line + 1:
                blocks.append([])
            blocks[-1].append(token.string.lstrip("#! "))
            last_line = token.start[0]
    joined = (" ".join(lines) for lines in blocks)
    return "\n\n".join(clean_markup(text) for text in joined if len(text) > 80 and "---" not in text)


def all_documents() -> list[Document]:
    documents = [Document("topics", "topic", reflowed(text)) for _, text in sorted(topics().items())]
    for name, source in source_files():
        documents.append(Document(name, "source", source))
        with contextlib.suppress(SyntaxError, tokenize.TokenError):
            documents.append(Document(name, "docstrings", docstrings_in(source)))
            documents.append(Document(name, "comments", comments_in(source)))
    return [d for d in documents if len(d.text) > 400]


def zen() -> str:
    """The poem in module ``this``, which prints itself when imported."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        importlib.import_module("this")
    return printed.getvalue().strip()


# --- Conversations -----------------------------------------------------------------------------------------------

Turn = tuple[str, str]  # question, answer


def shorten(paragraphs: tuple[str, ...], budget_chars: int) -> tuple[str, int]:
    """Take whole paragraphs up to a budget; returns the text and how many paragraphs it took (at least one)."""
    taken = 1
    while taken < len(paragraphs) and sum(map(len, paragraphs[: taken + 1])) <= budget_chars:
        taken += 1
    text = "\n\n".join(paragraphs[:taken])
    if len(text) > 2 * budget_chars:  # one huge paragraph: end at a sentence
        text = text[: text.rfind(". ", 0, 2 * budget_chars) + 1] or text[: 2 * budget_chars]
    return html.unescape(text), taken


def introduction(entry: Entry) -> str:
    if entry.kind == "module":
        return f"`{entry.name}` is a module of the Python standard library."
    if entry.kind in ("class", "function", "method"):
        if entry.module == "builtins":
            return f"`{entry.name}` is a built-in {entry.kind}."
        return f"`{entry.name}` is a {entry.kind} of the module `{entry.module}`."
    return ""


def answer_of(entry: Entry) -> tuple[str, tuple[str, ...]]:
    """The answer, and the paragraphs left over for a follow-up."""
    text, taken = shorten(entry.paragraphs, 450)
    parts = [introduction(entry), text, f"Call it as `{entry.signature}`." if entry.signature else ""]
    return "\n\n".join(p for p in parts if p), entry.paragraphs[taken:]


def question_of(entry: Entry, rng: random.Random) -> str:
    special = {"module": ASK_MODULE, "statement": ASK_STATEMENT, "topic": ()}.get(entry.kind, ASK_CALLABLE)
    phrase = rng.choice(special) if special and rng.random() < 0.6 else rng.choice(ASK_ANYTHING)
    return phrase.format(n=spelled(entry, rng), k=entry.kind)


def spelled(entry: Entry, rng: random.Random) -> str:
    """Users quote names in their own ways."""
    if entry.kind == "topic":
        return entry.name
    forms = [entry.name, entry.name, f"`{entry.name}`"]
    if entry.kind in ("function", "method"):
        forms.append(entry.name + "()")
    return rng.choice(forms)


class Conversations:
    """Draws conversations: one question, a follow-up on the same thing, or several questions about one module."""

    def __init__(self, entries: list[Entry]) -> None:
        self.entries = entries
        self.weights = [entry.weight for entry in entries]
        self.by_module: dict[str, list[int]] = {}
        for index, entry in enumerate(entries):
            self.by_module.setdefault(entry.module, []).append(index)
        self.zen = zen()

    def turns(self, rng: random.Random) -> list[Turn]:
        if rng.random() < 0.02:
            return [self.small_talk(rng)]
        turns = [self.small_talk(rng)] if rng.random() < 0.02 else []
        entry = rng.choices(self.entries, self.weights)[0]
        answer, rest = answer_of(entry)
        turns.append((question_of(entry, rng), answer))
        if rest and rng.random() < 0.2:
            turns.append((rng.choice(ASK_MORE), shorten(rest, 450)[0]))
        while rng.random() < 0.2:
            entry = self.neighbour(entry, rng)
            phrase = rng.choice(ASK_NEXT).format(n=spelled(entry, rng))
            turns.append((phrase if rng.random() < 0.5 else question_of(entry, rng), answer_of(entry)[0]))
        return turns

    def small_talk(self, rng: random.Random) -> Turn:
        if rng.random() < 0.15:
            return rng.choice(ZEN_QUESTIONS), self.zen
        questions, answer = rng.choice(SMALL_TALK)
        return rng.choice(questions), answer

    def neighbour(self, entry: Entry, rng: random.Random) -> Entry:
        near = self.by_module[entry.module]
        return self.entries[rng.choices(near, [self.weights[i] for i in near])[0]]


Segment = tuple[str, bool]  # text, whether the model learns to produce it


def chat_segments(turns: list[Turn], rng: random.Random) -> list[Segment]:
    """ChatML as the chat template renders it. Prompts, the empty thinking block among them, are given, not learned."""
    segments: list[Segment] = []
    if rng.random() < 0.3:
        segments.append((f"<|im_start|>system\n{rng.choice(SYSTEM_TURNS)}<|im_end|>\n", False))
    for number, (question, answer) in enumerate(turns, 1):
        think = EMPTY_THINK if number == len(turns) and rng.random() < 0.5 else ""
        segments.append((f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{think}", False))
        segments.append((f"{answer}<|im_end|>", True))
        segments.append(("\n", False))
    return segments
