"""Debian packages are read without being hurt: real ones by dpkg-deb, and everything dpkg-deb would never make.

verifies that: digests are those of the installed files; path tricks, bombs and cut archives are Malformed.
"""

import gzip
import hashlib
import lzma
import shutil
import subprocess
import tarfile
import tracemalloc

import debs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moorline.attesters.debian import unzstd
from moorline.errors import Malformed
from moorline.evidence import debian
from moorline.evidence.debian import also_at, parse_deb

FILES = {
    "/usr/bin/tool": b"#!/bin/sh\necho tool\n",
    "/bin/other": b"\x7fELF" + bytes(100_000),
    "/etc/tool.conf": b"",
    "/usr/share/doc/tool/a name with spaces, ü and a very long tail " + "x" * 120: b"text",
    "/usr/bin/alias": "-> tool",
    "/usr/bin/twin": "== /usr/bin/tool",
}


@pytest.mark.parametrize("compression", ["xz", "gzip", "none", "zstd"])
def test_a_real_package_hashes_to_what_it_installs(tmp_path, compression):
    if compression == "zstd" and shutil.which("zstd") is None:
        pytest.skip("zstd is not installed")
    path = debs.built(tmp_path, FILES, compression=compression)
    package = parse_deb(path.read_bytes(), unzstd=unzstd)
    assert package.identity == "tool_1.0-1_amd64"
    assert package.sha256 == hashlib.sha256(path.read_bytes()).digest()
    installed = tmp_path / "installed"
    subprocess.run(["dpkg-deb", "-x", str(path), str(installed)], check=True)
    expected = {
        "/" + str(one.relative_to(installed)): hashlib.sha256(one.read_bytes()).digest()
        for one in installed.rglob("*")
        if one.is_file() and not one.is_symlink()
    }
    assert {name: file.digest for name, file in package.files.items()} == expected
    assert {name for name, file in package.files.items() if file.executable} == {
        "/usr/bin/tool",
        "/usr/bin/twin",
        "/bin/other",
    }


@pytest.mark.parametrize("algorithm", debian.HASHES)
def test_the_hash_is_the_one_that_ima_measures_with(tmp_path, algorithm):
    package = parse_deb(debs.built(tmp_path, FILES).read_bytes(), algorithm=algorithm)
    assert package.files["/usr/bin/tool"].digest == hashlib.new(algorithm, FILES["/usr/bin/tool"]).digest()


def test_another_hash_is_refused(tmp_path):
    with pytest.raises(Malformed) as refused:
        parse_deb(debs.built(tmp_path, FILES).read_bytes(), algorithm="md5")
    assert refused.value.code == "deb.algorithm"


def test_a_path_on_a_merged_usr_is_listed_where_ima_sees_it():
    assert also_at("/bin/ls") == ("/bin/ls", "/usr/bin/ls")
    assert also_at("/lib64/ld.so") == ("/lib64/ld.so", "/usr/lib64/ld.so")
    assert also_at("/usr/bin/ls") == ("/usr/bin/ls",)
    assert also_at("/library/x") == ("/library/x",)


TEXT = debs.CONTROL.format(name="a", version="1").encode()


def reg(name):
    return name, b"x"


HOSTILE = {
    "up": (debs.deb(debs.tar(reg("./../etc/passwd"))), "deb.path"),
    "up inside": (debs.deb(debs.tar(reg("./usr/../../x"))), "deb.path"),
    "absolute": (debs.deb(debs.tar((debs.entry("//etc/passwd", tarfile.REGTYPE), b"x"))), "deb.path"),
    "twice": (debs.deb(debs.tar(reg("./usr/x"), reg("./usr/x"))), "deb.path"),
    "twice by another name": (debs.deb(debs.tar(reg("./usr/x"), reg("usr/x"))), "deb.path"),
    "dot inside": (debs.deb(debs.tar(reg("./usr/./x"))), "deb.path"),
    "link to nothing": (debs.deb(debs.tar((debs.entry("./a", tarfile.LNKTYPE, "./b"), b""))), "deb.link"),
    "link outside": (debs.deb(debs.tar((debs.entry("./a", tarfile.LNKTYPE, "../../b"), b""))), "deb.path"),
    "device with contents": (debs.deb(debs.tar((debs.entry("./a", tarfile.BLKTYPE, size=512), bytes(512)))), "deb.entry"),
    "odd kind": (debs.deb(debs.tar((debs.entry("./a", b"S"), b""))), "deb.entry"),
    "no end": (debs.deb(debs.tar(reg("./a"))[:1024]), "deb.truncated"),
    "cut in a file": (debs.deb(debs.tar(("./a", bytes(4096)))[:2048]), "deb.truncated"),
    "empty data": (debs.deb(b""), "deb.truncated"),
    "no control file": (debs.deb(debs.tar(), inner=debs.tar(reg("./other"))), "deb.control"),
    "control says nothing": (debs.deb(debs.tar(), inner=debs.tar(("./control", b"Package: a\n"))), "deb.control"),
    "control says it twice": (
        debs.deb(debs.tar(), inner=debs.tar(("./control", TEXT + b"Version: 2\n"))),
        "deb.control",
    ),
    "control with a path": (
        debs.deb(debs.tar(), inner=debs.tar(("./control", debs.CONTROL.format(name="../a", version="1").encode()))),
        "deb.control",
    ),
    "huge control": (debs.deb(debs.tar(), inner=debs.tar(("./control", bytes(2 << 20)))), "deb.control"),
    "another version": (debs.deb(debs.tar(), binary=b"3.0\n"), "deb.members"),
    "not ar": (b"PK\x03\x04", "deb.archive"),
    "nothing": (b"", "deb.archive"),
    "no members": (b"!<arch>\n", "deb.members"),
    "a member too many": (debs.deb(debs.tar()) + debs.ar(("extra.tar", b""))[8:], "deb.members"),
    "behind the gz": (
        debs.whole("data.tar.gz", gzip.compress(debs.tar()) + b"xx"),
        "deb.trailing",
    ),
    "behind the xz": (
        debs.whole("data.tar.xz", lzma.compress(debs.tar()) + b"xxxx"),
        "deb.trailing",
    ),
    "cut gz": (
        debs.whole("data.tar.gz", gzip.compress(debs.tar(("./a", bytes(9999))))[:-12]),
        "deb.truncated",
    ),
    "no gz": (
        debs.whole("data.tar.gz", b"nothing of the kind"),
        "deb.compression",
    ),
    "odd compression": (
        debs.whole("data.tar.lz4", b""),
        "deb.members",
    ),
    "zst without a program": (
        debs.whole("data.tar.zst", b"\x28\xb5\x2f\xfd"),
        "deb.compression",
    ),
    "long name": (debs.deb(debs.tar(reg("./" + "a" * 20000))), "deb.path"),
    "size that is none": (b"!<arch>\n" + b"debian-binary".ljust(48) + b"-4".ljust(10) + b"`\n2.0\n", "deb.archive"),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_what_dpkg_deb_would_never_make(name):
    data, code = HOSTILE[name]
    with pytest.raises(Malformed) as refused:
        parse_deb(data)
    assert refused.value.code == code, str(refused.value)


def test_the_good_twin_of_the_hand_made_ones_is_read():
    for kind in ("", ".gz", ".xz"):
        package = parse_deb(debs.deb(debs.tar(reg("./usr/bin/x")), kind=kind))
        assert list(package.files) == ["/usr/bin/x"]


def test_pax_names_are_read_and_other_pax_tricks_refused():
    import io

    def made(records):
        target = io.BytesIO()
        with tarfile.open(fileobj=target, mode="w", format=tarfile.PAX_FORMAT) as archive:
            info = tarfile.TarInfo("./short")
            info.size, info.pax_headers = 1, records
            archive.addfile(info, io.BytesIO(b"x"))
        return debs.deb(target.getvalue())

    assert list(parse_deb(made({"path": "./usr/" + "ü" * 90})).files) == ["/usr/" + "ü" * 90]
    for records, code in (({"path": "../x"}, "deb.path"), ({"GNU.sparse.major": "1"}, "deb.entry")):
        with pytest.raises(Malformed) as refused:
            parse_deb(made(records))
        assert refused.value.code == code


def test_a_bomb_is_found_before_it_fills_memory(monkeypatch):
    """200 MB of zeros in 200 kB: refused by its ratio, with no more than a few megabytes held."""
    monkeypatch.setattr(debian, "_RATIO_FROM", 8 << 20)
    packed = lzma.compress(debs.tar(("./zeros", bytes(100 << 20))))
    data = debs.whole("data.tar.xz", packed)
    tracemalloc.start()
    with pytest.raises(Malformed) as refused:
        parse_deb(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert refused.value.code == "deb.bomb"
    assert peak < 32 << 20


def test_a_bomb_in_zst_is_stopped_too(monkeypatch):
    if shutil.which("zstd") is None:
        pytest.skip("zstd is not installed")
    monkeypatch.setattr(debian, "_RATIO_FROM", 8 << 20)
    packed = subprocess.run(
        ["zstd", "-qc"], input=debs.tar(("./zeros", bytes(50 << 20))), stdout=subprocess.PIPE, check=True
    ).stdout
    data = debs.whole("data.tar.zst", packed)
    with pytest.raises(Malformed) as refused:
        parse_deb(data, unzstd=unzstd)
    assert refused.value.code == "deb.bomb"
    broken = debs.whole("data.tar.zst", packed[:50])
    with pytest.raises(Malformed):
        parse_deb(broken, unzstd=unzstd)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=400))
def test_any_bytes_are_a_package_or_malformed(data):
    for whole in (data, b"!<arch>\n" + data, debs.deb(data), debs.deb(debs.tar(), inner=data)):
        with pytest.raises(Malformed):
            parse_deb(whole)


SMALL = debs.deb(debs.tar(("./usr/bin/x", b"contents"), ("./usr/bin/y", b"")))


@settings(max_examples=250, deadline=None)
@given(st.integers(0, len(SMALL) * 8 - 1))
def test_a_flipped_bit_gives_another_package_or_none(bit):
    changed = bytearray(SMALL)
    changed[bit // 8] ^= 1 << bit % 8
    try:
        package = parse_deb(bytes(changed))
    except Malformed:
        return
    assert package.sha256 != hashlib.sha256(SMALL).digest()
