"""Function packages: ETSI GS NFV-SOL 004 CSARs with a TOSCA-Metadata folder, a hashed manifest and a CMS signature.

    TOSCA-Metadata/TOSCA.meta   names the entry files below
    Definitions/vnfd.yaml       the descriptor (orchestration.descriptor)
    Artifacts/function.py       the function's code
    <service>.cert              the publisher's certificate (PEM), the one file the manifest need not list
    <service>.mf                the manifest: metadata, SHA-256 of every other file, then the CMS signature over that

Verification, in this order:

1. The archive is read under caps (orchestration.archive): names, kinds, sizes, no duplicates.
2. TOSCA.meta names manifest, certificate and descriptor, and they exist.
3. The CMS signature verifies over the manifest text in front of it, by one certificate.
4. That certificate is trusted: it is one of the configured ones, or was issued by one that is a CA; it is within its life.
5. Every listed file exists and has its digest; every file is listed.
6. The descriptor parses.

The digest of a package is SHA-256 of the whole CSAR: that is what launch fields, the ledger's service record and the guest
use. A package that verifies says who published it and that it is whole, not that the code is good.
"""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass, field
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from moorline.clock import Instant, Validity, rendered, to_datetime
from moorline.digest import Digest256, same
from moorline.errors import Malformed, NotAuthentic, Refused
from moorline.orchestration import archive, cms, descriptor
from moorline.wire.certificates import parse_certificate

META_FILE: Final = "TOSCA-Metadata/TOSCA.meta"
DESCRIPTOR_FILE: Final = "Definitions/vnfd.yaml"
_BEGIN: Final = b"-----BEGIN CMS-----\n"
_END: Final = b"-----END CMS-----\n"
_SOURCE: Final = re.compile(r"Source: (\S+)\nAlgorithm: (\S+)\nHash: ([0-9a-f]{64})\n")
_META_LINE: Final = re.compile(r"([A-Za-z-]+): (\S(?:.*\S)?)")
_META_VERSIONS: Final = ("1.0", "1.1")
_MAX_MANIFEST_BYTES: Final = 256 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class PackageContent:
    """What a publisher puts into a package. `extra` are further files by name."""

    descriptor: descriptor.Descriptor
    function: bytes
    release: Instant
    extra: dict[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Publisher:
    """Who signs packages: a certificate and its key."""

    certificate: x509.Certificate
    key: cms.SignerKey


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """A verified package. `signer` is the SHA-256 of the publisher's certificate; `signer_name` its subject, for people."""

    digest: Digest256
    descriptor: descriptor.Descriptor
    files: dict[str, Digest256]
    signer: Digest256
    signer_name: str


def publisher_certificate(key: cms.SignerKey, *, name: str, validity: Validity, serial: int) -> x509.Certificate:
    """A self-signed publisher certificate. It is worth something only where somebody configured exactly this one."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    usage = x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(serial)
        .not_valid_before(to_datetime(validity.not_before))
        .not_valid_after(to_datetime(validity.not_after))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )


def build(content: PackageContent, publisher: Publisher) -> bytes:
    """The CSAR of `content`, signed. All bytes but the signature's follow from the content."""
    service = content.descriptor.service
    files = {
        META_FILE: _meta(service),
        DESCRIPTOR_FILE: descriptor.render(content.descriptor),
        content.descriptor.artifact: content.function,
        f"{service}.cert": publisher.certificate.public_bytes(serialization.Encoding.PEM),
        **content.extra,
    }
    manifest = _manifest(content, files)
    signature = cms.sign(manifest, certificate=publisher.certificate, key=publisher.key)
    return archive.write({**files, f"{service}.mf": manifest + _armoured(signature)})


def verify(csar: bytes, *, signers: tuple[bytes, ...], now: Instant) -> Package:
    """The package in `csar` (untrusted), published by one of `signers` (DER certificates: publishers, or their CAs).

    Raises Malformed (`package.*`, `cms.*`), NotAuthentic("package.signature_invalid" | "package.digest_mismatch") or
    Refused("package.signer_untrusted" | "package.signer_expired" | "package.unlisted_file" | "package.missing_file").
    It does NOT establish that any service may use the package: the ledger's service record says that.
    """
    # 1
    files = archive.read(csar)
    # 2
    entries = _entries(files)
    manifest, signature = _split(files[entries["ETSI-Entry-Manifest"]])
    # 3
    certificate = _signer(signature, manifest, files[entries["ETSI-Entry-Certificate"]])
    # 4
    _judge_signer(certificate, signers, now)
    # 5
    _judge_files(files, _listed(manifest), {entries["ETSI-Entry-Manifest"], entries["ETSI-Entry-Certificate"]})
    # 6
    return Package(
        digest=package_digest(csar),
        descriptor=descriptor.parse(files[entries["Entry-Definitions"]]),
        files={name: Digest256(hashlib.sha256(data).digest()) for name, data in sorted(files.items())},
        signer=Digest256(certificate.fingerprint(hashes.SHA256())),
        signer_name=certificate.subject.rfc4514_string(),
    )


def package_digest(csar: bytes) -> Digest256:
    """What names a package everywhere: SHA-256 of its bytes."""
    return Digest256(hashlib.sha256(csar).digest())


def _meta(service: str) -> bytes:
    return (
        "TOSCA-Meta-File-Version: 1.0\n"
        "CSAR-Version: 1.1\n"
        "Created-By: Moorline\n"
        f"Entry-Definitions: {DESCRIPTOR_FILE}\n"
        f"ETSI-Entry-Manifest: {service}.mf\n"
        f"ETSI-Entry-Certificate: {service}.cert\n"
    ).encode()


def _manifest(content: PackageContent, files: dict[str, bytes]) -> bytes:
    made = content.descriptor
    head = (
        "metadata:\n"
        f"  vnf_product_name: {made.service}\n"
        f"  vnf_provider_id: {made.provider}\n"
        f"  vnf_package_version: {made.version}\n"
        f"  vnf_release_date_time: {rendered(content.release)}\n"
        "\n"
    )
    sources = [
        f"Source: {name}\nAlgorithm: SHA-256\nHash: {hashlib.sha256(data).hexdigest()}\n"
        for name, data in sorted(files.items())
    ]
    return (head + "\n".join(sources) + "\n").encode()


def _armoured(signature: bytes) -> bytes:
    text = base64.b64encode(signature)
    lines = [text[start : start + 64] + b"\n" for start in range(0, len(text), 64)]
    return _BEGIN + b"".join(lines) + _END


def _entries(files: dict[str, bytes]) -> dict[str, str]:
    found: dict[str, str] = {}
    for line in _text(files.get(META_FILE, b""), "TOSCA.meta").splitlines():
        match = _META_LINE.fullmatch(line)
        if match is None or match[1] in found:
            raise Malformed("package.malformed", "TOSCA.meta has a line that is no entry, or one twice", got=line)
        found[match[1]] = match[2]
    if found.get("TOSCA-Meta-File-Version") not in _META_VERSIONS or found.get("CSAR-Version") != "1.1":
        raise Malformed("package.malformed", "TOSCA.meta is missing or of another version", expected="CSAR-Version: 1.1")
    for key in ("Entry-Definitions", "ETSI-Entry-Manifest", "ETSI-Entry-Certificate"):
        if found.get(key) not in files:
            raise Refused("package.missing_file", "TOSCA.meta does not lead to a file", expected=key, got=found.get(key))
    return found


def _split(manifest: bytes) -> tuple[bytes, bytes]:
    if len(manifest) > _MAX_MANIFEST_BYTES:
        raise Malformed("package.too_large", "the manifest is too large", expected=_MAX_MANIFEST_BYTES, got=len(manifest))
    head, begin, rest = manifest.partition(_BEGIN)
    body, end, behind = rest.partition(_END)
    if not begin or not end or behind:
        raise Malformed("package.signature_missing", "the manifest does not end with one CMS signature")
    try:
        return head, base64.b64decode(body.replace(b"\n", b""), validate=True)
    except ValueError:
        raise Malformed("package.signature_missing", "the CMS signature is not base64") from None


def _signer(signature: bytes, manifest: bytes, entry_certificate: bytes) -> x509.Certificate:
    try:
        known = x509.load_pem_x509_certificate(entry_certificate)
    except Exception as error:  # the loader raises several kinds on odd bytes
        raise Malformed("package.malformed", "the entry certificate is not one", got=type(error).__name__) from None
    parse_certificate(known.public_bytes(serialization.Encoding.DER))
    try:
        return cms.verify(signature, manifest, known=(known,)).signer
    except NotAuthentic as error:
        raise NotAuthentic(
            "package.signature_invalid",
            "the signature over the manifest does not hold",
            got=error.code,
            remedy="get the package from its publisher again",
        ) from error


def _judge_signer(certificate: x509.Certificate, signers: tuple[bytes, ...], now: Instant) -> None:
    trusted = [parse_certificate(der) for der in signers]
    issuers = [other for other in trusted if _issued(certificate, other)]
    if certificate not in trusted and not issuers:
        raise Refused(
            "package.signer_untrusted",
            "nobody here trusts the publisher of this package",
            expected=", ".join(other.subject.rfc4514_string() for other in trusted) or "a configured signer",
            got=certificate.subject.rfc4514_string(),
            remedy="add the publisher's certificate to package_signers, if you do trust it",
        )
    chain = [certificate] if certificate in trusted else [certificate, issuers[0]]
    for member in chain:
        if not member.not_valid_before_utc <= to_datetime(now) <= member.not_valid_after_utc:
            raise Refused(
                "package.signer_expired",
                "a certificate of the publisher is not valid now",
                expected=f"{member.not_valid_before_utc:%FT%TZ} to {member.not_valid_after_utc:%FT%TZ}",
                got=rendered(now),
            )
    if not _signs(certificate):
        raise Refused(
            "package.signer_untrusted", "the publisher's certificate is not for signatures", expected="digitalSignature"
        )


def _issued(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        constraints = issuer.extensions.get_extension_for_class(x509.BasicConstraints).value
        usage = issuer.extensions.get_extension_for_class(x509.KeyUsage).value
        certificate.verify_directly_issued_by(issuer)
    except Exception:  # missing extension, other issuer, bad signature, unsupported key: in each case it did not issue it
        return False
    return constraints.ca and usage.key_cert_sign


def _signs(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.KeyUsage).value.digital_signature
    except x509.ExtensionNotFound:
        return False


def _listed(manifest: bytes) -> dict[str, bytes]:
    head, _, rest = _text(manifest, "the manifest").partition("\n\n")
    if not head.startswith("metadata:\n"):
        raise Malformed("package.malformed", "the manifest does not begin with its metadata")
    listed: dict[str, bytes] = {}
    for block in rest.removesuffix("\n").split("\n\n"):
        match = _SOURCE.fullmatch(block + "\n") or _SOURCE.fullmatch(block)
        if match is None or match[2] != "SHA-256":
            raise Malformed("package.malformed", "a manifest entry is not Source, Algorithm SHA-256, Hash", got=block[:200])
        if match[1] in listed:
            raise Malformed("package.duplicate", "the manifest lists a file twice", got=match[1])
        listed[match[1]] = bytes.fromhex(match[3])
    return listed


def _judge_files(files: dict[str, bytes], listed: dict[str, bytes], exempt: set[str]) -> None:
    missing = sorted(set(listed) - set(files))
    if missing:
        raise Refused("package.missing_file", "the manifest lists a file that is not there", got=missing)
    unlisted = sorted(set(files) - set(listed) - exempt)
    if unlisted:
        raise Refused("package.unlisted_file", "the package holds a file that its manifest does not list", got=unlisted)
    for name, digest in listed.items():
        found = hashlib.sha256(files[name]).digest()
        if not same(found, digest):
            raise NotAuthentic(
                "package.digest_mismatch",
                f"the file {name} is not the one its publisher signed",
                expected=digest,
                got=found,
                remedy="get the package from its publisher again",
            )


def _text(data: bytes, what: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise Malformed("package.malformed", f"{what} is not UTF-8") from None
