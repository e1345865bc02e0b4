"""The TLS key of a broker process: made in memory, certified under the HSM key, of one hour."""

from __future__ import annotations

import threading
from typing import Final

from moorline.channel.tls import TlsIdentity as SessionTlsIdentity
from moorline.clock import Clock
from moorline.hsm.issuing import HsmIdentity, TlsKey
from moorline.services.http import TlsIdentity
from moorline.wire.http import ClientIdentity

_TLS_LIFE_S: Final = 3000
_RENEW_BEFORE_S: Final = 1200


class TlsKeys:
    """The broker's TLS key of the hour, certified under the HSM key and replaced in time. Never on disk."""

    def __init__(self, identity: HsmIdentity, clock: Clock) -> None:
        self._identity, self._clock = identity, clock
        self._current: TlsKey | None = None
        self._turn = threading.Lock()

    def renew(self) -> None:
        """The next connection gets a new key under the HSM's certificate of now."""
        with self._turn:
            self._current = None

    def current(self) -> TlsKey:
        """A key whose certificate still has a while to live."""
        with self._turn:
            now = self._clock.now()
            if self._current is None or self._current.leaf.not_after - now < _RENEW_BEFORE_S:
                self._current = self._identity.certify_tls(now, life_s=_TLS_LIFE_S)
            return self._current

    def for_sessions(self) -> SessionTlsIdentity:
        """As the session port wants it."""
        held = self.current()
        return SessionTlsIdentity(key=held.key, chain=(held.leaf.der, *held.leaf.chain))

    def for_https(self) -> TlsIdentity:
        """As the HTTPS server wants it."""
        held = self.current()
        return TlsIdentity(chain_pem=held.leaf.pem_chain(), key_pem=held.key_pem())

    def for_client(self) -> ClientIdentity:
        """As an HTTPS client wants it."""
        held = self.current()
        return ClientIdentity(certificate_chain_pem=held.leaf.pem_chain(), private_key_pem=held.key_pem())
