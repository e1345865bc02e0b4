"""Launch intents: signed by an orchestrator, judged by a launcher against the ledger (PROTOCOLS.md 3, Launcher).

Both sides use this file, so that the orchestrator sends a proof of exactly the records that the launcher asks about.

A launcher permits an intent if:

1. it is a COSE_Sign1 for this purpose, and its payload parses;
2. ledger and provider in it are the launcher's own;
3. the proof bundle holds under the launcher's ledger trust, is fresh, and does not go back;
4. the orchestrator it names is registered and active, and its registered key signed the intent;
5. the service is active, allows this package with this measurement, and offers this channel profile;
6. the host is an active platform of the provider whose registered chip is the intent's;
7. neither host, chip nor measurement is revoked, by the provider or by a quorum for everybody;
8. the intent has not expired, and does not reach further than `MAX_LIFE_S` ahead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from moorline.clock import Instant, rendered
from moorline.digest import Digest256
from moorline.errors import Refused
from moorline.ledger import standing
from moorline.ledger.light_client import LedgerTrust, ProvenState, verify_bundle
from moorline.ledger.records import CONSORTIUM, RevocationKind
from moorline.wire import cose, keys, schema
from moorline.wire.orchestration import INTENT_PURPOSE, LaunchIntent, LaunchRequest, intent_digest

MAX_LIFE_S: Final = 3600


@dataclass(frozen=True, slots=True, kw_only=True)
class Permitted:
    """An intent that may be launched, as of one proven state of the ledger. Made by `permit` only."""

    intent: LaunchIntent
    digest: Digest256
    state: ProvenState


def sign(intent: LaunchIntent, signer: keys.Signer) -> bytes:
    """The intent as it travels and is recorded: COSE_Sign1 by the orchestrator's registered key."""
    return cose.sign(INTENT_PURPOSE, schema.encode(intent), signer)


def parse(signed: bytes) -> LaunchIntent:
    """The intent in a COSE_Sign1, not verified; raises only Malformed. For one's own record, or before `permit`."""
    return schema.decode(LaunchIntent, cose.parse(INTENT_PURPOSE, signed, max_bytes=8192).payload, max_bytes=8192)


def keys_to_prove(intent: LaunchIntent) -> tuple[str, ...]:
    """The ledger keys that `permit` asks about."""
    asked = (
        *standing.orchestrator_keys(intent.provider, intent.orchestrator),
        *standing.service_keys(intent.provider, intent.service),
        *standing.platform_keys(intent.provider, intent.host),
        *(key for revocation in _revocations(intent) for key in standing.revocation_keys(*revocation)),
    )
    return tuple(dict.fromkeys(asked))


def permit(
    request: LaunchRequest, trust: LedgerTrust, *, provider: str, now: Instant, highest: ProvenState | None
) -> Permitted:
    """The intent of an untrusted request, if everything at the top of this file holds.

    Raises Malformed, NotAuthentic(`signature.*`, `cose.*`, `ledger.*`) or Refused(`launch.*`, `ledger.*`). `highest` is
    the newest state seen before. It does NOT establish that the host is in good health: the broker asks the verifier that.
    """
    # 1
    signed = cose.parse(INTENT_PURPOSE, request.intent, max_bytes=8192)
    intent = schema.decode(LaunchIntent, signed.payload, max_bytes=8192)
    # 2
    if intent.ledger_id != trust.ledger_id:
        raise Refused(
            "launch.other_ledger", "the intent is for another ledger", expected=trust.ledger_id, got=intent.ledger_id
        )
    if intent.provider != provider:
        raise Refused("launch.other_provider", "the intent is of another provider", expected=provider, got=intent.provider)
    # 3
    state = verify_bundle(request.bundle, trust, now=now, highest=None if highest is None else highest.checkpoint)
    # 4
    orchestrator = standing.active_orchestrator(state, provider, intent.orchestrator)
    cose.verify(signed, keys.parse_public(orchestrator.public_key))
    # 5
    _judge_service(state, intent)
    # 6
    platform = standing.active_platform(state, provider, intent.host)
    if platform.chip_id != intent.chip:
        raise Refused(
            "launch.chip_not_registered",
            "the host is registered with another chip",
            expected=platform.chip_id,
            got=intent.chip,
        )
    # 7
    for kind, registrant, revoked in _revocations(intent):
        standing.not_revoked(state, kind, registrant, revoked)
    # 8
    if not now < intent.not_after <= now + MAX_LIFE_S:
        raise Refused(
            "launch.intent_expired",
            "the intent has expired, or reaches too far ahead",
            expected=f"after {rendered(now)}, at most {MAX_LIFE_S} s",
            got=rendered(Instant(min(intent.not_after, 1 << 37))),
            remedy="record a new intent",
        )
    return Permitted(intent=intent, digest=intent_digest(request.intent), state=state)


def _judge_service(state: ProvenState, intent: LaunchIntent) -> None:
    service = standing.active_service(state, intent.provider, intent.service)
    rules = [rule for rule in service.packages if rule.package_digest == intent.package_digest]
    if not rules:
        raise Refused(
            "launch.package_not_registered",
            "the service's record does not allow this package",
            expected=", ".join(rule.package_digest.hex() for rule in service.packages),
            got=intent.package_digest,
            remedy="register the package for the service (UpdateService)",
        )
    if all(rule.measurement != intent.measurement for rule in rules):
        raise Refused(
            "launch.measurement_not_registered",
            "the service's record does not allow this package with this measurement",
            expected=", ".join(rule.measurement.hex() for rule in rules),
            got=intent.measurement,
        )
    if intent.profile.value not in service.profiles:
        raise Refused(
            "launch.profile_not_registered",
            "the service does not offer this channel profile",
            expected=", ".join(service.profiles),
            got=intent.profile.value,
        )


def _revocations(intent: LaunchIntent) -> tuple[tuple[RevocationKind, str, str], ...]:
    found: list[tuple[RevocationKind, str, str]] = []
    for registrant in (intent.provider, CONSORTIUM):
        found.append((RevocationKind.HOST, registrant, intent.host))
        found.append((RevocationKind.MEASUREMENT, registrant, intent.measurement.hex()))
        if intent.chip:
            found.append((RevocationKind.CHIP, registrant, intent.chip.hex()))
    return tuple(found)
