"""A SIMULATED maker of SNP chips: ARK, ASK, and a VCEK for each chip it makes, in the certificates' real form (57230).

Everything about it is real but the root: RSA-4096 keys sign with PSS and SHA-384, the VCEK carries AMD's extensions, a chip
id is as long as a real one. Subjects say SIMULATED for people; programs never look at that: a chip counts as simulated
because its root is in an anchors file (`verification.anchors.parse_anchor_file`), and counts for nothing where no such file
is configured.

    <directory>/anchors.cbor              public: what a verifier that allows simulation is given
    <directory>/ark.key ask.key           PEM, mode 0600
    <directory>/ark.der ask.der
    <directory>/chips/<name>/             one chip: what `moor simulate silicon` needs, and nothing else reads
        chip.cbor vcek.key vcek.der ask.der ark.der
"""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.x509.oid import NameOID

from moorline.clock import Instant, to_datetime
from moorline.errors import Misconfigured
from moorline.evidence.snp import Product, TcbVersion
from moorline.nfv import parse_name
from moorline.verification.anchors import SimulatedAnchor, serialize_anchor_file
from moorline.wire import schema
from moorline.wire.schema import Bytes64

ANCHORS_FILE: Final = "anchors.cbor"
SIMULATED_TCB: Final = TcbVersion(boot_loader=4, tee=0, snp=24, microcode=219, fmc=None)
"""The TCB of every chip made here, unless the maker is told otherwise: that of a real Milan of 2025."""
SIMULATED_TURIN_TCB: Final = TcbVersion(boot_loader=1, tee=1, snp=4, microcode=75, fmc=1)

_PSS: Final = padding.PSS(mgf=padding.MGF1(hashes.SHA384()), salt_length=48)
_ORGANIZATION: Final = "Moorline SIMULATED silicon, not a real chip"
_AMD: Final = "1.3.6.1.4.1.3704.1"
_CA_LIFE: Final = timedelta(days=25 * 365)
_CHIP_LIFE: Final = timedelta(days=7 * 365)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChipRecord:
    """What is fused into a chip: its id, its product, and the TCB its firmware runs at. CBOR in `chip.cbor`."""

    chip_id: Bytes64
    product: Product
    tcb: int


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Chip:
    """A simulated chip with its key: only the silicon process holds one. `vcek`, `ask`, `ark` are DER."""

    chip_id: bytes
    product: Product
    tcb: TcbVersion
    key: ec.EllipticCurvePrivateKey
    vcek: bytes
    ask: bytes
    ark: bytes


class Manufacturer:
    """One simulated maker, in its directory. Its keys are made once: an RSA-4096 key pair takes a second or so."""

    def __init__(self, directory: Path, product: Product, ark: rsa.RSAPrivateKey, ask: rsa.RSAPrivateKey) -> None:
        self.directory = directory
        self.product = product
        self._ark = ark
        self._ask = ask

    @property
    def anchors_path(self) -> Path:
        """The public anchors file."""
        return self.directory / ANCHORS_FILE

    @property
    def ark(self) -> bytes:
        """The root certificate, DER."""
        return (self.directory / "ark.der").read_bytes()

    @property
    def ask(self) -> bytes:
        """The certificate of the CA below the root, DER."""
        return (self.directory / "ask.der").read_bytes()

    @property
    def ask_key(self) -> rsa.RSAPrivateKey:
        """The key that signs chips; tests use it to make bad twins."""
        return self._ask

    @property
    def ark_key(self) -> rsa.RSAPrivateKey:
        """The root key; it signs CRLs."""
        return self._ark

    def make_chip(self, name: str, *, now: Instant, tcb: TcbVersion | None = None) -> Path:
        """The directory of the chip called `name`, made if it is not there yet."""
        directory = self.directory / "chips" / parse_name(name, "chip name")
        if (directory / "chip.cbor").exists():
            return directory
        fused = tcb or default_tcb(self.product)
        identity = secrets.token_bytes(8).ljust(64, b"\0") if self.product is Product.TURIN else secrets.token_bytes(64)
        key = ec.generate_private_key(ec.SECP384R1())
        directory.mkdir(parents=True, mode=0o700)
        _write_key(directory / "vcek.key", key)
        (directory / "vcek.der").write_bytes(
            chip_certificate(self._ask, self.ask, key, product=self.product, chip_id=identity, tcb=fused, now=now)
        )
        (directory / "ask.der").write_bytes(self.ask)
        (directory / "ark.der").write_bytes(self.ark)
        record = ChipRecord(chip_id=identity, product=self.product, tcb=fused.raw())
        (directory / "chip.cbor").write_bytes(schema.encode(record))
        return directory


def create_manufacturer(directory: Path, *, now: Instant, product: Product = Product.MILAN) -> Manufacturer:
    """The manufacturer in `directory`; opened if it is there, made (slowly) if not."""
    if (directory / ANCHORS_FILE).exists():
        return open_manufacturer(directory)
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    ark, ask = (rsa.generate_private_key(public_exponent=65537, key_size=4096) for _ in range(2))
    ark_name, ask_name = _name(f"SIMULATED-ARK-{product}"), _name(f"SIMULATED-SEV-{product}")
    ark_der = _ca_certificate(ark_name, ark, ark_name, ark, path_length=None, now=now)
    ask_der = _ca_certificate(ask_name, ask, ark_name, ark, path_length=0, now=now)
    _write_key(directory / "ark.key", ark)
    _write_key(directory / "ask.key", ask)
    (directory / "ark.der").write_bytes(ark_der)
    (directory / "ask.der").write_bytes(ask_der)
    anchor = SimulatedAnchor(product=product, ark=ark_der, intermediates=(ask_der,))
    (directory / ANCHORS_FILE).write_bytes(serialize_anchor_file((anchor,)))  # last: its presence says that all is there
    return Manufacturer(directory, product, ark, ask)


def open_manufacturer(directory: Path) -> Manufacturer:
    """The manufacturer in `directory`; raises Misconfigured("manufacturer.missing") if none was made there."""
    try:
        keys = [
            serialization.load_pem_private_key((directory / f"{name}.key").read_bytes(), None) for name in ("ark", "ask")
        ]
        issuer = x509.load_der_x509_certificate((directory / "ask.der").read_bytes()).subject
    except FileNotFoundError as error:
        raise Misconfigured(
            "manufacturer.missing",
            "there is no simulated manufacturer in this directory",
            got=error.filename,
            remedy="run `moor simulate manufacturer --dir DIR` first",
        ) from None
    ark, ask = keys
    assert isinstance(ark, rsa.RSAPrivateKey)
    assert isinstance(ask, rsa.RSAPrivateKey)
    common_name = str(issuer.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)
    return Manufacturer(directory, Product(common_name.rpartition("-")[2]), ark, ask)


def open_chip(directory: Path) -> Chip:
    """The chip in `directory`, with its key; raises Misconfigured("silicon.no_chip") if there is none."""
    try:
        record = schema.decode(ChipRecord, (directory / "chip.cbor").read_bytes())
        key = serialization.load_pem_private_key((directory / "vcek.key").read_bytes(), None)
        vcek, ask, ark = ((directory / f"{name}.der").read_bytes() for name in ("vcek", "ask", "ark"))
    except FileNotFoundError as error:
        raise Misconfigured(
            "silicon.no_chip",
            "there is no simulated chip in this directory",
            got=error.filename,
            remedy="run `moor simulate manufacturer --dir DIR --chip NAME` first",
        ) from None
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    tcb = TcbVersion.parse(record.tcb, record.product)
    return Chip(chip_id=record.chip_id, product=record.product, tcb=tcb, key=key, vcek=vcek, ask=ask, ark=ark)


def default_tcb(product: Product) -> TcbVersion:
    """The TCB of chips of `product`, where nobody says otherwise."""
    return SIMULATED_TURIN_TCB if product is Product.TURIN else SIMULATED_TCB


def chip_certificate(
    issuer_key: rsa.RSAPrivateKey,
    issuer: bytes,
    key: ec.EllipticCurvePrivateKey,
    *,
    product: Product,
    chip_id: bytes,
    tcb: TcbVersion,
    now: Instant,
) -> bytes:
    """A VCEK certificate, DER, with the extensions of 57230 3.1. Real ones have serial 0; the builder refuses that."""
    certificate = _builder(_name("SEV-VCEK"), x509.load_der_x509_certificate(issuer).subject, now, _CHIP_LIFE)
    certificate = certificate.public_key(key.public_key())
    for oid, value in vcek_extensions(product, chip_id, tcb):
        extension = x509.UnrecognizedExtension(x509.ObjectIdentifier(oid), value)
        certificate = certificate.add_extension(extension, critical=False)
    return certificate.sign(issuer_key, hashes.SHA384(), rsa_padding=_PSS).public_bytes(serialization.Encoding.DER)


def vcek_extensions(product: Product, chip_id: bytes, tcb: TcbVersion) -> list[tuple[str, bytes]]:
    """The extensions of a VCEK as pairs of object identifier and DER, in the order of real certificates."""
    name = product.value.encode("ascii")
    turin = product is Product.TURIN
    parts = [(1, tcb.boot_loader), (2, tcb.tee), (3, tcb.snp), (5, 0), (6, 0), (7, 0), (8, tcb.microcode)]
    parts += [(9, tcb.fmc or 0)] if turin else [(4, 0)]
    return [
        (f"{_AMD}.1", _integer(1 if turin else 0)),
        (f"{_AMD}.2", bytes((0x16, len(name))) + name),
        *((f"{_AMD}.3.{number}", _integer(value)) for number, value in parts),
        (f"{_AMD}.4", chip_id[:8] if turin else chip_id),
    ]


def _integer(value: int) -> bytes:
    return bytes((2, 1, value)) if value < 0x80 else bytes((2, 2, 0, value))


def _name(common_name: str) -> x509.Name:
    return x509.Name(
        [x509.NameAttribute(NameOID.ORGANIZATION_NAME, _ORGANIZATION), x509.NameAttribute(NameOID.COMMON_NAME, common_name)]
    )


def _builder(subject: x509.Name, issuer: x509.Name, now: Instant, life: timedelta) -> x509.CertificateBuilder:
    start = to_datetime(now) - timedelta(hours=1)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + life)
    )


def _ca_certificate(
    subject: x509.Name,
    key: rsa.RSAPrivateKey,
    issuer: x509.Name,
    issuer_key: rsa.RSAPrivateKey,
    *,
    path_length: int | None,
    now: Instant,
) -> bytes:
    usage = x509.KeyUsage(
        key_cert_sign=True,
        crl_sign=path_length is None,
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
    builder = (
        _builder(subject, issuer, now, _CA_LIFE)
        .public_key(key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
        .add_extension(usage, critical=True)
    )
    return builder.sign(issuer_key, hashes.SHA384(), rsa_padding=_PSS).public_bytes(serialization.Encoding.DER)


def _write_key(path: Path, key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey) -> None:
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(pem)
