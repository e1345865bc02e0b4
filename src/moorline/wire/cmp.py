"""CMPv2 messages (RFC 4210, RFC 9480) as far as the lightweight profile (RFC 9483) needs them. Pure.

This module gives the elements of a message (wire.cmp_elements) their meaning; messages are written by wire.cmp_reply, and
MACs are wire.cmp_mac's. Everything read is untrusted and either a value or
Malformed("cmp.malformed"). What a value establishes about its sender is for whoever verifies `Message.protected`
(services.broker_cmp).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final

from moorline.wire.cmp_elements import (
    Algorithm,
    Element,
    algorithm_of,
    bits_of,
    by_number,
    children,
    expected,
    first,
    integer_of,
    malformed,
    octets_of,
    oid_of,
    only,
    single,
)
from moorline.wire.der import INTEGER, OCTET_STRING, OID, SEQUENCE, TIME, tlv

CMP_CAP: Final = 64 * 1024
IMPLICIT_CONFIRM: Final = "1.3.6.1.5.5.7.4.13"
CONFIRM_WAIT_TIME: Final = "1.3.6.1.5.5.7.4.14"


class Body(IntEnum):
    """The kind of a message (tag of PKIBody)."""

    IR = 0
    IP = 1
    CR = 2
    CP = 3
    P10CR = 4
    KUR = 7
    KUP = 8
    RR = 11
    RP = 12
    PKICONF = 19
    GENM = 21
    GENP = 22
    ERROR = 23
    CERTCONF = 24


class Failure(IntEnum):
    """Bits of PKIFailureInfo (RFC 4210 5.2.3)."""

    BAD_ALG = 0
    BAD_MESSAGE_CHECK = 1
    BAD_REQUEST = 2
    BAD_TIME = 3
    BAD_CERT_ID = 4
    BAD_DATA_FORMAT = 5
    BAD_POP = 9
    CERT_REVOKED = 10
    BAD_RECIPIENT_NONCE = 13
    BAD_SENDER_NONCE = 18
    BAD_CERT_TEMPLATE = 19
    SIGNER_NOT_TRUSTED = 20
    TRANSACTION_ID_IN_USE = 21
    UNSUPPORTED_VERSION = 22
    NOT_AUTHORIZED = 23
    SYSTEM_UNAVAIL = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What this profile reads of PKIHeader. `sender` is the DER of its GeneralName; `reference` is senderKID."""

    version: int
    sender: bytes
    message_time: str | None
    algorithm: Algorithm | None
    reference: bytes | None
    transaction: bytes | None
    sender_nonce: bytes | None
    recipient_nonce: bytes | None
    info: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """A message. `protected` is what its protection is over; `extra_certificates` are DER, as sent."""

    header: Header
    body: Body
    content: Element
    protected: bytes
    protection: bytes | None
    extra_certificates: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CertRequest:
    """One CertReqMsg: its number, the key wanted (SPKI), and its proof of possession over `proven`, if any."""

    number: int
    public_key: bytes | None
    proven: bytes
    algorithm: Algorithm | None
    signature: bytes | None
    common_name: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Confirmation:
    """One CertStatus: the hash of the certificate, and whether the client takes it."""

    certificate_hash: bytes
    number: int
    accepted: bool
    hash_named: bool = field(default=False)


def parse(data: bytes) -> Message:
    """A PKIMessage. Raises only Malformed("cmp.malformed")."""
    if len(data) > CMP_CAP:
        raise malformed(f"{len(data)} bytes")
    parts = children(single(data, SEQUENCE).content)
    if len(parts) < 2 or parts[0].tag != SEQUENCE:
        raise malformed("a message begins with header and body")
    header, body = parts[0], parts[1]
    number = body.number
    if number is None or number not in Body.__members__.values():
        raise malformed(f"body of tag {body.tag:#x}")
    named = by_number(parts[2:])
    protection = None
    if 0 in named:
        protection = bits_of(only(named[0]))
    certificates: tuple[bytes, ...] = ()
    if 1 in named:
        certificates = tuple(one.der for one in children(only(named[1], SEQUENCE).content))
    return Message(
        header=_header(header),
        body=Body(number),
        content=only(body),
        protected=tlv(SEQUENCE, header.der + body.der),
        protection=protection,
        extra_certificates=certificates,
    )


def cert_requests(content: Element) -> tuple[CertRequest, ...]:
    """CertReqMessages of ir, cr and kur. Raises only Malformed."""
    return tuple(_cert_request(one) for one in children(expected(content, SEQUENCE)))


def certification_request(content: Element) -> bytes:
    """The PKCS#10 request (DER) of p10cr."""
    return content.der


def confirmations(content: Element) -> tuple[Confirmation, ...]:
    """CertConfirmContent. Raises only Malformed."""
    found = []
    for one in children(expected(content, SEQUENCE)):
        parts = children(expected(one, SEQUENCE))
        if len(parts) < 2 or parts[0].tag != OCTET_STRING:
            raise malformed("a certificate status without hash and number")
        status = [part for part in parts[2:] if part.tag == SEQUENCE]
        accepted = not status or integer_of(first(status[0].content)) in (0, 1)
        hash_named = any(part.number == 0 for part in parts[2:])
        found.append(
            Confirmation(
                certificate_hash=parts[0].content, number=integer_of(parts[1]), accepted=accepted, hash_named=hash_named
            )
        )
    return tuple(found)


def revocation(content: Element) -> tuple[int, int]:
    """Serial number and reason code (0 if none) of the one RevDetails of rr. Raises only Malformed."""
    details = children(expected(content, SEQUENCE))
    if len(details) != 1:
        raise malformed("one certificate a revocation request")
    parts = children(expected(details[0], SEQUENCE))
    if not parts:
        raise malformed("a revocation without a template")
    template = {part.tag & 0x1F: part for part in children(expected(parts[0], SEQUENCE)) if part.tag & 0xC0 == 0x80}
    if 1 not in template:
        raise malformed("a revocation without a serial number")
    serial = int.from_bytes(template[1].content, "big", signed=True)
    reason = 0
    for extension in children(expected(parts[1], SEQUENCE)) if len(parts) > 1 else ():
        fields = children(expected(extension, SEQUENCE))
        if fields and fields[0].tag == OID and oid_of(fields[0]) == "2.5.29.21":
            value = single(fields[-1].content, 0x0A)
            reason = int.from_bytes(value.content, "big", signed=True)
    return serial, reason


def info_types(content: Element) -> tuple[str, ...]:
    """The OIDs of a general message. Raises only Malformed."""
    return tuple(_info_type(one) for one in children(expected(content, SEQUENCE)))


def issued_certificate(content: Element) -> bytes:
    """The certificate (DER) of a CertRepMessage with one response that is granted. Raises Malformed."""
    parts = [part for part in children(expected(content, SEQUENCE)) if part.number is None]
    if len(parts) != 1:
        raise malformed("a certificate response of another shape")
    response = children(only(parts[0], SEQUENCE).content)
    if len(response) < 3 or integer_of(first(expected(response[1], SEQUENCE))) not in (0, 1):
        raise malformed("a certificate response without a certificate")
    pair = children(expected(response[2], SEQUENCE))
    if not pair or pair[0].number != 0:
        raise malformed("a certificate in another form")
    return only(pair[0], SEQUENCE).der


def error_text(content: Element) -> str:
    """What an error message says, for people; its first 200 characters that can be printed. Raises Malformed."""
    status_info = children(expected(first(expected(content, SEQUENCE)), SEQUENCE))
    texts = [one for part in status_info if part.tag == SEQUENCE for one in children(part.content)]
    said = " ".join(one.content.decode("utf-8", "replace") for one in texts)
    return "".join(letter for letter in said if letter.isprintable())[:200]


def algorithm(der: bytes) -> Algorithm:
    """An AlgorithmIdentifier from DER. Raises only Malformed."""
    return algorithm_of(single(der, SEQUENCE))


def _header(element: Element) -> Header:
    parts = children(element.content)
    if len(parts) < 3 or parts[0].tag != INTEGER:
        raise malformed("the header lacks version, sender or recipient")
    named = by_number(parts[3:])
    info: tuple[str, ...] = ()
    if 8 in named:
        info = tuple(_info_type(one) for one in children(only(named[8], SEQUENCE).content))
    time = None
    if 0 in named:
        time = only(named[0], TIME).content.decode("ascii", errors="replace")
    return Header(
        version=integer_of(parts[0]),
        sender=parts[1].der,
        message_time=time,
        algorithm=algorithm_of(only(named[1])) if 1 in named else None,
        reference=octets_of(named, 2),
        transaction=octets_of(named, 4),
        sender_nonce=octets_of(named, 5),
        recipient_nonce=octets_of(named, 6),
        info=info,
    )


def _cert_request(element: Element) -> CertRequest:
    parts = children(expected(element, SEQUENCE))
    if not parts:
        raise malformed("an empty certificate request")
    request = children(expected(parts[0], SEQUENCE))
    if len(request) < 2:
        raise malformed("a certificate request without number or template")
    template = {part.tag & 0x1F: part for part in children(expected(request[1], SEQUENCE)) if part.tag & 0xC0 == 0x80}
    key = template.get(6)
    made = CertRequest(
        number=integer_of(request[0]),
        public_key=None if key is None else tlv(SEQUENCE, key.content),
        proven=parts[0].der,
        algorithm=None,
        signature=None,
        common_name=_common_name(template.get(5)),
    )
    if len(parts) < 2 or parts[1].number != 1:
        return made
    pop = children(parts[1].content)
    if len(pop) != 2:  # poposkInput is for requests without a subject or key, which this profile does not take
        raise malformed("a proof of possession of another kind")
    return CertRequest(
        number=made.number,
        public_key=made.public_key,
        proven=made.proven,
        algorithm=algorithm_of(pop[0]),
        signature=bits_of(pop[1]),
        common_name=made.common_name,
    )


def _common_name(subject: Element | None) -> str | None:
    if subject is None:
        return None
    for rdn in children(single(subject.content, SEQUENCE).content):
        for attribute in children(rdn.content):
            parts = children(expected(attribute, SEQUENCE))
            if len(parts) == 2 and parts[0].tag == OID and oid_of(parts[0]) == "2.5.4.3":
                return parts[1].content.decode("utf-8", errors="replace")
    return None


def _info_type(element: Element) -> str:
    parts = children(expected(element, SEQUENCE))
    if not parts:
        raise malformed("an empty general info")
    return oid_of(parts[0])
