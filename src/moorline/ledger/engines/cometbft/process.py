"""The CometBFT process of one authority: found, checked for its version, started, watched, stopped."""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import subprocess
from pathlib import Path
from typing import Final

import moorline
from moorline.children import die_with_parent
from moorline.errors import Misconfigured, Unavailable
from moorline.ledger.engines.cometbft.home import SIGNER_SOCKET
from moorline.ledger.engines.cometbft.rpc import CometRpc

OLDEST: Final = (0, 38, 25)
READY_S: Final = 60.0
STOP_S: Final = 10.0
_POLL_S: Final = 0.05
_AGAIN_S: Final = 0.3
_BUILT: Final = Path(moorline.__file__).parents[2] / ".dev" / "cometbft"
"""Where ./dev puts it, for whoever runs this from a checkout."""


def find(named: str | None = None) -> Path:
    """The cometbft to run: the one named, else the one ./dev built, else the one on the PATH; 0.38.25 or a newer 0.38.

    Raises Misconfigured("comet.not_found" | "comet.version").
    """
    built = sorted(_BUILT.glob("v0.38.*/cometbft"), key=lambda path: _numbers(path.parent.name))
    found = named or (str(built[-1]) if built else shutil.which("cometbft"))
    if found is None or shutil.which(found) is None:
        raise Misconfigured(
            "comet.not_found",
            "there is no cometbft to run",
            got=named,
            remedy="install a Go toolchain and run ./dev setup, or name the program in the settings",
        )
    said = subprocess.run([found, "version"], capture_output=True, text=True, check=False, timeout=10).stdout.strip()
    version = _numbers(said)
    if version[:2] != OLDEST[:2] or version < OLDEST:
        raise Misconfigured(
            "comet.version",
            "this cometbft is not one this engine was made for",
            expected="0.38.25 or a newer 0.38",
            got=said or "nothing",
        )
    return Path(found)


class CometProcess:
    """One running `cometbft start`."""

    def __init__(self, binary: Path, home: Path) -> None:
        self._binary, self._home = binary, home
        self._process: asyncio.subprocess.Process | None = None

    async def start(self, rpc: CometRpc) -> None:
        """Start it and wait until it answers.

        One that ends at once, as while an old one still holds its files, is tried again.
        Raises Unavailable("comet.not_ready").
        """
        deadline = asyncio.get_running_loop().time() + READY_S
        while asyncio.get_running_loop().time() < deadline:
            if self._process is None or self._process.returncode is not None:
                if self._process is not None:
                    await asyncio.sleep(_AGAIN_S)
                await self._spawn()
            with contextlib.suppress(Unavailable):
                await rpc.status()
                if self._process is not None and self._process.returncode is None:  # else another one answered
                    return
            await asyncio.sleep(_POLL_S)
        raise Unavailable(
            "comet.not_ready", "CometBFT does not come up", got=self.last_words(), remedy=f"read {self._log()}"
        )

    async def ended(self) -> int:
        """Its exit status, when it has one."""
        assert self._process is not None, "it was started"
        return await self._process.wait()

    async def stop(self) -> None:
        """SIGTERM, and SIGKILL to one that does not mind it."""
        if self._process is None or self._process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        try:
            await asyncio.wait_for(self._process.wait(), STOP_S)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()

    def last_words(self) -> str:
        """The end of its log."""
        try:
            return self._log().read_text("utf-8", errors="replace")[-400:].strip() or "it said nothing"
        except OSError:
            return "it said nothing"

    def _log(self) -> Path:
        return self._home / "cometbft.log"

    async def _spawn(self) -> None:
        # One that was killed leaves the socket on which it waited for its signer, and the next would not bind it.
        (self._home / SIGNER_SOCKET).unlink(missing_ok=True)
        with self._log().open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                str(self._binary.absolute()),
                "start",
                "--home",
                str(self._home.absolute()),
                cwd=self._home,  # its sockets are named relative to here: their paths have a short limit
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # One that outlives its application holds the files and the addresses that the next one needs.
                preexec_fn=die_with_parent,
            )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])
