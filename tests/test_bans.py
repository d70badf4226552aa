"""What no source file may contain: code that runs what it reads, and checks that vanish with ``python -O``."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*(ROOT / "hmad").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])

RUN_WHAT_THEY_READ = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "code", "codeop"}
CALLS = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen"),
    *("builtins.eval", "builtins.exec", "torch.load", "torch.jit.load", "yaml.load", "np.load", "numpy.load"),
}
# What the compiler of the kernels needs to read its cache is not ours to ban: numba.


def banned(source: str) -> Iterator[str]:
    """What a file contains and should not, and where."""
    for node in ast.walk(ast.parse(source)):
        for what in banned_in(node):
            yield f"line {getattr(node, 'lineno', 0)}: {what}"


def banned_in(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name.partition(".")[0] in RUN_WHAT_THEY_READ)
    elif isinstance(node, ast.ImportFrom):
        names = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (name for name in names if name.partition(".")[0] in RUN_WHAT_THEY_READ or name in CALLS)
    elif isinstance(node, ast.Call) and ast.unparse(node.func) in CALLS:
        yield ast.unparse(node.func)
    elif isinstance(node, ast.Call) and any(is_true(k) for k in node.keywords if k.arg == "shell"):
        yield "shell=True"
    elif isinstance(
        node, ast.Assert
    ):  # also where it guards an invariant: then an error of ours says so, even under -O
        yield f"assert {ast.unparse(node.test)}"


def is_true(keyword: ast.keyword) -> bool:
    return not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_banned_is_in(path: Path) -> None:
    assert list(banned(path.read_text())) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "import pickle as innocent",
        "def f():\n    from marshal import loads",
        "import shelve, os",
        "eval('1')",
        "x = torch.load(path, weights_only=True)",
        "f(exec(s))",
        "from torch import load",
        "subprocess.run(line, shell=True)",
        "import builtins\nbuiltins.eval('1')",
        "assert size > 0, 'a peer could send this'",
    ],
)
def test_the_ban_finds(line: str) -> None:
    assert list(banned(line))


def test_the_ban_lets_pass() -> None:
    assert list(banned("import re\nre.compile('x')\nsubprocess.run(['a'], shell=False)\njson.load(file)")) == []
