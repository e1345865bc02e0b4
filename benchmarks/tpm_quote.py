"""TPM quotes verified a second, warm, against the bare P-256 verification that each needs, in the same run and library."""

import time

import host_poll
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from moorline.evidence import tpm_structures as tpm
from moorline.evidence.tpm_quote import ClockInfo, Quote, serialize_quote
from moorline.rats import EvidenceRoot
from moorline.verification.tpm_quote import attestation_key, verify_quote
from moorline.wire import keys

SELECTIONS = (tuple(range(11)), tuple(range(24)))
NONCE = bytes(range(32))
ROUNDS = 5
EACH = 2000


def quote_and_key(selected):
    key = ec.generate_private_key(ec.SECP256R1())
    pcrs = {index: bytes([index]) * 32 for index in selected}
    digest = tpm.digest(tpm.ALG_SHA256, b"".join(pcrs[index] for index in selected))
    selections = (tpm.select(tpm.ALG_SHA256, selected),)
    message = serialize_quote(Quote(b"\x00\x0b" + bytes(32), NONCE, ClockInfo(1, 1, 0, safe=True), 1, selections, digest))
    raw = keys.KeySigner(key).sign(message)
    blob = tpm.serialize_signature(tpm.Signature(tpm.ALG_ECDSA, tpm.ALG_SHA256, raw[:32], raw[32:]))
    return key.public_key(), host_poll.ak_public(key), message, raw, blob, pcrs


def rate(work):
    start = time.perf_counter()
    for _ in range(EACH):
        work()
    return EACH / (time.perf_counter() - start)


def main():
    for selected in SELECTIONS:
        compare(selected)


def compare(selected):
    public, ak_public, message, raw, blob, pcrs = quote_and_key(selected)
    der = encode_dss_signature(int.from_bytes(raw[:32], "big"), int.from_bytes(raw[32:], "big"))
    scheme = ec.ECDSA(hashes.SHA256())

    def bare():
        public.verify(der, message, scheme)

    def whole():
        key = attestation_key(ak_public, EvidenceRoot.TEST)
        verify_quote(message, blob, pcrs, key=key, qualifying=NONCE, bank=tpm.ALG_SHA256, selection=selected)

    rates = [(rate(bare), rate(whole)) for _ in range(ROUNDS)]  # interleaved, so that both see the same machine
    bare_rate, whole_rate = max(one for one, _ in rates), max(one for _, one in rates)
    print(f"bare P-256 verification, SHA-256   {bare_rate:10.0f} /s")
    ratio = f"ratio {whole_rate / bare_rate:.2f} (target >= 0.60)"
    print(f"TPM quote verified, {len(selected)} PCRs, warm  {whole_rate:10.0f} /s   {ratio}")


if __name__ == "__main__":
    main()
