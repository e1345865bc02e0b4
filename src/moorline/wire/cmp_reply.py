"""CMP messages as they are written here, by the server and by our own client: body, header, the whole. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cryptography import x509

from moorline.wire.cmp import Body, Failure
from moorline.wire.cmp_elements import Algorithm
from moorline.wire.der import BIT_STRING, NULL, TIME, UTF8, bits, integer, octets, oid, sequence, tagged, tlv

_DIRECTORY_NAME: Final = 4


def encode_algorithm(one: Algorithm) -> bytes:
    """AlgorithmIdentifier."""
    return sequence(oid(one.oid), one.parameters)


def directory_name(name: x509.Name) -> bytes:
    """GeneralName of a distinguished name."""
    return tagged(_DIRECTORY_NAME, name.public_bytes())


def failure_info(failure: Failure) -> bytes:
    """PKIFailureInfo with one bit: DER leaves out trailing zero bits (X.690 11.2.2)."""
    size = failure // 8 + 1
    value = bytearray(size)
    value[failure // 8] = 0x80 >> failure % 8
    return tlv(BIT_STRING, bytes((7 - failure % 8,)) + bytes(value))


def status(number: int, *, says: str | None = None, failure: Failure | None = None) -> bytes:
    """PKIStatusInfo: 0 accepted, 2 rejection, 3 waiting."""
    text = b"" if says is None else sequence(tlv(UTF8, says.encode("utf-8")[:400]))
    return sequence(integer(number), text, b"" if failure is None else failure_info(failure))


def certificate_response(number: int, certificate: bytes, ca_certificates: tuple[bytes, ...]) -> bytes:
    """CertRepMessage with one certificate; `ca_certificates` become caPubs."""
    pair = sequence(tagged(0, certificate))
    response = sequence(integer(number), status(0), pair)
    public = tagged(1, sequence(*ca_certificates)) if ca_certificates else b""
    return sequence(public, sequence(response))


def revocation_response() -> bytes:
    """RevRepContent that says yes."""
    return sequence(sequence(status(0)))


def confirmed() -> bytes:
    """PKIConfirmContent."""
    return tlv(NULL, b"")


def error(failure: Failure, says: str) -> bytes:
    """ErrorMsgContent."""
    return sequence(status(2, says=says, failure=failure))


def general_response(infos: tuple[tuple[str, bytes], ...]) -> bytes:
    """GenRepContent: OIDs with their values (DER, may be empty)."""
    return sequence(*(sequence(oid(name), value) for name, value in infos))


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """An answer before its protection. `sender` and `recipient` are GeneralNames, DER; `time` is GeneralizedTime text."""

    sender: bytes
    recipient: bytes
    time: str
    algorithm: Algorithm
    reference: bytes | None
    transaction: bytes | None
    sender_nonce: bytes
    recipient_nonce: bytes | None
    body: Body
    content: bytes
    info: tuple[tuple[str, bytes], ...] = ()


def protected_part(reply: Reply) -> bytes:
    """What the protection of a reply is over: header and body."""
    return sequence(_encoded_header(reply), tagged(reply.body, reply.content))


def encode(reply: Reply, protection: bytes, extra_certificates: tuple[bytes, ...]) -> bytes:
    """The whole PKIMessage."""
    extra = tagged(1, sequence(*extra_certificates)) if extra_certificates else b""
    return sequence(_encoded_header(reply), tagged(reply.body, reply.content), tagged(0, bits(protection)), extra)


def _encoded_header(reply: Reply) -> bytes:
    def optional(number: int, value: bytes | None) -> bytes:
        return b"" if value is None else tagged(number, octets(value))

    info = tagged(8, sequence(*(sequence(oid(name), value) for name, value in reply.info))) if reply.info else b""
    return sequence(
        integer(2),
        reply.sender,
        reply.recipient,
        tagged(0, tlv(TIME, reply.time.encode("ascii"))),
        tagged(1, encode_algorithm(reply.algorithm)),
        optional(2, reply.reference),
        optional(4, reply.transaction),
        optional(5, reply.sender_nonce),
        optional(6, reply.recipient_nonce),
        info,
    )
