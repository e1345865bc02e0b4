"""The attested session as two machines without I/O (PROTOCOLS.md 4; docs/spec/attested-session.md).

    1. attester -> broker   Hello       role, evidence formats, KEM key, signing key, profile, role fields
    2. broker -> attester   Challenge   nonce, expiry, ledger id, provider, HSM id, ledger proof of the broker
    3. attester -> broker   Evidence    over binding = SHA-512("session" | role | exporter | H(1) | H(2) | proof)
    4. broker -> attester   Answer      HPKE to the KEM key, info = H(1..3): 32 random bytes K and the role's secrets
    5. attester -> broker   Confirm     MAC under HKDF(K, "confirm", H(1..4))
    6. broker -> attester   Activation  what is active from now on

A machine takes frame bodies and what its driver found out, and returns effects: `Send`, questions for the driver, `Active`.
It holds no socket, clock or randomness. Rules that hold at every step:

- a message that is not the one awaited, or misses a field, ends the session; an ended machine never speaks again;
- hashes are over the bodies exactly as sent;
- nothing is active, and no record is sealed or opened, before message 5 was verified (broker) or message 6 came (attester);
- the binding holds the exporter of this very TLS connection, so evidence relayed from another connection does not bind;
- each direction has its own record key and counter, so nothing can be reflected, dropped, repeated or reordered.

In the HPKE-only profile the exporter is empty, messages 2 and 4 are signed by the HSM key (channel.signed), and message 6 is
the broker's first record: whoever ends TLS on the way sees ciphertext and public facts, and can change nothing unnoticed.
"""

from __future__ import annotations

from typing import Final

from moorline.channel.effects import (
    Activate,
    Active,
    Appraise,
    Claim,
    Collect,
    Effect,
    JudgeBroker,
    MakeChallenge,
    Send,
    SessionFacts,
    Sign,
    State,
)
from moorline.channel.initiator import Initiator
from moorline.channel.kem import KemKey, open_sealed, p256_raw, seal_to
from moorline.channel.machine import LAUNCH_ROLES, PROOF_ROLES, VERSION
from moorline.channel.responder import Responder
from moorline.channel.transcripts import Exporter, binding, exporter_label, message_digest, transcript

HANDSHAKE_CAP: Final = 256 * 1024

__all__ = [
    "HANDSHAKE_CAP",
    "LAUNCH_ROLES",
    "PROOF_ROLES",
    "VERSION",
    "Activate",
    "Active",
    "Appraise",
    "Claim",
    "Collect",
    "Effect",
    "Exporter",
    "Initiator",
    "JudgeBroker",
    "KemKey",
    "MakeChallenge",
    "Responder",
    "Send",
    "SessionFacts",
    "Sign",
    "State",
    "binding",
    "exporter_label",
    "message_digest",
    "open_sealed",
    "p256_raw",
    "seal_to",
    "transcript",
]
