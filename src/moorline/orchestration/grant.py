"""The orchestrator's side of a grant: it must be the answer of an admitted launcher of ours, to this very intent.

1. The reply parses; a problem in it is raised as the error it was.
2. The grant is a COSE_Sign1 for this purpose; its chain leads from a `launcher` of our trust domain to the roots.
3. Its issuing CA is the active one on the ledger, launcher and certificate are not revoked (`judge_issuer`).
4. The launcher's key signed the grant, and the launch fields name that key's launcher.
5. The fields are the intent's in everything the intent says, and end no later.
6. The token opens with the intent's reply key.

That the token is the right one cannot be seen here (only launcher and broker hold the key of the epoch); a wrong one
would fail at the broker, which costs a launch and gives nothing.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import x25519

from moorline.clock import Instant
from moorline.digest import same
from moorline.errors import Malformed, NotAuthentic, from_problem
from moorline.ledger import standing
from moorline.ledger.light_client import ProvenState
from moorline.ledger.records import RevocationKind
from moorline.nfv import Role
from moorline.orchestration.launcher import launch_fields, launcher_id
from moorline.verification.chains import VerifiedChain, verify_chain
from moorline.wire import cbor, cose, keys, launch, schema
from moorline.wire.launch import LaunchFields
from moorline.wire.orchestration import GRANT_PURPOSE, LaunchGrant, LaunchIntent, LaunchReply, intent_digest, open_token


@dataclass(frozen=True, slots=True, kw_only=True)
class Granted:
    """A launch that may begin once the issuer of `chain` was judged (step 3). `token` is secret."""

    fields: LaunchFields
    token: bytes = field(repr=False)
    launcher: str
    chain: VerifiedChain


def verify_reply(
    reply: bytes,
    signed_intent: bytes,
    intent: LaunchIntent,
    reply_key: x25519.X25519PrivateKey,
    *,
    roots: tuple[bytes, ...],
    trust_domain: str,
    now: Instant,
) -> Granted:
    """The grant in an untrusted reply, all but step 3. Raises the launcher's own error, Malformed, or NotAuthentic."""
    # 1
    answered = schema.decode(LaunchReply, reply)
    if answered.problem is not None:
        raise from_problem(cbor.decode(answered.problem))
    if answered.grant is None:
        raise Malformed("launch.reply_empty", "the launcher's reply holds neither grant nor problem")
    # 2
    signed = cose.parse(GRANT_PURPOSE, answered.grant)
    if not signed.x5chain:
        raise Malformed("launch.reply_empty", "the grant comes without a certificate chain")
    chain = verify_chain(signed.x5chain[0], signed.x5chain[1:], roots, now)
    if chain.spiffe_id.role is not Role.LAUNCHER or chain.spiffe_id.trust_domain != trust_domain:
        raise NotAuthentic(
            "launch.not_a_launcher", "the grant is not by a launcher of ours", expected=trust_domain, got=chain.spiffe_id
        )
    # 4
    public = keys.parse_public(_public(chain.leaf))
    grant = schema.decode(LaunchGrant, cose.verify(signed, public))
    fields = launch.parse_fields(grant.launch_fields)
    # 5
    _judge_fields(fields, grant, intent, signed_intent, launcher_id(keys.public_bytes(public)))
    # 6
    token = open_token(grant.sealed_token, reply_key, signed_intent)
    return Granted(fields=fields, token=token, launcher=str(chain.spiffe_id), chain=chain)


def keys_to_prove(granted: Granted, provider: str) -> tuple[str, ...]:
    """The ledger keys that `judge_issuer` asks about."""
    revocations = (key for item in _revocations(granted, provider) for key in standing.revocation_keys(*item))
    return (*standing.issuing_ca_keys(provider, granted.chain.issuer_name), *revocations)


def judge_issuer(granted: Granted, state: ProvenState, provider: str) -> None:
    """Step 3. Raises Refused("ledger.issuing_ca_not_active" | "ledger.revoked") or NotAuthentic("launch.issuer_differs")."""
    name = granted.chain.issuer_name
    record = standing.active_issuing_ca(state, provider, name)
    if not same(record.certificate, granted.chain.issuer):
        raise NotAuthentic("launch.issuer_differs", "the launcher's issuer is not the registered one", got=name)
    for item in _revocations(granted, provider):
        standing.not_revoked(state, *item)


def _revocations(granted: Granted, provider: str) -> tuple[tuple[RevocationKind, str, str], ...]:
    return (
        (RevocationKind.LAUNCHER, provider, granted.fields.launcher.hex()),
        (RevocationKind.CERTIFICATE, provider, standing.serial_id(granted.chain.serial)),
    )


def _judge_fields(
    fields: LaunchFields, grant: LaunchGrant, intent: LaunchIntent, signed_intent: bytes, launcher: bytes
) -> None:
    expected = launch_fields(
        intent, launcher=launcher, epoch=fields.epoch, sequence=fields.sequence, not_after=fields.not_after
    )
    differing = [
        item.name for item in dataclasses.fields(fields) if getattr(fields, item.name) != getattr(expected, item.name)
    ]
    if not same(grant.intent_digest, intent_digest(signed_intent)):
        differing.append("intent_digest")
    if fields.not_after > intent.not_after:
        differing.append("not_after")
    if differing:
        raise NotAuthentic("launch.grant_differs", "the grant is not for what was asked", got=", ".join(differing))


def _public(certificate: x509.Certificate) -> bytes:
    key = certificate.public_key()
    return keys.public_bytes(key)  # type: ignore[arg-type]  # parse_public refuses kinds that are not used here
