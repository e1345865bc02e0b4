"""Packages: what verifies, and every way of tampering that must not."""

import contextlib
import io
import stat
import zipfile

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st

from moorline.clock import Instant, Validity
from moorline.errors import Malformed, MoorlineError, NotAuthentic, Refused
from moorline.orchestration import archive, descriptor, package
from moorline.wire import certificates

from .conftest import NOW, Publisher, der

PUBLISHER = Publisher()
CSAR = PUBLISHER.build(extra={"Artifacts/readme.txt": b"words\n"})
SIGNERS = (PUBLISHER.der,)


def rezipped(change, csar=CSAR):
    """The package with its files changed by `change`, zipped again honestly."""
    files = archive.read(csar)
    change(files)
    return archive.write(files)


def code_of(csar, *, signers=SIGNERS, now=NOW):
    with pytest.raises(MoorlineError) as caught:
        package.verify(csar, signers=signers, now=now)
    return caught.value.code


def test_a_built_package_verifies():
    verified = package.verify(CSAR, signers=SIGNERS, now=NOW)
    assert verified.digest == package.package_digest(CSAR)
    assert verified.descriptor == PUBLISHER.described()
    assert verified.signer_name == "CN=publisher"
    assert set(verified.files) == {
        "TOSCA-Metadata/TOSCA.meta",
        "Definitions/vnfd.yaml",
        "Artifacts/function.py",
        "Artifacts/readme.txt",
        "records.cert",
        "records.mf",
    }


def test_all_but_the_signature_is_reproducible():
    again = archive.read(PUBLISHER.build(extra={"Artifacts/readme.txt": b"words\n"}))
    first = archive.read(CSAR)
    assert {n: d for n, d in again.items() if n != "records.mf"} == {n: d for n, d in first.items() if n != "records.mf"}


def test_tampered_function():
    csar = rezipped(lambda files: files.update({"Artifacts/function.py": b"import evil\n"}))
    assert code_of(csar) == "package.digest_mismatch"


def test_tampered_function_with_matching_manifest_needs_the_publishers_key():
    def change(files):
        old = files["Artifacts/function.py"]
        files["Artifacts/function.py"] = b"import evil\n"
        files["records.mf"] = files["records.mf"].replace(
            package.package_digest(old).hex().encode(), package.package_digest(b"import evil\n").hex().encode()
        )

    assert code_of(rezipped(change)) == "package.signature_invalid"


def test_signed_by_a_stranger():
    stranger = Publisher(name="publisher")  # the same name is no help
    assert code_of(stranger.build()) == "package.signer_untrusted"
    assert package.verify(stranger.build(), signers=(PUBLISHER.der, stranger.der), now=NOW)


def test_no_signer_configured_trusts_nobody():
    assert code_of(CSAR, signers=()) == "package.signer_untrusted"


def test_stranger_may_not_present_the_publishers_certificate():
    def change(files):
        files["records.cert"] = archive.read(CSAR)["records.cert"]

    assert code_of(rezipped(change, Publisher().build())) == "package.signer_untrusted"


def test_expired_publisher():
    assert code_of(CSAR, now=Instant(NOW + 10 * 86400)) == "package.signer_expired"


def test_unlisted_missing_and_lost_files():
    assert code_of(rezipped(lambda f: f.update({"Artifacts/extra.py": b""}))) == "package.unlisted_file"
    assert code_of(rezipped(lambda f: f.pop("Artifacts/readme.txt"))) == "package.missing_file"
    assert code_of(rezipped(lambda f: f.pop("records.cert"))) == "package.missing_file"
    assert code_of(rezipped(lambda f: f.pop("TOSCA-Metadata/TOSCA.meta"))) == "package.malformed"


def test_manifest_without_signature_or_with_something_behind_it():
    def cut(files):
        files["records.mf"] = files["records.mf"].split(b"-----BEGIN")[0]

    assert code_of(rezipped(cut)) == "package.signature_missing"
    assert code_of(rezipped(lambda f: f.update({"records.mf": f["records.mf"] + b"\n"}))) == "package.signature_missing"


def test_signer_under_a_configured_ca():
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    validity = Validity(not_before=Instant(NOW - 60), not_after=Instant(NOW + 600))
    root = certificates.root_certificate(ca_key, name="publishers", validity=validity, serial=1)
    self_signed = package.publisher_certificate(key, name="under", validity=validity, serial=2)
    builder = x509.CertificateBuilder(
        root.subject,
        self_signed.subject,
        key.public_key(),
        2,
        self_signed.not_valid_before_utc,
        self_signed.not_valid_after_utc,
        list(self_signed.extensions),
    )
    content = package.PackageContent(descriptor=PUBLISHER.described(), function=b"x = 1\n", release=NOW)
    signed = builder.sign(ca_key, hashes.SHA256())
    csar = package.build(content, package.Publisher(certificate=signed, key=key))
    assert package.verify(csar, signers=(der(root),), now=NOW).signer_name == "CN=under"
    assert code_of(csar) == "package.signer_untrusted"


# The archive ------------------------------------------------------------------------------------------------------------


def zipped(*entries, compression=zipfile.ZIP_DEFLATED):
    """A zip of (name or ZipInfo, data) pairs, without our writer's manners."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", compression) as out:
        for name, data in entries:
            out.writestr(name, data)
    return target.getvalue()


def entry(name, *, mode=stat.S_IFREG | 0o644):
    info = zipfile.ZipInfo(name, (2026, 1, 1, 0, 0, 0))
    info.create_system = 3
    info.external_attr = mode << 16
    return info


@pytest.mark.parametrize(
    "name",
    ["../x", "a/../x", "/etc/passwd", "a//b", "./x", "a/.hidden", "C:\\x", "a\\b", "a b", "", "-rf", "a/" * 9 + "x", "é"],
)
def test_names_that_leave_the_archive(name):
    with pytest.raises(Malformed) as caught:
        archive.read(zipped((entry(name), b"x")))
    assert caught.value.code in ("package.name", "package.malformed")


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("pair", [("a.txt", "a.txt"), ("a.txt", "A.TXT")])
def test_two_entries_with_one_name(pair):
    with pytest.raises(Malformed) as caught:
        archive.read(zipped(*((entry(name), b"x") for name in pair)))
    assert caught.value.code == "package.duplicate"


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFSOCK])
def test_links_and_devices(kind):
    with pytest.raises(Malformed) as caught:
        archive.read(zipped((entry("link", mode=kind | 0o777), b"/etc/passwd")))
    assert caught.value.code == "package.symlink"


def test_bombs():
    with pytest.raises(Malformed) as caught:
        archive.read(zipped(("zeros", bytes(4 << 20))))
    assert caught.value.code == "package.compression"
    with pytest.raises(Malformed) as caught:
        archive.read(zipped(("zeros", bytes(9 << 20))))
    assert caught.value.code == "package.too_large"
    with pytest.raises(Malformed) as caught:
        archive.read(zipped(*((f"f{n}", b"") for n in range(300))))
    assert caught.value.code == "package.too_large"


def test_odd_compression_and_polyglots():
    with pytest.raises(Malformed) as caught:
        archive.read(zipped(("x", b"x"), compression=zipfile.ZIP_LZMA))
    assert caught.value.code == "package.compression"
    for csar in (b"#!/bin/sh\n" + CSAR, CSAR + b"trailer", b"", CSAR[:-1]):
        with pytest.raises(Malformed):
            archive.read(csar)


def test_directories_are_passed_over():
    plain = zipped((entry("a/", mode=stat.S_IFDIR | 0o755), b""), (entry("a/b"), b"x"))
    assert archive.read(plain) == {"a/b": b"x"}


@given(st.binary(max_size=300))
@settings(max_examples=60)
def test_any_bytes_are_malformed_or_files(data):
    with contextlib.suppress(Malformed):
        archive.read(data)


@given(st.integers(min_value=0, max_value=len(CSAR) * 8 - 1))
@settings(max_examples=150, deadline=None)
def test_a_flipped_bit_never_gives_the_same_package(position):
    """Zip has slack that nothing reads (times, versions): such a flip may verify, but then it is another package digest."""
    flipped = bytearray(CSAR)
    flipped[position // 8] ^= 1 << (position % 8)
    try:
        verified = package.verify(bytes(flipped), signers=SIGNERS, now=NOW)
    except (Malformed, NotAuthentic, Refused):
        return
    assert verified.digest != package.package_digest(CSAR)
    assert verified.files == package.verify(CSAR, signers=SIGNERS, now=NOW).files


# The descriptor ---------------------------------------------------------------------------------------------------------


def test_descriptor_round_trip():
    made = PUBLISHER.described(jurisdiction="EU", use_case="4.3", pids=4096, memory_mib=64)
    assert descriptor.parse(descriptor.render(made)) == made


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"4.7"', b'"4.8"'),
        (b'"EU/DE"', b'"eu"'),
        (b'"EU/DE"', b'"EU/../US"'),
        (b"256 MiB", b"256 GiB"),
        (b'"pids": 64', b'"pids": 0'),
        (b'"pids": 64', b'"pids": true'),
        (b'"pids": 64', b'"pids": 64, "pids": 65'),
        (b"../Artifacts/function.py", b"../../etc/passwd"),
        (b'"records"', b'"../records"'),
        (b"tosca.nodes.nfv.VNF", b"tosca.nodes.nfv.Other"),
        (b"{", b"["),
    ],
)
def test_descriptors_that_are_none(old, new):
    rendered = descriptor.render(PUBLISHER.described())
    assert old in rendered
    with pytest.raises(Malformed):
        descriptor.parse(rendered.replace(old, new, 1) if old != b'"records"' else rendered.replace(old, new))


@given(st.binary(max_size=200))
@settings(max_examples=60)
def test_any_bytes_as_a_descriptor(data):
    with pytest.raises(Malformed):
        descriptor.parse(data)


def test_issuer_must_be_a_ca():
    """A pinned publisher that is no CA cannot vouch for another certificate it signed."""
    key = ec.generate_private_key(ec.SECP256R1())
    validity = Validity(not_before=Instant(NOW - 60), not_after=Instant(NOW + 600))
    under = package.publisher_certificate(key, name="under", validity=validity, serial=5)
    leaf = (
        x509.CertificateBuilder(
            PUBLISHER.certificate.subject,
            under.subject,
            key.public_key(),
            6,
            under.not_valid_before_utc,
            under.not_valid_after_utc,
            list(under.extensions),
        )
    ).sign(PUBLISHER.key, hashes.SHA256())
    content = package.PackageContent(descriptor=PUBLISHER.described(), function=b"x = 1\n", release=NOW)
    csar = package.build(content, package.Publisher(certificate=leaf, key=key))
    assert code_of(csar) == "package.signer_untrusted"
