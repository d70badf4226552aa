"""Who may import whom, read off the sources: a layer sees only those below it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ("facts", "wire", "compute", "transport", "roles", "edges")  # lowest first
TOO_HEAVY = {
    "facts": {"asyncio", "torch", "numpy", "msgspec", "aiohttp", "uvloop"},
    "wire": {"asyncio", "torch", "numpy", "socket", "aiohttp", "uvloop"},
    "compute": {"asyncio", "aiohttp", "uvloop"},
    "kernels": {"hmad", "asyncio", "aiohttp", "uvloop"},
}


def layer_of(path: Path) -> str:
    """``hmad/wire/frames.py`` is of wire, ``kernels/x.py`` of kernels, ``hmad/__main__.py`` of the topmost layer."""
    parts = path.relative_to(ROOT).parts
    if parts[0] == "kernels":
        return "kernels"
    return parts[1] if len(parts) > 2 else "edges"


def imports_of(source: str) -> Iterator[str]:
    """Dotted names of all imports, wherever they stand; ``from a import b`` counts as a.b, which may be a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)


def import_mistakes(layer: str, source: str) -> list[str]:
    """What a module of this layer imports and should not."""
    return [name for name in imports_of(source) if not may_import(layer, name)]


def may_import(layer: str, name: str) -> bool:
    top, _, rest = name.partition(".")
    if top in TOO_HEAVY.get(layer, set()) or name.startswith("."):
        return False
    target = rest.partition(".")[0]
    return top != "hmad" or target not in LAYERS or LAYERS.index(target) <= LAYERS.index(layer)


SOURCES = sorted([*(ROOT / "hmad").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_import_only_downward(path: Path) -> None:
    assert import_mistakes(layer_of(path), path.read_text()) == []


def test_every_folder_is_a_known_layer() -> None:
    assert {layer_of(path) for path in SOURCES if path.name != "__init__.py"} <= {*LAYERS, "kernels"}
    assert {layer_of(path) for path in SOURCES} >= {*LAYERS, "kernels"}


@pytest.mark.parametrize(
    ("layer", "line"),
    [
        ("facts", "import hmad.wire"),
        ("wire", "from hmad import compute"),
        ("wire", "def f():\n    import asyncio"),
        ("wire", "from torch.nn import Linear"),
        ("compute", "from hmad.transport.rate import Rate"),
        ("compute", "import asyncio.events"),
        ("roles", "from hmad.edges.cli import main"),
        ("roles", "from ..edges import cli"),
        ("kernels", "import hmad.facts"),
    ],
)
def test_the_check_itself_finds(layer: str, line: str) -> None:
    assert import_mistakes(layer, line)


def test_downward_imports_are_fine() -> None:
    assert import_mistakes("edges", "from hmad.facts import config\nimport torch\nimport hmad_kernels") == []


def test_the_command_line_starts_without_torch() -> None:
    """--help and check-config answer at once only as long as nothing they import pulls torch in."""
    reached, todo = set(), ["hmad.edges.cli"]
    while todo:
        name = todo.pop()
        path = ROOT / (name.replace(".", "/") + ".py")
        if name in reached or not path.is_file():
            continue
        reached.add(name)
        top_level = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        found = list(imports_of("\n".join(map(ast.unparse, top_level))))
        assert not [name for name in found if name.partition(".")[0] in ("torch", "numba", "aiohttp")]
        todo += [name.rpartition(".")[0] for name in found] + found
    assert "hmad.facts.config" in reached
