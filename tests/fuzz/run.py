"""Coverage-guided fuzzing of one parser: ./dev fuzz FORMAT SECONDS. Ends with the number of executions; a crash is kept."""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import atheris

with atheris.instrument_imports(include=["moorline"]):
    from formats import FORMATS

    from moorline.errors import Malformed


VECTORS = Path(__file__).parents[3] / "shared" / "vectors"
CORPORA = Path(__file__).parents[2] / ".dev" / "fuzz"
MAX_BYTES = 16 * 1024
MOST_SEEDS = 40


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

    corpus = CORPORA / name  # kept from run to run: each goes on where the last one ended
    corpus.mkdir(parents=True, exist_ok=True)
    print(f"{name}: {seeds(parse, corpus)} real examples to start from", flush=True)
    options = [f"-max_total_time={seconds}", f"-max_len={MAX_BYTES}", "-print_final_stats=1", "-verbosity=0"]
    atheris.Setup([sys.argv[0], *options, f"-artifact_prefix={corpus}-crash-", str(corpus)], one)
    atheris.Fuzz()
    return 0


def seeds(parse, corpus: Path) -> int:
    """Copy the shared vectors that this parser takes, a few dozen at most; without them the fuzzer starts from nothing."""
    found = 0
    for path in sorted(VECTORS.rglob("*")):
        if found == MOST_SEEDS or not path.is_file() or path.stat().st_size > MAX_BYTES:
            continue
        data = path.read_bytes()
        try:
            parse(data)
        except Malformed:
            continue
        (corpus / f"vector-{found}").write_bytes(data)
        found += 1
    return found


if __name__ == "__main__":
    sys.exit(main())
