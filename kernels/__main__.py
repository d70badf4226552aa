"""``python -m hmad_kernels`` compiles every kernel into numba's cache, so that no daemon compiles while it serves."""

import importlib
import pkgutil
import time
from pathlib import Path

HERE = Path(__file__).parent


def forget_stale_code() -> None:
    """Empty the cache if any source is newer: numba does not see that a helper in another file changed."""
    newest_source = max(path.stat().st_mtime for path in HERE.glob("*.py"))
    cached = [path for pattern in ("*.nbi", "*.nbc") for path in (HERE / "__pycache__").glob(pattern)]
    if any(path.stat().st_mtime < newest_source for path in cached):
        for path in cached:
            path.unlink(missing_ok=True)


def main() -> None:
    """Warm up every module of the package that has kernels to compile."""
    forget_stale_code()
    for info in pkgutil.iter_modules([str(HERE)]):
        if not info.name.startswith("cpu_"):
            continue
        warm_up = getattr(importlib.import_module(f"hmad_kernels.{info.name}"), "warm_up", None)
        if warm_up is not None:
            begin_s = time.perf_counter()
            warm_up()
            print(f"{info.name}: compiled in {time.perf_counter() - begin_s:.1f} s", flush=True)


if __name__ == "__main__":
    main()
