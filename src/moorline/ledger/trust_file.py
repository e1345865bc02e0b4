"""A trust file for people: what proofs are verified against, in TOML (docs/spec/ledger-proof-bundle.md). Pure.

    ledger = "bcd89274..."             the ledger id, 64 hex digits
    quorum = 3                         how many authorities must sign; at least floor(2n/3)+1 of those below
    max_age_s = 30                     how old a proof may be
    simulated_allowed = true           whether this verifier accepts a ledger that allows simulated hardware
    known = 2026-11-27T12:00:00Z       when the authorities below were known to be in force
    trusting_period_s = 15552000       for how long from then on, or from what was verified since, they are believed

and either the authorities' keys or the genesis that has them:

    genesis = "genesis.cbor"           beside this file; its ledger id has to be the one above

    [authorities]
    authority-1 = "3c1f..."            raw Ed25519 checkpoint key, 64 hex digits

Every field but one of the last two is there, and no other: what is left out is refused, never assumed. The binary trust file
(trust.cbor) says the same and the consortium's root certificates besides.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from datetime import datetime
from typing import Final

from moorline.clock import Instant, rendered
from moorline.digest import same
from moorline.errors import Malformed
from moorline.ledger import genesis
from moorline.ledger.genesis import Genesis
from moorline.ledger.light_client import MAX_TRUST_BYTES, LedgerTrust

_ALWAYS: Final = frozenset({"ledger", "quorum", "max_age_s", "simulated_allowed", "known", "trusting_period_s"})


def parse(data: bytes, read: Callable[[str], bytes]) -> LedgerTrust:
    """The trust in a file, TOML or binary; `read` gives a file that it names.

    Raises Malformed("ledger.trust_malformed") and what `read` raises. A quorum that faulty authorities could defeat is
    malformed too. It does not establish that the file is the right one: whoever wrote it is believed.
    """
    if data[:1] == b"\xa8":  # a CBOR map of eight fields; no TOML begins so, since it is no UTF-8
        return LedgerTrust.parse(data)
    try:
        text = data.decode("utf-8") if len(data) <= MAX_TRUST_BYTES else ""
        found = tomllib.loads(text)
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise _malformed("it is no TOML", got=error) from None
    names = set(found)
    if names not in ({*_ALWAYS, "genesis"}, {*_ALWAYS, "authorities"}):
        raise _malformed("it has not exactly its fields", got=", ".join(sorted(names)) or "nothing")
    if isinstance(found.get("genesis"), str):
        return _from_genesis(found, genesis.parse(read(found["genesis"])))
    return LedgerTrust.parse(_trust(found, _authorities(found.get("authorities")), roots=()).encode())


def render(trust: LedgerTrust) -> str:
    """The same as TOML, its authorities spelled out. Root certificates are left out: proofs need none."""
    lines = [
        "# What proofs of this ledger are verified against: moor ledger verify FILE --trust trust.toml",
        f'ledger = "{trust.ledger_id.hex()}"',
        f"quorum = {trust.quorum}",
        f"max_age_s = {trust.max_age_s}",
        f"simulated_allowed = {str(trust.simulated_allowed).lower()}",
        f"known = {rendered(Instant(trust.known_s))}",
        f"trusting_period_s = {trust.trusting_period_s}",
        "",
        "[authorities]",
        *(f'{name} = "{key.hex()}"' for name, key in sorted(trust.authorities.items())),
    ]
    return "\n".join(lines) + "\n"


def _from_genesis(found: dict[str, object], start: Genesis) -> LedgerTrust:
    known = start.trust()
    trust = _trust(found, known.authorities, roots=known.roots)
    if not same(trust.ledger_id, known.ledger_id) or trust.simulated_allowed != known.simulated_allowed:
        raise _malformed("the genesis it names is of another ledger", got=known.ledger_id)
    return LedgerTrust.parse(trust.encode())


def _trust(found: dict[str, object], authorities: dict[str, bytes], *, roots: tuple[bytes, ...]) -> LedgerTrust:
    numbers = [found[name] for name in ("quorum", "max_age_s", "trusting_period_s")]
    quorum, max_age_s, period_s = (one if type(one) is int else 0 for one in numbers)
    simulated, known = found["simulated_allowed"], found["known"]
    if type(simulated) is not bool or min(quorum, max_age_s, period_s) < 1:
        raise _malformed("quorum, max_age_s, trusting_period_s are whole numbers from 1, simulated_allowed is true or false")
    if not isinstance(known, datetime) or known.tzinfo is None or known.timestamp() < 0:
        raise _malformed("known is a time with its offset, such as 2026-11-27T12:00:00Z")
    return LedgerTrust(
        ledger_id=_key(found["ledger"]),
        authorities=authorities,
        quorum=quorum,
        roots=roots,
        simulated_allowed=simulated,
        max_age_s=max_age_s,
        known_s=int(known.timestamp()),
        trusting_period_s=period_s,
    )


def _authorities(found: object) -> dict[str, bytes]:
    if not isinstance(found, dict):
        raise _malformed("it names no authorities")
    known = {str(name): _key(key) for name, key in found.items()}
    if len(set(known.values())) != len(known):
        raise _malformed("two authorities have one key")  # one signer would count as two
    return known


def _key(found: object) -> bytes:
    try:
        key = bytes.fromhex(found) if isinstance(found, str) else b""
    except ValueError:
        key = b""
    if len(key) != 32:
        raise _malformed("ledger ids and keys are 64 hex digits", got=found)
    return key


def _malformed(why: str, *, got: object = None) -> Malformed:
    return Malformed(
        "ledger.trust_malformed",
        f"the trust file cannot be used: {why}",
        expected=f"{', '.join(sorted(_ALWAYS))}, and genesis or [authorities]",
        got=got,
        remedy="make one: moor ledger trust --genesis genesis.cbor -o trust.toml",
    )
