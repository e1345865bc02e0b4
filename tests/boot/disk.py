"""What a machine boots: a signed boot loader and kernel image on an EFI partition, and a root with Moorline's agent on it.

The kernel, its modules, the boot loader and the stub are Debian's own bytes; they are signed here once more, under the key
that OVMF's snakeoil variables trust. A kernel that is "changed" is the same one with another version string.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import moorline
from moorline.simulators import guest_image

REPOSITORY = Path(__file__).parents[2]
OVMF = Path("/usr/share/OVMF")
SNAKEOIL = Path("/usr/share/ovmf/PkKek-1-snakeoil.pem")
SNAKEOIL_KEY = Path("/usr/share/ovmf/PkKek-1-snakeoil.key")
SYSTEMD_BOOT = Path("/usr/lib/systemd/boot/efi")
BUSYBOX = Path("/bin/busybox")
TOOLS = ("qemu-system-x86_64", "sbsign", "objcopy", "mke2fs", "mformat", "mcopy", "mmd", "cpio", "openssl")
COMMAND_LINE = "console=ttyS0 ima_policy=tcb ima_hash=sha256 lockdown=integrity quiet loglevel=4"
AGENT = (
    "typer",
    "cryptography",
    "cbor2",
    "fastapi",
    "httpx",
    "prometheus-client",
    "pyOpenSSL",
    "structlog",
    "uvicorn",
    "tpm2-pytss",
)
LIBRARIES = Path("/usr/lib/x86_64-linux-gnu")
LOADED = ("libtss2-tcti-device.so.0",)
"""Libraries that are asked for by name at run time."""
SITE = "moor/site"
MODULES = (
    *("virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci", "virtio_blk"),
    *("failover", "net_failover", "virtio_net"),
)

INITRAMFS_INIT = f"""#!/bin/busybox sh
busybox mount -t devtmpfs dev /dev
for name in {" ".join(MODULES)}; do busybox insmod /modules/$name.ko || echo "no module $name"; done
busybox mount -t ext4 -o rw /dev/vdb /root || exec busybox poweroff -f
busybox mount --move /dev /root/dev
exec busybox switch_root /root /sbin/init
"""

INIT = f"""#!/bin/busybox sh
export PATH=/bin:/usr/bin:/sbin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t securityfs sec /sys/kernel/security
mount -t tmpfs tmp /tmp
mount -t tmpfs run /run
ip link set lo up
ip link set eth0 up
ip addr add 10.0.2.15/24 dev eth0
{guest_image.interpreter()} -I -X utf8 /moor/agent.py host run --config /moor/host.toml &
{{ stty raw -echo; echo "= 0"; while read -r line; do sh -c "$line" 2>&1; echo "= $?"; done; }} </dev/ttyS1 >/dev/ttyS1
poweroff -f
"""

START = """import sys
sys.path.append("/moor/site")
from moorline.cli import main
main()
"""


def missing() -> str | None:
    """What a machine cannot be booted without, and is not here."""
    tools = [name for name in TOOLS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    files = [str(path) for path in (OVMF / "OVMF_CODE_4M.secboot.fd", SNAKEOIL, SYSTEMD_BOOT, BUSYBOX) if not path.exists()]
    kernel = [] if kernels() else ["a Debian kernel in .dev/boot"]
    return ", ".join([*tools, *files, *kernel]) or None


def kernels() -> list[Path]:
    """The kernels `./dev test --long` unpacked, by version."""
    return sorted((REPOSITORY / ".dev" / "boot").glob("*/boot/vmlinuz-*"))


@dataclass(frozen=True)
class Workshop:
    """Makes boot media in `directory`, of the newest kernel there is."""

    directory: Path

    def __post_init__(self) -> None:
        self.directory.mkdir(exist_ok=True)
        key = (
            "openssl",
            "rsa",
            "-passin",
            "pass:snakeoil",
            "-in",
            str(SNAKEOIL_KEY),
            "-out",
            str(self.directory / "sign.key"),
        )
        _run(*key)

    @property
    def kernel(self) -> Path:
        return kernels()[-1]

    def changed_kernel(self) -> Path:
        """The same kernel, under another version string (its setup header points to it)."""
        data = bytearray(self.kernel.read_bytes())
        at = 0x200 + int.from_bytes(data[0x20E:0x210], "little")
        assert data[at : at + 4] == b"6.1."
        data[at : at + 4] = b"6.1,"
        changed = self.directory / "vmlinuz-changed"
        changed.write_bytes(data)
        return changed

    def partition(self, name: str, *, kernel: Path | None = None, command_line: str = COMMAND_LINE) -> Path:
        """An EFI partition that boots `kernel` with `command_line`: systemd-boot and a unified image."""
        image = self.directory / f"{name}.img"
        loader = self._signed(SYSTEMD_BOOT / "systemd-bootx64.efi", f"{name}-loader.efi")
        unified = self._unified(kernel or self.kernel)
        entry = self.directory / f"{name}.conf"
        entry.write_text(f"title moorline\nefi /EFI/moor/kernel.efi\noptions {command_line}\n")
        settings = self.directory / "loader.conf"
        settings.write_text("timeout 0\ndefault moor.conf\n")
        image.write_bytes(b"")
        os.truncate(image, 64 << 20)
        _run("mformat", "-i", str(image), "-F", "::")
        _run("mmd", "-i", str(image), "::/EFI", "::/EFI/BOOT", "::/EFI/moor", "::/loader", "::/loader/entries")
        for source, target in (
            (loader, "EFI/BOOT/BOOTX64.EFI"),
            (unified, "EFI/moor/kernel.efi"),
            (entry, "loader/entries/moor.conf"),
            (settings, "loader/loader.conf"),
        ):
            _run("mcopy", "-i", str(image), str(source), f"::/{target}")
        return image

    def root(self, files: dict[str, bytes]) -> Path:
        """A root file system with the interpreter, Moorline and what its agent needs; and `files` by path."""
        tree = self.directory / "root"
        shutil.rmtree(tree, ignore_errors=True)
        for path, origin in _agent():
            _copy(origin, tree / path)
        _copy(BUSYBOX, tree / "bin/busybox")
        for name in ("sh", "mount", "ip", "stty", "poweroff", "cat", "cp", "nc", "chmod", "echo", "sync"):
            (tree / "bin" / name).symlink_to("busybox")
        made = {"sbin/init": INIT.encode(), "moor/agent.py": START.encode(), **files}
        for path, content in made.items():
            target = tree / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
            target.chmod(0o700)
        for name in ("proc", "sys", "dev", "tmp", "run"):
            (tree / name).mkdir()
        image = self.directory / "root.img"
        image.unlink(missing_ok=True)
        _run("mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-d", str(tree), str(image), "400M")
        return image

    def _unified(self, kernel: Path) -> Path:
        """The signed image of `kernel`, made once: objcopy writes the time into it."""
        made, signed = self.directory / f"{kernel.name}.efi", self.directory / f"{kernel.name}-signed.efi"
        if signed.exists():
            return signed
        release = self.directory / "os-release"
        release.write_text("ID=moorline\nNAME=Moorline test host\n")
        sections = ((".osrel", release, 0x20000), (".linux", kernel, 0x2000000), (".initrd", self._initramfs(), 0x4000000))
        words = [word for section, file, at in sections for word in _section(section, file, at)]
        _run("objcopy", *words, str(SYSTEMD_BOOT / "linuxx64.efi.stub"), str(made))
        return self._signed(made, signed.name)

    def _initramfs(self) -> Path:
        tree, made = self.directory / "initramfs", self.directory / "initrd.img"
        if made.exists():
            return made
        _copy(BUSYBOX, tree / "bin/busybox")
        modules = {file.stem.replace("-", "_"): file for file in self.kernel.parents[1].rglob("*.ko")}
        for name in MODULES:
            _copy(modules[name], tree / "modules" / f"{name}.ko")
        for name in ("dev", "root"):
            (tree / name).mkdir()
        (tree / "init").write_text(INITRAMFS_INIT)
        (tree / "init").chmod(0o755)
        names = "\n".join(sorted(str(path.relative_to(tree)) for path in tree.rglob("*")))
        with made.open("wb") as output:
            subprocess.run(
                ("cpio", "-o", "-H", "newc", "--quiet"), cwd=tree, input=names.encode(), stdout=output, check=True
            )
        return made

    def _signed(self, image: Path, name: str) -> Path:
        made = self.directory / name
        _run("sbsign", "--key", str(self.directory / "sign.key"), "--cert", str(SNAKEOIL), "--output", str(made), str(image))
        return made


def _agent() -> list[tuple[str, Path]]:
    """Files of the agent: standard library, interpreter, packages and their libraries, with the bytecode beside them."""
    standard = Path(os.__file__).resolve().parent
    files = [(str(path).lstrip("/"), path) for path in _below(standard, {"test", "idlelib", "lib2to3", "ensurepip"})]
    own = Path(moorline.__file__).parent
    files += [(f"{SITE}/moorline/{path.relative_to(own)}", path) for path in _below(own, set())]
    files += [(f"{SITE}/{name}", path) for name, path in _packages()]
    binaries = [path for _, path in files if path.suffix == ".so" or ".so." in path.name]
    binaries += [Path(guest_image.interpreter()), *(path for name in LOADED if (path := LIBRARIES / name).exists())]
    loaded = {*binaries[-len(LOADED) - 1 :], *guest_image.libraries(tuple(sorted(binaries)))}
    return files + [(str(path).lstrip("/"), path) for path in sorted(loaded)]


def _packages() -> list[tuple[str, Path]]:
    found: list[tuple[str, Path]] = []
    for name in guest_image.closure(AGENT):
        for entry in importlib.metadata.files(name) or ():
            path = Path(str(entry.locate()))
            compiled = path.parent / "__pycache__" / f"{path.stem}.{sys.implementation.cache_tag}.pyc"
            if ".." not in entry.parts and path.is_file():
                found.append((str(entry), path))
            if ".." not in entry.parts and compiled.is_file() and path.suffix == ".py":
                found.append((f"{entry.parent}/__pycache__/{compiled.name}", compiled))
    return found


def _below(directory: Path, left_out: set[str]) -> list[Path]:
    found: list[Path] = []
    for parent, children, names in os.walk(directory):
        children[:] = [child for child in children if child not in left_out]
        found += [Path(parent, name) for name in names]
    return found


def _copy(origin: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(origin, target)


def _section(name: str, file: Path, at: int) -> tuple[str, ...]:
    return ("--add-section", f"{name}={file}", "--change-section-vma", f"{name}={at:#x}")


def _run(*words: str) -> None:
    done = subprocess.run(
        words, capture_output=True, check=False, env={**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin"}
    )
    assert done.returncode == 0, (words, done.stderr)
