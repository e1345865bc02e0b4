"""Keys as people write them: which record a proof is asked about. Pure.

    provider/NAME  hsm/PROVIDER/ID  service/PROVIDER/NAME  platform/PROVIDER/ID  contract/ID
    revocation/KIND/ID            of a measurement, chip or vendor root, which a quorum revokes for everybody
    revocation/KIND/PROVIDER/ID   of what a provider registered, or of a measurement, chip or root that it revoked for itself

and the other kinds of ledger.records by their keys. A key that no record can have would always be "proven absent", so it is
refused: a slip of the pen must not read as "not revoked".
"""

from __future__ import annotations

from typing import Final

from moorline import nfv
from moorline.errors import Malformed, MoorlineError
from moorline.ledger import records
from moorline.ledger.records import CONSORTIUM, RevocationKind

GLOBAL_KINDS: Final = (RevocationKind.MEASUREMENT, RevocationKind.CHIP, RevocationKind.VENDOR_ROOT)
_PARTS: Final = {
    "authority": 1,
    "parameter": 1,
    "proposal": 1,
    "provider": 1,
    "contract": 1,
    "issuing-ca": 2,
    "hsm": 2,
    "orchestrator": 2,
    "service": 2,
    "platform": 2,
    "reference-values": 2,
    "audit-anchor": 2,
}


def parse(text: str) -> str:
    """The key of the record that `text` names; raises only Malformed("ledger.key_malformed")."""
    kind, *rest = text.split("/")
    if kind == "revocation":
        return _revocation(text, rest)
    if kind == "index":  # of the state machine: what it holds is not for people to guess
        return text
    if _PARTS.get(kind) != len(rest):
        raise _malformed(text, "no record has such a key")
    if kind == "parameter":
        return text
    for part in rest[:-1]:
        _named(text, part)
    _identified(text, rest[-1])
    return text


def _revocation(text: str, rest: list[str]) -> str:
    try:
        kind = RevocationKind(rest[0] if rest else "")
    except ValueError:
        raise _malformed(text, f"a revocation is of a kind: {', '.join(RevocationKind)}") from None
    if len(rest) == 2:
        if kind not in GLOBAL_KINDS:
            raise _malformed(text, f"whose {kind.value}? write revocation/{kind.value}/PROVIDER/ID")
        rest = [rest[0], CONSORTIUM, rest[1]]
    if len(rest) != 3:
        raise _malformed(text, "a revocation names a kind, whose it is, and an id")
    _named(text, rest[1])
    _identified(text, rest[2])
    return records.revocation_key(kind, rest[1], rest[2])


def _named(text: str, part: str) -> None:
    try:
        nfv.parse_name(part, "name")
    except MoorlineError as error:
        raise _malformed(text, error.says) from None


def _identified(text: str, part: str) -> None:
    try:
        records.parse_id(part, "it")
    except MoorlineError:
        raise _malformed(text, "an id is 1 to 128 of a-z 0-9 -") from None


def _malformed(text: str, why: str) -> Malformed:
    return Malformed(
        "ledger.key_malformed",
        f"this names no record: {why}",
        expected="provider/NAME, hsm/PROVIDER/ID, service/PROVIDER/NAME, platform/PROVIDER/ID, contract/ID, "
        "revocation/KIND/ID or revocation/KIND/PROVIDER/ID",
        got=text,
    )
