"""A TLS key for a device whose own key is in a token or TPM: made here, certified on the word of that key, an hour at most.

No TLS library here signs with such a key, so what ends a TLS connection is a key in `tls.pem` (mode 0600). It is replaced
before each connection when less than a third of its life is left. Who steals the file is the device until then; who steals
it later is nobody. The device's own key is needed for each next one.
"""

from __future__ import annotations

from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from moorline.clock import Instant
from moorline.device import enrolment
from moorline.device.store import DeviceStore

_LEFT: Final = 3


async def ensure(store: DeviceStore, now: Instant) -> None:
    """Have a TLS key that lives for a while yet; nothing happens for a device whose own key serves TLS.

    Raises as enrolment.renew.
    """
    if store.held_elsewhere and not _lives(store, now):
        key = ec.generate_private_key(ec.SECP256R1())
        chain = await enrolment.certified(store, key, now)
        store.keep_tls(key, chain.path[:-1])


def _lives(store: DeviceStore, now: Instant) -> bool:
    leaf = store.tls_leaf()
    if leaf is None:
        return False
    certificate = x509.load_der_x509_certificate(leaf)
    begins, ends = (int(at.timestamp()) for at in (certificate.not_valid_before_utc, certificate.not_valid_after_utc))
    return ends - now > (ends - begins) / _LEFT
