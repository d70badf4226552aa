"""What both HTML pages share: one self-contained document, no script, no network, in light and in dark."""

from collections.abc import Sequence
from html import escape

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --dim: #667; --paper: #fff; --panel: #f4f5f8; --line: #d5d8df;
  --compute: #3b6fd4; --compute2: #6d97e8; --wire: #2e9e6b; --wire2: #62c094; --exposed: #d3482f; --token: #b07a13; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ec; --dim: #9aa2b1; --paper: #14171c; --panel: #1d2128;
  --line: #343a45; } }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
  max-width: 1100px; padding: 24px; }
h1 { font-size: 20px; margin: 0 0 4px; } h2 { font-size: 16px; margin: 28px 0 8px; }
p.sub { color: var(--dim); margin: 0 0 18px; overflow-wrap: anywhere; }
.tiles { display: flex; flex-wrap: wrap; gap: 10px; }
.tile { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: 8px 14px;
  min-width: 110px; }
.tile b { display: block; font-size: 20px; } .tile span { color: var(--dim); font-size: 13px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; } th, td { text-align: right;
  padding: 3px 12px 3px 0; border-bottom: 1px solid var(--line); } th:first-child, td:first-child { text-align: left; }
th { color: var(--dim); font-weight: 500; } td { overflow-wrap: anywhere; }
svg { width: 100%; height: auto; background: var(--panel); border: 1px solid var(--line); border-radius: 8px; }
svg text { fill: var(--dim); font-size: 12px; } summary { cursor: pointer; color: var(--dim); margin-top: 18px; }
.bad { color: var(--exposed); } .meter { background: var(--panel); border: 1px solid var(--line); height: 14px;
  border-radius: 7px; overflow: hidden; max-width: 480px; }
.meter i { display: block; height: 100%; background: var(--wire); }
"""

NOTHING = "-"


def document(title: str, body: str, refresh_s: int | None = None) -> str:
    """A whole page. ``body`` is HTML in which everything from outside is escaped."""
    refresh = f'<meta http-equiv="refresh" content="{refresh_s}">' if refresh_s else ""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">{refresh}'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>{body}</body></html>\n"
    )


def tiles(*pairs: tuple[str, str]) -> str:
    """Big figures, each over its name."""
    each = (f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for name, value in pairs)
    return f'<div class="tiles">{"".join(each)}</div>'


def table(header: tuple[str, ...], rows: Sequence[tuple[object, ...]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    lines = ("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def millis(seconds: float | None) -> str:
    return NOTHING if seconds is None else f"{1e3 * seconds:.1f} ms"


def size(num_bytes: float) -> str:
    """Bytes as people read them, in binary multiples."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024 or unit == "GiB":
            break
        num_bytes /= 1024
    return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
