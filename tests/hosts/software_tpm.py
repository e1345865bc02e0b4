"""The signing half of a TPM in software, for tests that need quotes wrong in exactly one way."""

from cryptography.hazmat.primitives.asymmetric import ec

from moorline.evidence import tpm_structures as tpm
from moorline.evidence.tpm_quote import ClockInfo, Quote, serialize_quote
from moorline.wire import keys


def public_area(key, *, attributes):
    """TPMT_PUBLIC of a P-256 key that signs."""
    numbers = key.public_numbers()
    parameters = tpm.EccParameters(
        symmetric=(tpm.ALG_NULL, 0, 0),
        scheme=tpm.ALG_ECDSA,
        scheme_hash=tpm.ALG_SHA256,
        scheme_count=0,
        curve=tpm.CURVE_P256,
        kdf=tpm.ALG_NULL,
        kdf_hash=0,
        x=numbers.x.to_bytes(32, "big"),
        y=numbers.y.to_bytes(32, "big"),
    )
    return tpm.serialize_public(
        tpm.Public(name_algorithm=tpm.ALG_SHA256, attributes=attributes, policy=b"", parameters=parameters, encoded=b"")
    )


class SoftwareTpm:
    """The signing half of a TPM in software: makes quotes that differ in exactly what a test wants."""

    def __init__(self, *, attributes=0x50472):
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.public = public_area(self.key.public_key(), attributes=attributes)

    def quote(self, nonce, pcrs, *, bank=tpm.ALG_SHA256, selections=None, clock=ClockInfo(1000, 1, 0, safe=True)):  # noqa: B008
        digest = tpm.digest(tpm.ALG_SHA256, b"".join(pcrs[index] for index in sorted(pcrs)))
        chosen = selections or (tpm.select(bank, tuple(sorted(pcrs))),)
        message = serialize_quote(Quote(b"\x00\x0b" + bytes(32), nonce, clock, 7, chosen, digest))
        return message, self.sign(message)

    def sign(self, message):
        raw = keys.KeySigner(self.key).sign(message)
        return tpm.serialize_signature(tpm.Signature(tpm.ALG_ECDSA, tpm.ALG_SHA256, raw[:32], raw[32:]))
