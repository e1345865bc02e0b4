"""What the fleet benchmark measures of processes, and how it prints what it found."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

HZ = os.sysconf("SC_CLK_TCK")


def row(what: str, figure: str, more: str) -> None:
    print(f"{what:<52}{figure:>12}   {more}", flush=True)


def spread(what: str, took: list[float]) -> None:
    if took:
        ordered = sorted(took)
        worst = f"p99 {share(ordered, 0.99) * 1000:.0f} ms, longest {ordered[-1]:.2f} s, of {len(ordered)}"
        row(what, f"{statistics.median(ordered) * 1000:.0f} ms", worst)


def share(ordered: list[float], part: float) -> float:
    return ordered[int(len(ordered) * part)] if ordered else 0.0


def usage(pids: Iterable[int]) -> tuple[float, int]:
    """CPU seconds and resident bytes of processes together."""
    cpu, memory = 0.0, 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        cpu += (int(fields[11]) + int(fields[12])) / HZ
        memory += int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
    return cpu, memory


def below(pid: int, name: str) -> list[int]:
    """Processes of this name that were started below a process."""
    parents: dict[int, tuple[int, str]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                text = (entry / "stat").read_text()
            except OSError:
                continue  # it ended meanwhile
            command = text[text.index("(") + 1 : text.rindex(")")]
            parents[int(entry.name)] = int(text.rpartition(")")[2].split()[1]), command
    mine = {pid}
    for _ in range(4):  # a wrapper or two between
        mine |= {one for one, (parent, _) in parents.items() if parent in mine}
    return [one for one in mine if one in parents and parents[one][1] == name]


@dataclass
class Seen:
    """What became of polls; `drifted`, `told` and `heard` are times, by host: of a drift, its verdict and its event."""

    took: list[float] = field(default_factory=list)
    missed: int = 0
    failed: int = 0
    why: dict[str, int] = field(default_factory=dict)
    drifted: dict[str, float] = field(default_factory=dict)
    sent: dict[str, float] = field(default_factory=dict)
    told: dict[str, float] = field(default_factory=dict)
    heard: dict[str, float] = field(default_factory=dict)

    def fail(self, error: Exception) -> None:
        self.failed += 1
        self.why[str(error)[:80]] = self.why.get(str(error)[:80], 0) + 1


@dataclass
class Slices:
    """What grows while a fleet runs: one line a slice of the time, from what was seen since the last."""

    seen: Seen
    pids: list[int]
    directory: Path
    _polls: int = 0
    _missed: int = 0
    _cpu: float = 0.0

    def begin(self) -> None:
        self._cpu = usage(self.pids)[0]
        print(
            f"    {'from - to s':>12}{'verdicts':>10}{'late':>7}{'p50 ms':>8}{'p99 ms':>8}{'cores':>7}{'MiB':>7}{'files MiB':>11}",
            flush=True,
        )

    def line(self, since: float, until: float) -> None:
        took = sorted(self.seen.took[self._polls :])
        cpu, memory = usage(self.pids)
        files = sum(path.stat().st_size for path in self.directory.glob("verifier.db*"))
        cores = (cpu - self._cpu) / (until - since)
        print(
            f"    {since:>6.0f} -{until:>4.0f}{len(took):>10}{self.seen.missed - self._missed:>7}{share(took, 0.5) * 1000:>8.0f}"
            f"{share(took, 0.99) * 1000:>8.0f}{cores:>7.2f}{memory / 2**20:>7.0f}{files / 2**20:>11.0f}",
            flush=True,
        )
        self._polls, self._missed, self._cpu = len(self.seen.took), self.seen.missed, cpu


@dataclass(frozen=True)
class Growth:
    """One fleet of several that grow."""

    hosts: int
    settled_s: float
    verdicts: int
    late: int
    each_ms: float
    cores: float
    p50_ms: float
    p99_ms: float
    kib: float


def table(grown: list[Growth]) -> None:
    print(
        f"\n{'hosts':>8}{'cold start s':>14}{'verdicts':>10}{'late':>6}{'ms CPU each':>13}{'cores':>7}{'p50 ms':>8}{'p99 ms':>8}{'KiB a host':>12}"
    )
    for one in grown:
        print(
            f"{one.hosts:>8}{one.settled_s:>14.1f}{one.verdicts:>10}{one.late:>6}{one.each_ms:>13.2f}{one.cores:>7.2f}"
            f"{one.p50_ms:>8.0f}{one.p99_ms:>8.0f}{one.kib:>12.0f}"
        )
