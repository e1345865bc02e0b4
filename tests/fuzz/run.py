"""Coverage-guided fuzzing of one parser: ./dev fuzz FORMAT SECONDS. Ends with the number of executions; a crash is kept."""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import atheris

with atheris.instrument_imports(include=["moorline"]):
    from formats import FORMATS

    from moorline.errors import Malformed


def main() -> int:
    if len(sys.argv) != 3 or sys.argv[1] not in FORMATS or not sys.argv[2].isdigit():
        print(f"usage: ./dev fuzz FORMAT SECONDS\nformats: {', '.join(FORMATS)}", file=sys.stderr)
        return 64
    name, seconds = sys.argv[1], int(sys.argv[2])
    parse, executions, started = FORMATS[name], 0, time.monotonic()

    def one(data: bytes) -> None:
        nonlocal executions
        executions += 1
        try:
            parse(data)
        except Malformed:
            return
        finally:
            if executions % 50_000 == 0:
                print(f"{name}: {executions} executions in {time.monotonic() - started:.0f} s", flush=True)

    atheris.Setup([sys.argv[0], f"-max_total_time={seconds}", "-max_len=8192", "-print_final_stats=1", "-verbosity=0"], one)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
