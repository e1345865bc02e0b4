"""Run the benchmarks: every number against the physical limit, in one process and one run.

    ./dev bench            all of them
    ./dev bench snp        one of them

Each module in this folder has `main() -> list[Row]`-like rows printed here as a table. Nothing here asserts a time.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

HERE = Path(__file__).parent


def names() -> list[str]:
    return sorted(path.stem for path in HERE.glob("*.py") if path.stem not in ("run", "measure"))


def run(name: str) -> None:
    print(f"\n== {name}", flush=True)
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(HERE))
    sys.modules[module.__name__] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    module.main()


def main() -> int:
    wanted = sys.argv[1:] or names()
    unknown = sorted(set(wanted) - set(names()))
    if unknown:
        print(f"no such benchmark: {', '.join(unknown)}; there are: {', '.join(names())}", file=sys.stderr)
        return 64
    for name in wanted:
        run(name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
