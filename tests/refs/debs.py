"""Real packages by dpkg-deb, and hand-made archives for what dpkg-deb would never make."""

import gzip
import io
import lzma
import subprocess
import tarfile
from pathlib import Path

CONTROL = "Package: {name}\nVersion: {version}\nArchitecture: amd64\nMaintainer: T <t@example.org>\nDescription: test\n"


def built(folder: Path, files, *, name="tool", version="1.0-1", compression="xz") -> Path:
    """A .deb as dpkg-deb makes it; `files` maps a path to bytes, or to `-> target` for a link."""
    tree = folder / f"{name}-{version}-{compression}"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN" / "control").write_text(CONTROL.format(name=name, version=version))
    for path, content in files.items():
        at = tree / path.lstrip("/")
        at.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str) and content.startswith("-> "):
            at.symlink_to(content[3:])
        elif isinstance(content, str) and content.startswith("== "):
            at.hardlink_to(tree / content[3:].lstrip("/"))
        else:
            at.write_bytes(content)
            at.chmod(0o755 if "/bin/" in path else 0o644)
    out = folder / f"{name}_{version}_{compression}.deb"
    command = ["dpkg-deb", "--root-owner-group", f"-Z{compression}", "--build", str(tree), str(out)]
    subprocess.run(command, check=True, capture_output=True)
    return out


def ar(*members) -> bytes:
    out = b"!<arch>\n"
    for name, body in members:
        out += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(body):<10}`\n".encode() + body + b"\n" * (len(body) & 1)
    return out


def tar(*entries) -> bytes:
    """Entries are (name, content) or a TarInfo with its content."""
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for what, content in entries:
            info = tarfile.TarInfo(what) if isinstance(what, str) else what
            if info.isreg():
                info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return target.getvalue()


def control(name="tool", version="1.0-1") -> bytes:
    return tar(("./control", CONTROL.format(name=name, version=version).encode()))


def whole(name, packed) -> bytes:
    """A package whose data member is exactly these bytes."""
    return ar(("debian-binary", b"2.0\n"), ("control.tar", control()), (name, packed))


def deb(data: bytes, *, inner=None, kind="", binary=b"2.0\n") -> bytes:
    pack = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}[kind]
    return ar(
        ("debian-binary", binary), ("control.tar", control() if inner is None else inner), (f"data.tar{kind}", pack(data))
    )


def entry(name, kind, target="", size=0):
    info = tarfile.TarInfo(name)
    info.type = kind
    info.linkname = target
    info.size = size
    return info
