"""What two HSMs that never met tell each other once each has proven, from the ledger alone, who it is (PROTOCOLS.md 6).

1. The initiator proves its HSM key over the responder's challenge, which names ledger, provider and HSM of the responder:
   the proof serves no other responder.
2. Each side signs a trust bundle for exactly this peer and this challenge: its roots, issuing CAs, and a sequence number.
3. Both sign the transcript of both bundles. Who holds the other's signature can show what was agreed.

The pair secret for the no-PFS profile is agreed in the same session (hsm.pair). A bundle is a convenience and never an
authority: whoever uses an issuing CA from it still asks the ledger whether it is active.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Final

from moorline.clock import Instant
from moorline.digest import Digest256, tagged, tagged_hash
from moorline.errors import NotAuthentic, Refused
from moorline.wire import cose, keys, schema
from moorline.wire.schema import Bytes32, Size

BUNDLE_PURPOSE: Final = "trust-bundle"
TRANSCRIPT_PURPOSE: Final = "peer-exchange"
_BUNDLE_CAP: Final = 128 * 1024
_Der = Annotated[bytes, Size(at_most=20 * 1024)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Party:
    """One end of an exchange."""

    provider: str
    hsm: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TrustBundle:
    """What a provider's HSM says about its own certificates, to one peer, under one challenge. Certificates are DER."""

    ledger_id: Bytes32
    provider: str
    trust_domain: str
    hsm: str
    peer_provider: str
    peer_hsm: str
    challenge: Bytes32
    sequence: int
    issued: int
    roots: tuple[_Der, ...]
    issuing_cas: tuple[_Der, ...]
    above: tuple[_Der, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeReply:
    """The responder's bundle (COSE) and its signature over the transcript (COSE)."""

    bundle: Annotated[bytes, Size(at_most=_BUNDLE_CAP)]
    agreed: Annotated[bytes, Size(at_most=4096)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Expectation:
    """What a received bundle must say."""

    ledger_id: bytes
    sender: Party
    receiver: Party
    challenge: bytes


def prove(signer: keys.Signer, *, challenge_digest: bytes, party: Party) -> bytes:
    """The initiator's proof for message 3 of the session."""
    return signer.sign(_proof_input(challenge_digest, party))


def verify_proof(key: keys.PublicKey, proof: bytes | None, *, challenge_digest: bytes, party: Party) -> None:
    """Raises NotAuthentic("exchange.proof_invalid") unless `proof` is by `key`, the one in the ledger's HSM record."""
    try:
        keys.verify(key, proof or b"", _proof_input(challenge_digest, party))
    except NotAuthentic:
        raise NotAuthentic(
            "exchange.proof_invalid",
            "the peer does not prove the HSM key the ledger has for it",
            expected=f"{party.provider}/{party.hsm}",
        ) from None


def sign_bundle(bundle: TrustBundle, signer: keys.Signer) -> bytes:
    """The bundle as COSE_Sign1 by the HSM key."""
    return cose.sign(BUNDLE_PURPOSE, schema.encode(bundle), signer)


def verify_bundle(data: bytes, key: keys.PublicKey, expected: Expectation) -> TrustBundle:
    """A peer's bundle, signed by the key the ledger has for it, and made for us and this challenge.

    Raises Malformed, NotAuthentic (`cose.*`, `signature.*`) or Refused("exchange.not_for_us"). It does not establish that
    the certificates in it chain, nor that they are active.
    """
    payload = cose.verify(cose.parse(BUNDLE_PURPOSE, data, max_bytes=_BUNDLE_CAP), key)
    bundle = schema.decode(TrustBundle, payload, max_bytes=_BUNDLE_CAP)
    said = (bundle.ledger_id, bundle.provider, bundle.hsm, bundle.peer_provider, bundle.peer_hsm, bundle.challenge)
    sender, receiver = expected.sender, expected.receiver
    wanted = (
        expected.ledger_id,
        *(sender.provider, sender.hsm),
        *(receiver.provider, receiver.hsm),
        expected.challenge,
    )
    if said != wanted:
        raise Refused(
            "exchange.not_for_us",
            "the trust bundle was made by or for somebody else, or for another session",
            expected=f"{sender.provider}/{sender.hsm} to {receiver.provider}/{receiver.hsm}",
            got=f"{bundle.provider}/{bundle.hsm} to {bundle.peer_provider}/{bundle.peer_hsm}",
        )
    return bundle


def transcript(challenge: bytes, initiator_bundle: bytes, responder_bundle: bytes) -> Digest256:
    """What both sides sign: the challenge and both bundles as sent."""
    return tagged_hash("peer-transcript", challenge, initiator_bundle, responder_bundle)


def agree(signer: keys.Signer, agreed: bytes) -> bytes:
    """A signature over a transcript, as COSE_Sign1."""
    return cose.sign(TRANSCRIPT_PURPOSE, agreed, signer)


def verify_agreed(data: bytes, key: keys.PublicKey, agreed: bytes) -> None:
    """Raises NotAuthentic or Refused("exchange.transcript_mismatch") unless `key` signed exactly this transcript."""
    signed = cose.verify(cose.parse(TRANSCRIPT_PURPOSE, data, max_bytes=4096), key)
    if signed != agreed:
        raise Refused("exchange.transcript_mismatch", "the peer agreed to something else", expected=agreed, got=signed)


def our_bundle(
    *,
    expected: Expectation,
    trust_domain: str,
    sequence: int,
    now: Instant,
    roots: tuple[bytes, ...],
    issuing_cas: tuple[bytes, ...],
    above: tuple[bytes, ...],
) -> TrustBundle:
    """A bundle from `expected.sender` to `expected.receiver`."""
    return TrustBundle(
        ledger_id=expected.ledger_id,
        provider=expected.sender.provider,
        trust_domain=trust_domain,
        hsm=expected.sender.hsm,
        peer_provider=expected.receiver.provider,
        peer_hsm=expected.receiver.hsm,
        challenge=expected.challenge,
        sequence=sequence,
        issued=now,
        roots=roots,
        issuing_cas=issuing_cas,
        above=above,
    )


def _proof_input(challenge_digest: bytes, party: Party) -> bytes:
    return tagged("peer-proof", challenge_digest, party.provider.encode("ascii"), party.hsm.encode("ascii"))
