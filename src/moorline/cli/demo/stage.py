"""The processes of the demo: started for real, awaited by their ready line, and gone at the end whatever happens.

Every child gets its own log file and dies with the demo (PR_SET_PDEATHSIG) unless the system is to be kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from moorline.children import die_with_parent
from moorline.errors import Misconfigured, Unavailable

READY_S: Final = 30.0
STOP_S: Final = 5.0
SOCKET_PATH_CAP: Final = 60
"""Longest state directory that still leaves room for the sockets below it (sun_path holds 108 bytes)."""


class Process:
    """One service process of the demo."""

    def __init__(self, name: str, child: subprocess.Popen[bytes], log: Path, out: Path) -> None:
        self.name, self._child, self.log, self._out = name, child, log, out
        self.ready: dict[str, str] = {}

    @property
    def address(self) -> str:
        """The address of its ready line."""
        return str(self.ready["address"])

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._child.pid

    def running(self) -> bool:
        """True while the process lives."""
        return self._child.poll() is None

    async def wait_ready(self) -> None:
        """Return when the ready line came; raises Unavailable("demo.not_ready") if it ended or took too long."""
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline:
            text = self._out.read_text("utf-8", errors="replace") if self._out.exists() else ""
            for line in text.splitlines():
                with contextlib.suppress(json.JSONDecodeError):
                    said = json.loads(line)
                    if isinstance(said, dict) and said.get("ready") is True:
                        self.ready = said
                        return
            if not self.running():
                break
            await asyncio.sleep(0.02)
        raise Unavailable(
            "demo.not_ready",
            f"{self.name} did not become ready",
            got=self.last_words(),
            remedy=f"read {self.log}",
        )

    async def wait_done(self) -> None:
        """Return when the process has ended well; raises Unavailable("demo.not_done") if it failed."""
        if await asyncio.to_thread(self._child.wait) != 0:
            raise Unavailable("demo.not_done", f"{self.name} failed", got=self.last_words(), remedy=f"read {self.log}")

    def last_words(self) -> str:
        """The end of its log, for people."""
        text = self.log.read_text("utf-8", errors="replace") if self.log.exists() else ""
        return " | ".join(text.strip().splitlines()[-3:])[-400:]

    def stop(self) -> None:
        """Ask it to stop; `reap` makes sure."""
        if self.running():
            self._child.terminate()

    def reap(self, deadline: float) -> None:
        """Wait until it is gone, with SIGKILL after the deadline."""
        try:
            self._child.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()


class Stage:
    """Where the demo happens: a directory and the processes in it."""

    def __init__(self, directory: Path, *, keep: bool) -> None:
        if len(str(directory)) > SOCKET_PATH_CAP:
            raise Misconfigured(
                "demo.directory_too_long",
                "the directory's path is too long for unix sockets below it",
                expected=f"<= {SOCKET_PATH_CAP} characters",
                got=len(str(directory)),
                remedy="choose a shorter --dir",
            )
        self.directory, self._keep = directory, keep
        self.processes: dict[str, Process] = {}
        self._clean_ups: list[Callable[[], None]] = []

    def path(self, *parts: str) -> Path:
        """A directory of the demo's state, made if it is not there (0700)."""
        path = self.directory.joinpath(*parts)
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        return path

    def spawn(self, name: str, *arguments: str, module: str = "moorline.cli") -> Process:
        """Start `moor ARGUMENTS` (or another module) as a process; its output goes to logs/NAME.out and .log."""
        logs = self.path("logs")
        out, log = logs / f"{name}.out", logs / f"{name}.log"
        with out.open("wb") as out_file, log.open("wb") as log_file:
            child = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out_file,
                stderr=log_file,
                start_new_session=True,
                preexec_fn=None if self._keep else die_with_parent,  # noqa: PLW1509 - single-threaded between fork and exec
            )
        process = Process(name, child, log, out)
        self.processes[name] = process
        return process

    async def start(self, name: str, *arguments: str) -> Process:
        """Start a process and wait until it is ready."""
        process = self.spawn(name, *arguments)
        await process.wait_ready()
        return process

    def at_end(self, action: Callable[[], None]) -> None:
        """Remember something to undo when the demo ends."""
        self._clean_ups.append(action)

    def close(self) -> None:
        """Stop everything, last started first, and wait until it is gone."""
        everybody = list(reversed(self.processes.values()))
        for process in everybody:
            process.stop()
        deadline = time.monotonic() + STOP_S
        for process in everybody:
            process.reap(deadline)
        for action in reversed(self._clean_ups):
            action()

    def dead(self) -> list[Process]:
        """Processes that ended although nobody asked them to."""
        return [process for process in self.processes.values() if process.ready and not process.running()]
