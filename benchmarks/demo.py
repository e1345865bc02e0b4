"""Wall time of the whole demo, from the command to the exit, and of each of its steps."""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RUNS = 3


def main() -> None:
    walls, reports = [], []
    for _ in range(RUNS):
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "r.json"
            started = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-m", "moorline.cli", "demo", "--report", str(report)], capture_output=True, check=False
            )
            walls.append(time.perf_counter() - started)
            reports.append(json.loads(report.read_text("utf-8")))
            print(f"run: exit {done.returncode}, {walls[-1]:.1f} s, ok {reports[-1]['ok']}", flush=True)
    print(
        f"demo wall time: median {statistics.median(walls):.1f} s of {RUNS} runs (min {min(walls):.1f}, max {max(walls):.1f})"
    )
    for index, step in enumerate(reports[0]["steps"]):
        times = [run["steps"][index]["ms"] for run in reports]
        print(f"  {step['id']:<10} {statistics.median(time or 0 for time in times):>7.0f} ms")
