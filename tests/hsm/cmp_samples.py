"""A CMP message as it is written here; PBMAC1 parameters as a client would send them, and their MAC by openssl."""

from __future__ import annotations

from cryptography import x509
from foreign import openssl

from moorline.wire import cmp, cmp_mac, cmp_reply, der
from moorline.wire.cmp import Body


def sample():
    reply = cmp_reply.Reply(
        sender=cmp_reply.directory_name(x509.Name([])),
        recipient=cmp_reply.directory_name(x509.Name([])),
        time="20260101000000Z",
        algorithm=cmp.Algorithm(oid="1.2.840.10045.4.3.2", parameters=b""),
        reference=b"r",
        transaction=b"t" * 16,
        sender_nonce=b"n" * 16,
        recipient_nonce=b"m" * 16,
        body=Body.ERROR,
        content=cmp_reply.error(cmp.Failure.BAD_POP, "no"),
    )
    return reply, cmp_reply.encode(reply, b"signature", (b"\x30\x00",))


SHA = {"sha256": "1.2.840.113549.2.9", "sha384": "1.2.840.113549.2.10", "sha512": "1.2.840.113549.2.11"}


def pbmac1(*, prf="sha256", scheme="sha256", salt=b"s" * 16, iterations=1000, length=32, **other):
    """An AlgorithmIdentifier; `other` replaces OIDs."""
    inner = der.sequence(
        der.octets(salt),
        der.integer(iterations),
        b"" if length is None else der.integer(length),
        b"" if prf is None else der.sequence(der.oid(SHA.get(prf, prf)), b"\x05\x00"),
    )
    derivation = der.sequence(der.oid(other.get("derivation", "1.2.840.113549.1.5.12")), inner)
    parameters = der.sequence(derivation, der.sequence(der.oid(SHA.get(scheme, scheme)), b"\x05\x00"))
    return cmp.Algorithm(oid=cmp_mac.PBMAC1, parameters=parameters)


def by_openssl(folder, secret, data, *, prf, scheme, salt, iterations, length):
    """The same by openssl's own PBKDF2 and HMAC."""
    options = {"digest": prf, "pass": secret, "hexsalt": salt.hex(), "iter": str(iterations)}
    words = [word for name, value in options.items() for word in ("-kdfopt", f"{name}:{value}")]
    derived = openssl(folder, "kdf", "-keylen", str(length), *words, "PBKDF2", check=True).stdout.strip().replace(":", "")
    (folder / "data").write_bytes(data)
    words = ("-digest", scheme, "-macopt", f"hexkey:{derived}", "-in", "data", "HMAC")
    return bytes.fromhex(openssl(folder, "mac", *words, check=True).stdout.strip())
