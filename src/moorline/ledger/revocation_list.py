"""Everything one registrant has revoked, as a reader keeps it: proven number by number, under the ledger's digest. Pure.

A list that has the first n, with the digest that a proven count of n has, is all that the registrant had revoked in that
state: any other key of the registrant's revocations is absent there. Later states only add. So

1. a count that is higher asks for what is missing; nothing is said about the keys of that state before it is here
2. a count that is lower, of a state before the newest one that this list was held against, takes nothing off the list;
   of that one or a later one it is a contradiction, as another digest is. Raises NotAuthentic("ledger.revocations_differ")
3. what was read from a disk counts when a proven digest has shown that it is right, and not before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from moorline.digest import same, tagged_hash
from moorline.errors import NotAuthentic
from moorline.ledger.records import RevocationsRecord

NONE: Final = RevocationsRecord(count=0, digest=bytes(32))
"""What stands under a registrant that has revoked nothing."""


def digest_after(digest: bytes, keys: Iterable[str]) -> bytes:
    """The digest of a list that has these keys after what `digest` is of."""
    for key in keys:
        digest = tagged_hash("revocations", digest, key.encode())
    return digest


class RevocationList:
    """The first `count` revocations of a registrant. `keys` are those of a disk, believed as 3 says. Not for threads."""

    def __init__(self, registrant: str, keys: Sequence[str] = ()) -> None:
        self.registrant = registrant
        self._height = -1
        self._put_back(keys)

    def _put_back(self, keys: Sequence[str]) -> None:
        self._listed = set(keys)
        self.count, self._digest = len(keys), digest_after(NONE.digest, keys)

    def __contains__(self, key: str) -> bool:
        """Whether it was revoked; that it was not is for `light_client.unlisted` to say, about one state."""
        return key in self._listed

    @property
    def doubtful(self) -> bool:
        """3. Whether it has something that no proof has confirmed."""
        return self._height < 0 < self.count

    def forget(self) -> None:
        """Begin again: what was read from a disk is not what the ledger has."""
        if not self.doubtful:
            raise self._differs("a list that was proven is not forgotten")
        self._put_back(())

    def covers(self, found: RevocationsRecord, *, height: int) -> bool:
        """2. Whether this has all that this count, proven at this height, speaks of. Raises as 2 says."""
        if found.count > self.count:
            return False
        if found.count < self.count:
            if height >= self._height:
                raise self._differs("the ledger counts fewer than it showed before")
        elif not same(found.digest, self._digest):
            raise self._differs("the ledger's digest is of another list")
        else:
            self._height = max(height, self._height)
        return True

    def require_next(self, keys: Sequence[str], found: RevocationsRecord) -> bytes:
        """The digest after these keys, if they are those under the numbers count+1 to found.count, in order. Raises as 2."""
        if len(keys) != found.count - self.count or not all(map(self._own, keys)):
            raise self._differs("numbers are missing, or are of another registrant")
        digest = digest_after(self._digest, keys)
        if not same(digest, found.digest):
            raise self._differs("the ledger's digest is of another list")
        return digest

    def extend(self, keys: Sequence[str], found: RevocationsRecord, *, height: int) -> None:
        """1. Take them. Raises, and takes none, as `require_next`."""
        digest = self.require_next(keys, found)
        self._listed.update(keys)
        self.count, self._digest, self._height = found.count, digest, max(height, self._height)

    def _own(self, key: str) -> bool:
        """`revocation/<kind>/<registrant>/<id>`."""
        parts = key.split("/")
        return len(parts) == 4 and parts[0] == "revocation" and parts[2] == self.registrant

    def _differs(self, why: str) -> NotAuthentic:
        return NotAuthentic(
            "ledger.revocations_differ",
            f"what {self.registrant} revoked is not proven: {why}",
            expected=f"{self.count} as before, and what follows them",
            remedy="keep proof and service's database; if they are unchanged, the authorities signed two histories",
        )
