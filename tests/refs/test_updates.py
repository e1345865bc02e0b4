"""Old, then old and new, then new: a package update raises no false alarm, and a downgrade is caught.

verifies that: by the appraisal of hosts (IMA entries against what is in force), and by the command line from real packages.
"""

import hashlib
import json
import os
import subprocess
import sys
from itertools import pairwise

import debs
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from moorline.errors import Malformed, NotAuthentic, Refused
from moorline.evidence import debian_index
from moorline.evidence.debian import parse_deb
from moorline.evidence.ima import ImaEntry
from moorline.policy import file_releases, reference_sets, reference_text, reference_values
from moorline.policy.host import NO_FILES, appraise_files
from moorline.wire import keys, schema

DAY = 86400
START = 1_790_000_000
END = START + 200 * DAY
OVERLAP = 14 * DAY
UPDATE = START + 30 * DAY


def ran(path, content):
    return ImaEntry(10, bytes(20), "ima-ng", "sha256", hashlib.sha256(content).digest(), path.encode(), b"")


def unlisted(values, at, *entries):
    """How many of `entries` a host that ran them at `at` is contraindicated for."""
    reference = reference_values.merge([file_releases.in_force(values, at=at, bank=0x0B)])
    entries = tuple(ImaEntry(10, b"\x01" * 20, one.template, one.algorithm, one.digest, one.path, b"") for one in entries)
    return appraise_files(NO_FILES, entries, reference=reference, aggregate=b"").unlisted


OLD, NEW, KEPT = (ran("/usr/bin/tool", b"old"), ran("/usr/bin/tool", b"new"), ran("/usr/bin/kept", b"kept"))


@pytest.fixture
def rolled(tmp_path):
    both = {"/usr/bin/tool": b"old", "/usr/bin/kept": b"kept"}
    old = parse_deb(debs.built(tmp_path, both, version="1").read_bytes())
    new = parse_deb(debs.built(tmp_path, {"/usr/bin/tool": b"new"}, version="2").read_bytes())
    first = file_releases.first("base", "1", file_releases.files_of_packages([old]), at=START, until=END)
    return file_releases.updated(
        first, "2", file_releases.files_of_packages([new]), at=UPDATE, until=END, overlap_s=OVERLAP, changed=True
    )


def test_old_then_both_then_new(rolled):
    for at, accepted in (
        (START, (True, False)),
        (UPDATE - 1, (True, False)),
        (UPDATE, (True, True)),
        (UPDATE + OVERLAP, (True, True)),
        (UPDATE + OVERLAP + 1, (False, True)),
        (END, (False, True)),
    ):
        assert (unlisted(rolled, at, OLD) == 0, unlisted(rolled, at, NEW) == 0) == accepted, at
        assert unlisted(rolled, at, KEPT) == 0
    with pytest.raises(Refused) as refused:
        file_releases.in_force(rolled, at=END + 1, bank=0x0B)
    assert refused.value.code == "reference.no_release"


def test_what_an_authority_holds_ends_before_the_old_release_would_live_on(rolled):
    during = file_releases.in_force(rolled, at=UPDATE + 1, bank=0x0B)
    assert during.not_after == UPDATE + OVERLAP
    after = file_releases.in_force(rolled, at=UPDATE + OVERLAP + 1, bank=0x0B)
    assert after.not_after == END
    assert during.serial == after.serial == 2


def test_a_complete_release_is_rid_of_what_is_gone(rolled):
    complete = file_releases.updated(
        rolled, "3", {"/usr/bin/tool": (NEW.digest,)}, at=UPDATE + 60 * DAY, until=END, overlap_s=0, changed=False
    )
    at = UPDATE + 61 * DAY
    assert unlisted(complete, at, KEPT) == 1
    assert unlisted(complete, at, NEW) == 0


def test_a_set_does_not_grow_with_its_history():
    values = file_releases.first("base", "0", {"/f": (bytes(32),)}, at=START, until=END)
    for number in range(1, 9):
        at = START + number * 10 * DAY
        files = {"/f": (bytes([number]) * 32,)}
        values = file_releases.updated(values, str(number), files, at=at, until=END, overlap_s=DAY, changed=False)
    assert [bool(one.files) for one in values.releases] == [False] * 7 + [True, True]
    assert [one.name for one in values.releases] == [str(number) for number in range(9)]


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 20)), min_size=1, max_size=6))
def test_no_update_ever_brings_an_old_release_back(steps):
    """However updates follow each other: once a release is no longer accepted, it never is again."""
    values = file_releases.first("base", "r0", {"/f": (bytes([0]) * 32,)}, at=START, until=END)
    at = START
    for number, (days, overlap) in enumerate(steps, start=1):
        at += days * DAY
        files = {"/f": (bytes([number]) * 32,)}
        values = file_releases.updated(values, f"r{number}", files, at=at, until=END, overlap_s=overlap * DAY, changed=True)
    assert values.serial == len(steps) + 1
    for release in range(len(steps) + 1):
        digest = bytes([release]) * 32
        seen = [
            digest in file_releases.in_force(values, at=moment, bank=0x0B).files.get("/f", ())
            for moment in range(START, END, DAY)
        ]
        changes = sum(before != after for before, after in pairwise(seen))
        assert changes <= 2
        if seen[0]:
            assert changes <= 1


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"release": "1"}, "refs.release_known"),
        ({"at": START - 1}, "refs.window"),
        ({"until": UPDATE}, "refs.window"),
        ({"overlap_s": -1}, "refs.window"),
        ({"files": {}}, "refs.no_files"),
    ],
)
def test_an_update_that_is_none(rolled, change, code):
    asked = {
        "release": "9",
        "files": {"/f": (bytes(32),)},
        "at": UPDATE,
        "until": END,
        "overlap_s": 1,
        "changed": True,
    } | change
    release, files = asked.pop("release"), asked.pop("files")
    with pytest.raises(Refused) as refused:
        file_releases.updated(rolled, release, files, **asked)
    assert refused.value.code == code


def test_the_document_is_read_back_and_signed(rolled):
    text = json.dumps(file_releases.as_document(rolled)).encode()
    read = reference_text.parse_reference_set(text)
    assert read == rolled
    signer = keys.KeySigner(ec.generate_private_key(ec.SECP256R1()))
    signed = reference_sets.sign(read, signer)
    trusted = reference_sets.TrustedSet(name="base", signers=(signer.public_key(),), serial=2)
    held = reference_sets.accept([signed], [trusted], family="tpm", now=UPDATE + OVERLAP + 1, highest={})["base"]
    assert [one.name for one in held.current] == ["2"]
    assert [one.name for one in held.superseded] == ["1"]


def test_a_golden_hosts_list_is_files_and_nothing_else():
    entries = (
        ran("boot_aggregate", b"boot"),
        ImaEntry(10, b"\x01" * 20, "ima-ng", "sha256", b"\x02" * 32, b"/usr/bin/x", b""),
        ImaEntry(10, bytes(20), "ima-ng", "sha256", bytes(32), b"/usr/bin/violated", b""),
        ImaEntry(10, b"\x01" * 20, "ima-buf", "sha256", b"\x03" * 32, b"kexec-cmdline", b"x"),
    )
    assert file_releases.files_of_list(entries) == {"/usr/bin/x": (b"\x02" * 32,)}


# ----------------------------------------------------------------- signed index


STANZA = "Package: {0}\nVersion: {1}\nArchitecture: amd64\nFilename: pool/{0}.deb\nSHA256: {2}\n\n"


@pytest.fixture
def archive(tmp_path):
    """A small archive: one package, its index, and a release signed by a key of its own."""
    home = tmp_path / "gpg"
    home.mkdir(mode=0o700)
    gpg = ["gpg", "--homedir", str(home), "--batch", "--quiet"]
    subprocess.run(
        [*gpg, "--passphrase", "", "--quick-generate-key", "Archive <a@example.org>", "ed25519", "sign", "never"], check=True
    )
    deb = debs.built(tmp_path, {"/usr/bin/tool": b"tool"})
    packages = tmp_path / "Packages"
    packages.write_text(STANZA.format("tool", "1.0-1", hashlib.sha256(deb.read_bytes()).hexdigest()))
    digest = hashlib.sha256(packages.read_bytes()).hexdigest()
    release = f"Origin: Test\nSHA256:\n {digest} {packages.stat().st_size} main/binary-amd64/Packages\n"
    inrelease, keyring = tmp_path / "InRelease", tmp_path / "keyring.gpg"
    subprocess.run([*gpg, "--clearsign", "-o", str(inrelease)], input=release.encode(), check=True)
    subprocess.run([*gpg, "--export", "-o", str(keyring)], check=True)
    subprocess.run(["gpgconf", "--homedir", str(home), "--kill", "all"], check=False)
    return {"deb": deb, "packages": packages, "inrelease": inrelease, "keyring": keyring, "folder": tmp_path}


def moor(*words):
    return subprocess.run(
        [sys.executable, "-m", "moorline.cli", "refs", *map(str, words)], capture_output=True, text=True, check=False
    )


def from_packages(archive, name="out.json"):
    return moor(
        "from-packages", archive["deb"], "--set", "base", "--release", "1", "--until", "2031-01-01",
        "--inrelease", archive["inrelease"], "--keyring", archive["keyring"], "--packages", archive["packages"],
        "-o", archive["folder"] / name,
    )  # fmt: skip


def test_a_package_under_a_signed_index(archive):
    done = from_packages(archive)
    assert done.returncode == 0, done.stderr
    assert "index: verified" in done.stdout
    made = json.loads((archive["folder"] / "out.json").read_text())
    assert made["releases"][0]["files"] == {"/usr/bin/tool": [hashlib.sha256(b"tool").hexdigest()]}


def test_every_broken_link_to_the_archives_key_refuses(archive):
    folder, signed = archive["folder"], archive["inrelease"].read_text()
    index = archive["packages"].read_text()
    other = debs.built(folder, {"/usr/bin/tool": b"evil"}, compression="gzip")
    stranger = debs.built(folder, {"/usr/bin/tool": b"tool"}, name="stranger")
    empty = folder / "empty.gpg"
    empty.write_bytes(b"")
    cases = {
        "refs.release_signature": {"inrelease": signed.replace("Origin: Test", "Origin: Tost")},
        "deb_index.packages_not_in_release": {"packages": index + "\n"},
        "deb_index.digest": {"deb": other},
        "deb_index.not_listed": {"deb": stranger},
        "refs.keyring": {"keyring": folder / "absent.gpg"},
    }
    for number, (code, change) in enumerate(cases.items()):
        asked = dict(archive)
        for name, value in change.items():
            if isinstance(value, str):
                value = folder / f"changed-{number}"  # noqa: PLW2901
                value.write_text(change[name])
            asked[name] = value
        done = from_packages(asked, f"out-{number}.json")
        assert done.returncode in (1, 2), code
        assert code in done.stderr, done.stderr
        assert not (folder / f"out-{number}.json").exists()
    assert "refs.release_signature" in from_packages({**archive, "keyring": empty}, "x.json").stderr
    bare = folder / "bare"
    bare.write_text(signed.split("SHA256:")[1])
    assert "refs.release_signature" in from_packages({**archive, "inrelease": bare}, "x.json").stderr


def test_text_beside_the_signed_part_counts_for_nothing(archive):
    digest = hashlib.sha256(b"evil index").hexdigest()
    added = f"SHA256:\n {digest} 10 main/binary-amd64/Packages\n\n" + archive["inrelease"].read_text()
    before = archive["folder"] / "before"
    before.write_text(added)
    evil = archive["folder"] / "evil"
    evil.write_bytes(b"evil index")
    done = from_packages({**archive, "inrelease": before, "packages": evil}, "x.json")
    assert done.returncode == 1
    assert ("refs.release_signature" in done.stderr) or ("deb_index.packages_not_in_release" in done.stderr)


@pytest.mark.parametrize(
    "release",
    [
        b"",
        b"Origin: x\n",
        b"SHA256:\n nonsense\n",
        b"SHA256:\n" + b" " + b"a" * 64 + b" 1 x\n" + b" " + b"b" * 64 + b" 1 x\n",
    ],
)
def test_a_release_that_names_nothing_is_malformed(release):
    with pytest.raises(Malformed):
        debian_index.digests_of_release(release)


def test_an_index_that_contradicts_itself_is_malformed():
    twice = STANZA.format("a", "1", "a" * 64) + STANZA.format("a", "1", "b" * 64)
    for text in (twice, "Package: a\n\n", "Package: a\nPackage: b\n\n", STANZA.format("a", "1", "xyz")):
        with pytest.raises(Malformed):
            debian_index.digests_of_packages(text.encode())
    listed = debian_index.digests_of_packages(STANZA.format("a", "1", "a" * 64).encode())
    with pytest.raises(NotAuthentic):
        debian_index.verify_package("a_1_amd64", bytes(32), listed)


# ---------------------------------------------------------------- command line


def test_an_update_by_hand(tmp_path):
    old = debs.built(tmp_path, {"/usr/bin/tool": b"old"}, version="1")
    new = debs.built(tmp_path, {"/usr/bin/tool": b"new"}, version="2")
    one, two, values = tmp_path / "one.json", tmp_path / "two.json", tmp_path / "values.bin"
    first = moor(
        "from-packages", old, "--set", "base", "--release", "1", "--from", "2026-01-01", "--until", "2031-01-01", "-o", one
    )
    assert first.returncode == 0, first.stderr
    assert "who made the packages was not verified" in first.stdout
    second = moor(
        "from-packages", new, "--changed", "--onto", one, "--release", "2", "--from", "2026-02-01", "--until", "2031-01-01",
        "--overlap-days", "7", "-o", two, "--json",
    )  # fmt: skip
    assert json.loads(second.stdout)["serial"] == "2"
    assert moor("values", two, "--at", "2026-02-03T00:00:00Z", "-o", values).returncode == 0
    made = schema.decode(reference_values.ReferenceValues, values.read_bytes(), max_bytes=1 << 20)
    assert set(made.files["/usr/bin/tool"]) == {hashlib.sha256(text).digest() for text in (b"old", b"new")}
    key = tmp_path / "key.pem"
    key.write_bytes(
        ec.generate_private_key(ec.SECP256R1()).private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    key.chmod(0o600)
    for words in (
        ["evidence", "sign-references", two, "--key", key, "--out", tmp_path / "two.cose"],
        ["verifier", "sign-reference-values", values, "--key", key, "-o", tmp_path / "values.cose"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "moorline.cli", *map(str, words)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


def test_a_golden_host_by_hand(tmp_path):
    host = tmp_path / "host"
    (host / "usr/bin").mkdir(parents=True)
    (host / "usr/bin/tool").write_bytes(b"golden")
    (host / "usr/bin/link").symlink_to("/etc/passwd")
    os.mkfifo(host / "usr/bin/pipe")
    out = tmp_path / "host.json"
    done = moor(
        "from-host", "--root", host, "--below", "/usr", "--set", "g", "--release", "1", "--until", "2031-01-01", "-o", out
    )
    assert done.returncode == 0, done.stderr
    files = json.loads(out.read_text())["releases"][0]["files"]
    assert files == {"/usr/bin/tool": [hashlib.sha256(b"golden").hexdigest()]}
    words = ("--set", "g", "--release", "1", "--until", "2031-01-01", "-o", tmp_path / "none.json")
    missing = moor("from-host", "--root", host, "--below", "/usr", "--below", "/opt", *words)
    assert missing.returncode == 2
    assert "refs.host_file" in missing.stderr
    assert not (tmp_path / "none.json").exists()


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--set", "a"], "refs.source"),
        (["/nowhere.deb", "--set", "a"], "cli.file"),
        (["/nowhere.deb"], "refs.set"),
        (["/nowhere.deb", "--set", "a", "--changed"], "refs.set"),
        (["/nowhere.deb", "--set", "a", "--hash", "md5"], "refs.hash"),
        (["/nowhere.deb", "--set", "a", "--keyring", "x"], "refs.index"),
    ],
)
def test_wrong_use_is_said(tmp_path, words, code):
    done = moor("from-packages", *words, "--release", "1", "--until", "2031-01-01", "-o", tmp_path / "x")
    assert done.returncode == 2
    if code != "refs.set" or "/nowhere.deb" not in words:
        assert code in done.stderr
    for until in ("soon", "2031-01-01T00:00:00"):
        real = debs.built(tmp_path / until.replace(":", ""), {"/f": b""})
        wrong = moor("from-packages", real, "--set", "a", "--release", "1", "--until", until, "-o", tmp_path / "y")
        assert "refs.time" in wrong.stderr
