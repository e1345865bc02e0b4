"""A machine: QEMU (TCG) with OVMF, its TPM (swtpm), its disks, and a line to the shell that runs in it."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from disk import OVMF

from moorline.simulators.tpm import SimulatedTpm

BOOT_S = 240
"""How long a boot may take on a machine that does other things; it takes 12 s on an idle one."""


@dataclass
class Machine:
    """One machine in `directory`. `tpm` keeps its keys from boot to boot, as the chip on a board does."""

    directory: Path
    tpm: SimulatedTpm

    async def boot(self, partition: Path, root: Path, *, secure_boot: bool = True) -> Running:
        """Power on: firmware, boot loader, kernel, agent."""
        variables = self.directory / "variables.fd"
        shutil.copyfile(OVMF / ("OVMF_VARS_4M.snakeoil.fd" if secure_boot else "OVMF_VARS_4M.fd"), variables)
        socket, shell = self.directory / "t", self.directory / "s"
        for left in (socket, shell):
            left.unlink(missing_ok=True)
        console = (self.directory / "console.log").open("ab")
        chip = subprocess.Popen(  # noqa: ASYNC220 - at once
            (
                *("swtpm", "socket", "--tpm2", "--terminate", "--tpmstate", f"dir={self.tpm.directory / 'state'}"),
                *("--ctrl", f"type=unixio,path={socket}", "--log", f"file={self.directory / 'swtpm.log'}"),
            )
        )
        while not socket.exists():
            assert chip.poll() is None
            await asyncio.sleep(0.05)
        words = (
            *(
                "qemu-system-x86_64",
                "-M",
                "q35,smm=on,accel=tcg",
                "-cpu",
                "max",
                "-m",
                "1024",
                "-display",
                "none",
                "-no-reboot",
            ),
            *("-global", "driver=cfi.pflash01,property=secure,value=on", "-global", "ICH9-LPC.disable_s3=1"),
            *("-drive", f"if=pflash,unit=0,format=raw,readonly=on,file={OVMF / 'OVMF_CODE_4M.secboot.fd'}"),
            *("-drive", f"if=pflash,unit=1,format=raw,file={variables}"),
            *("-chardev", f"socket,id=tpm,path={socket}", "-tpmdev", "emulator,id=tpm0,chardev=tpm"),
            *("-device", "tpm-crb,tpmdev=tpm0"),
            *("-drive", f"if=none,id=esp,format=raw,readonly=on,file={partition}"),
            *("-device", "virtio-blk-pci,drive=esp,bootindex=0"),
            *("-drive", f"if=none,id=root,format=raw,snapshot=on,file={root}", "-device", "virtio-blk-pci,drive=root"),
            *("-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile="),
            *("-chardev", "stdio,id=console", "-serial", "chardev:console"),
            *("-chardev", f"socket,id=shell,path={shell},server=on,wait=off", "-serial", "chardev:shell"),
        )
        process = subprocess.Popen(  # noqa: ASYNC220 - as above
            words, stdin=subprocess.DEVNULL, stdout=console, stderr=console
        )
        console.close()
        while not shell.exists():  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.05)
        return Running(process, chip, await asyncio.open_unix_connection(str(shell), limit=1 << 24))


@dataclass
class Running:
    """A machine that is on."""

    process: subprocess.Popen[bytes]
    chip: subprocess.Popen[bytes]
    line: tuple[asyncio.StreamReader, asyncio.StreamWriter]
    """Its shell, which says that it is there when the machine has come so far."""
    up: bool = False

    async def say(self, command: str) -> str:
        """What `command` prints in the machine. Asserts that it succeeds."""
        await self.ready()
        self.line[1].write(command.encode() + b"\n")
        return await self._answer(command)

    async def ready(self) -> None:
        """Return when the shell is there."""
        if not self.up:
            await self._answer("boot")
            self.up = True

    async def _answer(self, command: str) -> str:
        said = bytearray()
        while True:
            line = await asyncio.wait_for(self.line[0].readline(), BOOT_S)
            assert line, "the machine went off"
            if line.startswith(b"= "):
                assert line.strip() == b"= 0", (command, bytes(said))
                return said.decode("utf-8", "replace")
            said += line

    async def off(self) -> None:
        """Shut down as a kernel does, which also shuts down the TPM: swtpm's clock goes back otherwise."""
        if self.process.poll() is None:
            with contextlib.suppress(AssertionError, TimeoutError, OSError):
                await self.ready()
            self.line[1].write(b"poweroff -f\n")
            for _ in range(100):
                if self.process.poll() is not None:
                    break
                await asyncio.sleep(0.2)
        self.line[1].close()
        self.process.kill()
        self.process.wait()
        self.chip.terminate()
        self.chip.wait()
