"""CMPv2 messages (RFC 4210, RFC 9480) as far as the lightweight profile (RFC 9483) needs them. Pure.

DER is read by `cryptography.hazmat.asn1`, which takes definite lengths in their shortest form only; this module gives
the elements their meaning and writes answers. Everything read is untrusted and either a value or
Malformed("cmp.malformed"). What a value establishes about its sender is for whoever verifies `Message.protected`
(services.broker_cmp).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final

from cryptography import x509
from cryptography.hazmat import asn1

from moorline.errors import Malformed
from moorline.wire.der import (
    BIT_STRING,
    INTEGER,
    NULL,
    OCTET_STRING,
    OID,
    SEQUENCE,
    TIME,
    UTF8,
    bits,
    integer,
    octets,
    oid,
    sequence,
    tagged,
    tlv,
)

CMP_CAP: Final = 64 * 1024
_ITEMS: Final = 64
_DIRECTORY_NAME: Final = 4
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


@asn1.sequence
class _Items:
    values: list[asn1.TLV]


@dataclass(frozen=True, slots=True, kw_only=True)
class Element:
    """One DER element: its tag byte and content."""

    tag: int
    content: bytes

    @property
    def der(self) -> bytes:
        """The element as it was read: DER has one encoding."""
        return tlv(self.tag, self.content)

    @property
    def number(self) -> int | None:
        """N of a context tag [n] that is constructed; None for other tags."""
        return self.tag & 0x1F if self.tag & 0xE0 == 0xA0 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Algorithm:
    """An AlgorithmIdentifier: OID (dotted) and the DER of its parameters, empty if there are none."""

    oid: str
    parameters: bytes


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


# Reading ---------------------------------------------------------------------------------------------------------------


def parse(data: bytes) -> Message:
    """A PKIMessage. Raises only Malformed("cmp.malformed")."""
    if len(data) > CMP_CAP:
        raise _malformed(f"{len(data)} bytes")
    parts = _children(_one(data, SEQUENCE).content)
    if len(parts) < 2 or parts[0].tag != SEQUENCE:
        raise _malformed("a message begins with header and body")
    header, body = parts[0], parts[1]
    number = body.number
    if number is None or number not in Body.__members__.values():
        raise _malformed(f"body of tag {body.tag:#x}")
    named = _by_number(parts[2:])
    protection = None
    if 0 in named:
        protection = _bits(_only(named[0]))
    certificates: tuple[bytes, ...] = ()
    if 1 in named:
        certificates = tuple(one.der for one in _children(_only(named[1], SEQUENCE).content))
    return Message(
        header=_header(header),
        body=Body(number),
        content=_only(body),
        protected=tlv(SEQUENCE, header.der + body.der),
        protection=protection,
        extra_certificates=certificates,
    )


def cert_requests(content: Element) -> tuple[CertRequest, ...]:
    """CertReqMessages of ir, cr and kur. Raises only Malformed."""
    return tuple(_cert_request(one) for one in _children(_expected(content, SEQUENCE)))


def certification_request(content: Element) -> bytes:
    """The PKCS#10 request (DER) of p10cr."""
    return content.der


def confirmations(content: Element) -> tuple[Confirmation, ...]:
    """CertConfirmContent. Raises only Malformed."""
    found = []
    for one in _children(_expected(content, SEQUENCE)):
        parts = _children(_expected(one, SEQUENCE))
        if len(parts) < 2 or parts[0].tag != OCTET_STRING:
            raise _malformed("a certificate status without hash and number")
        status = [part for part in parts[2:] if part.tag == SEQUENCE]
        accepted = not status or _integer(_children(status[0].content)[0]) in (0, 1)
        hash_named = any(part.number == 0 for part in parts[2:])
        found.append(
            Confirmation(
                certificate_hash=parts[0].content, number=_integer(parts[1]), accepted=accepted, hash_named=hash_named
            )
        )
    return tuple(found)


def revocation(content: Element) -> tuple[int, int]:
    """Serial number and reason code (0 if none) of the one RevDetails of rr. Raises only Malformed."""
    details = _children(_expected(content, SEQUENCE))
    if len(details) != 1:
        raise _malformed("one certificate a revocation request")
    parts = _children(_expected(details[0], SEQUENCE))
    if not parts:
        raise _malformed("a revocation without a template")
    template = {part.tag & 0x1F: part for part in _children(_expected(parts[0], SEQUENCE)) if part.tag & 0xC0 == 0x80}
    if 1 not in template:
        raise _malformed("a revocation without a serial number")
    serial = int.from_bytes(template[1].content, "big", signed=True)
    reason = 0
    for extension in _children(_expected(parts[1], SEQUENCE)) if len(parts) > 1 else ():
        fields = _children(_expected(extension, SEQUENCE))
        if fields and fields[0].tag == OID and _oid(fields[0]) == "2.5.29.21":
            value = _one(fields[-1].content, 0x0A)
            reason = int.from_bytes(value.content, "big", signed=True)
    return serial, reason


def info_types(content: Element) -> tuple[str, ...]:
    """The OIDs of a general message. Raises only Malformed."""
    return tuple(_info_type(one) for one in _children(_expected(content, SEQUENCE)))


def issued_certificate(content: Element) -> bytes:
    """The certificate (DER) of a CertRepMessage with one response that is granted. Raises Malformed."""
    parts = [part for part in _children(_expected(content, SEQUENCE)) if part.number is None]
    if len(parts) != 1:
        raise _malformed("a certificate response of another shape")
    response = _children(_only(parts[0], SEQUENCE).content)
    if len(response) < 3 or _integer(_children(_expected(response[1], SEQUENCE))[0]) not in (0, 1):
        raise _malformed("a certificate response without a certificate")
    pair = _children(_expected(response[2], SEQUENCE))
    if not pair or pair[0].number != 0:
        raise _malformed("a certificate in another form")
    return _only(pair[0], SEQUENCE).der


def error_text(content: Element) -> str:
    """What an error message says, for people; its first 200 characters that can be printed. Raises Malformed."""
    status_info = _children(_expected(_children(_expected(content, SEQUENCE))[0], SEQUENCE))
    texts = [one for part in status_info if part.tag == SEQUENCE for one in _children(part.content)]
    said = " ".join(one.content.decode("utf-8", "replace") for one in texts)
    return "".join(letter for letter in said if letter.isprintable())[:200]


def algorithm(der: bytes) -> Algorithm:
    """An AlgorithmIdentifier from DER. Raises only Malformed."""
    return _algorithm(_one(der, SEQUENCE))


def pbm_parameters(der: bytes) -> tuple[bytes, str, int, str]:
    """salt, one-way function, iteration count and MAC of PBMParameter (RFC 4210 5.1.3.1). Raises only Malformed."""
    parts = _children(_one(der, SEQUENCE).content)
    if len(parts) != 4 or parts[0].tag != OCTET_STRING:
        raise _malformed("PBMParameter")
    return parts[0].content, _algorithm(parts[1]).oid, _integer(parts[2]), _algorithm(parts[3]).oid


@dataclass(frozen=True, slots=True, kw_only=True)
class Pbmac1:
    """PBMAC1-params (RFC 8018 A.5) with PBKDF2-params: OIDs, salt, iterations; `key_length` None: left out."""

    derivation: str
    salt: bytes
    iterations: int
    key_length: int | None
    prf: str
    scheme: str


def pbmac1_parameters(der: bytes) -> Pbmac1:
    """What PBMAC1 is to be computed with. Raises only Malformed."""
    parts = _children(_one(der, SEQUENCE).content)
    if len(parts) != 2:
        raise _malformed("PBMAC1 parameters")
    derivation = _algorithm(parts[0])
    inner = _children(_one(derivation.parameters, SEQUENCE).content)
    if len(inner) < 2 or inner[0].tag != OCTET_STRING:
        raise _malformed("PBKDF2 parameters")
    rest = inner[2:]
    length = _integer(rest.pop(0)) if rest and rest[0].tag == INTEGER else None
    prf = _algorithm(rest.pop(0)).oid if rest else "1.2.840.113549.2.7"  # DEFAULT hmacWithSHA1
    if rest:
        raise _malformed("PBKDF2 parameters with more than there are")
    return Pbmac1(
        derivation=derivation.oid,
        salt=inner[0].content,
        iterations=_integer(inner[1]),
        key_length=length,
        prf=prf,
        scheme=_algorithm(parts[1]).oid,
    )


def _header(element: Element) -> Header:
    parts = _children(element.content)
    if len(parts) < 3 or parts[0].tag != INTEGER:
        raise _malformed("the header lacks version, sender or recipient")
    named = _by_number(parts[3:])
    info: tuple[str, ...] = ()
    if 8 in named:
        info = tuple(_info_type(one) for one in _children(_only(named[8], SEQUENCE).content))
    time = None
    if 0 in named:
        time = _only(named[0], TIME).content.decode("ascii", errors="replace")
    return Header(
        version=_integer(parts[0]),
        sender=parts[1].der,
        message_time=time,
        algorithm=_algorithm(_only(named[1])) if 1 in named else None,
        reference=_octets(named, 2),
        transaction=_octets(named, 4),
        sender_nonce=_octets(named, 5),
        recipient_nonce=_octets(named, 6),
        info=info,
    )


def _cert_request(element: Element) -> CertRequest:
    parts = _children(_expected(element, SEQUENCE))
    if not parts:
        raise _malformed("an empty certificate request")
    request = _children(_expected(parts[0], SEQUENCE))
    if len(request) < 2:
        raise _malformed("a certificate request without number or template")
    template = {part.tag & 0x1F: part for part in _children(_expected(request[1], SEQUENCE)) if part.tag & 0xC0 == 0x80}
    key = template.get(6)
    made = CertRequest(
        number=_integer(request[0]),
        public_key=None if key is None else tlv(SEQUENCE, key.content),
        proven=parts[0].der,
        algorithm=None,
        signature=None,
        common_name=_common_name(template.get(5)),
    )
    if len(parts) < 2 or parts[1].number != 1:
        return made
    pop = _children(parts[1].content)
    if len(pop) != 2:  # poposkInput is for requests without a subject or key, which this profile does not take
        raise _malformed("a proof of possession of another kind")
    return CertRequest(
        number=made.number,
        public_key=made.public_key,
        proven=made.proven,
        algorithm=_algorithm(pop[0]),
        signature=_bits(pop[1]),
        common_name=made.common_name,
    )


def _common_name(subject: Element | None) -> str | None:
    if subject is None:
        return None
    for rdn in _children(_one(subject.content, SEQUENCE).content):
        for attribute in _children(rdn.content):
            parts = _children(_expected(attribute, SEQUENCE))
            if len(parts) == 2 and parts[0].tag == OID and _oid(parts[0]) == "2.5.4.3":
                return parts[1].content.decode("utf-8", errors="replace")
    return None


def _children(content: bytes) -> list[Element]:
    try:
        found = asn1.decode_der(_Items, tlv(SEQUENCE, tlv(SEQUENCE, content))).values
        made = [Element(tag=_tag(one.tag_bytes), content=bytes(one.data)) for one in found]
    except Malformed:
        raise
    except Exception as error:  # the decoder raises ValueError and others on odd bytes
        raise _malformed(type(error).__name__) from None
    if len(made) > _ITEMS:
        raise _malformed(f"{len(made)} elements in one")
    return made


def _tag(tag: bytes) -> int:
    if len(tag) != 1:
        raise _malformed("a tag above 30")
    return tag[0]


def _one(data: bytes, tag: int) -> Element:
    found = _children(data)
    if len(found) != 1 or found[0].tag != tag:
        raise _malformed(f"not one element of tag {tag:#x}")
    return found[0]


def _only(outer: Element, tag: int | None = None) -> Element:
    found = _children(outer.content)
    if len(found) != 1 or (tag is not None and found[0].tag != tag):
        raise _malformed(f"not one element within {outer.tag:#x}")
    return found[0]


def _expected(element: Element, tag: int) -> bytes:
    if element.tag != tag:
        raise _malformed(f"tag {element.tag:#x} where {tag:#x} belongs")
    return element.content


def _by_number(parts: list[Element]) -> dict[int, Element]:
    named: dict[int, Element] = {}
    for part in parts:
        number = part.number
        if number is None or number in named or (named and number < max(named)):
            raise _malformed("optional fields are out of order")
        named[number] = part
    return named


def _octets(named: dict[int, Element], number: int) -> bytes | None:
    return _only(named[number], OCTET_STRING).content if number in named else None


def _integer(element: Element) -> int:
    content = _expected(element, INTEGER)
    if not 0 < len(content) <= 20:
        raise _malformed("an integer of odd length")
    return int.from_bytes(content, "big", signed=True)


def _bits(element: Element) -> bytes:
    content = _expected(element, BIT_STRING)
    if not content or content[0] != 0:
        raise _malformed("a bit string that is not whole bytes")
    return content[1:]


def _oid(element: Element) -> str:
    content = _expected(element, OID)
    try:
        return str(asn1.decode_der(x509.ObjectIdentifier, tlv(OID, content)).dotted_string)
    except Exception as error:  # as in _children
        raise _malformed(type(error).__name__) from None


def _algorithm(element: Element) -> Algorithm:
    parts = _children(_expected(element, SEQUENCE))
    if not parts or len(parts) > 2:
        raise _malformed("an algorithm identifier")
    return Algorithm(oid=_oid(parts[0]), parameters=parts[1].der if len(parts) == 2 else b"")


def _info_type(element: Element) -> str:
    parts = _children(_expected(element, SEQUENCE))
    if not parts:
        raise _malformed("an empty general info")
    return _oid(parts[0])


def _malformed(got: str) -> Malformed:
    return Malformed("cmp.malformed", "the bytes are not a CMP message of this profile", got=got)


# Writing ---------------------------------------------------------------------------------------------------------------


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
