"""The keys that sign an attestation authority's results, through their lives: the active one signs, others are believed.

A result is believed while the key that signed it is active or retiring. A pre-active key is told to relying parties ahead
(`announced`), so that none of them refuses the first result under it.
"""

from __future__ import annotations

from collections.abc import Sequence

from moorline.hsm import lifecycle
from moorline.hsm.keys import VERIFIER, TokenEcKey, point_key
from moorline.hsm.lifecycle import State, Use
from moorline.hsm.token import Token
from moorline.storage.hsm_store import KeyRow
from moorline.wire import keys


class VerifierKeys:
    """The verifier keys in one token."""

    def __init__(self, token: Token, rows: Sequence[KeyRow]) -> None:
        self._token = token
        self._labels: tuple[str, ...] = ()
        self._accepted: tuple[keys.PublicKey, ...] = ()
        self._announced: tuple[keys.PublicKey, ...] = ()
        self.follow(rows)

    def follow(self, rows: Sequence[KeyRow]) -> None:
        """Act on what the rows say. Raises Misconfigured("token.key_missing") and changes nothing then."""
        labels = lifecycle.usable(rows, VERIFIER, Use.BEGUN) or (VERIFIER,)
        coming = tuple(row.label for row in rows if row.role == VERIFIER and row.state == State.PRE_ACTIVE)
        if labels != self._labels:
            signer = keys.KeySigner(TokenEcKey(self._token, labels[0]))
            self._accepted = tuple(point_key(self._token.ec_point(label)) for label in labels)
            self._labels, self.signer = labels, signer
        made = tuple(label for label in coming if self._token.has_key(label))
        self._announced = tuple(point_key(self._token.ec_point(label)) for label in made)

    @property
    def label(self) -> str:
        """The key in the token that signs."""
        return self._labels[0]

    def accepted(self) -> tuple[keys.PublicKey, ...]:
        """Whose signatures count now, the active key first."""
        return self._accepted

    def announced(self) -> tuple[keys.PublicKey, ...]:
        """What relying parties are to know: the accepted ones, and those that are going to sign."""
        return (*self._accepted, *self._announced)
