"""The TLS key of a broker process: made in memory, certified under the HSM key, of one hour."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Final

from moorline.channel.tls import TlsIdentity as SessionTlsIdentity
from moorline.clock import Clock
from moorline.hsm.issuing import HsmIdentity, TlsKey
from moorline.services.http import TlsIdentity
from moorline.wire.http import ClientIdentity

_TLS_LIFE_S: Final = 3000
_RENEW_BEFORE_S: Final = 1200


@dataclass(frozen=True, slots=True, kw_only=True)
class _Held:
    """One TLS key, in the forms in which it is asked for at every connection."""

    key: TlsKey
    sessions: SessionTlsIdentity
    https: TlsIdentity
    client: ClientIdentity


class TlsKeys:
    """The broker's TLS key of the hour, certified under the HSM key and replaced in time. Never on disk."""

    def __init__(self, identity: HsmIdentity, clock: Clock) -> None:
        self._identity, self._clock = identity, clock
        self._held: _Held | None = None
        self._turn = threading.Lock()

    def renew(self) -> None:
        """The next connection gets a new key under the HSM's certificate of now."""
        with self._turn:
            self._held = None

    def for_sessions(self) -> SessionTlsIdentity:
        """As the session port wants it; the same object while the key is the same."""
        return self._current().sessions

    def for_https(self) -> TlsIdentity:
        """As the HTTPS server wants it."""
        return self._current().https

    def for_client(self) -> ClientIdentity:
        """As an HTTPS client wants it."""
        return self._current().client

    def _current(self) -> _Held:
        """A key whose certificate still has a while to live."""
        with self._turn:
            now = self._clock.now()
            if self._held is None or self._held.key.leaf.not_after - now < _RENEW_BEFORE_S:
                self._held = _held(self._identity.certify_tls(now, life_s=_TLS_LIFE_S))
            return self._held


def _held(made: TlsKey) -> _Held:
    chain_pem, key_pem = made.leaf.pem_chain(), made.key_pem()
    return _Held(
        key=made,
        sessions=SessionTlsIdentity(key=made.key, chain=(made.leaf.der, *made.leaf.chain)),
        https=TlsIdentity(chain_pem=chain_pem, key_pem=key_pem),
        client=ClientIdentity(certificate_chain_pem=chain_pem, private_key_pem=key_pem),
    )
