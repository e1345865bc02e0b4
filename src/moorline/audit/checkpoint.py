"""Signed checkpoints of secure logs: the HSM key's word that a log of its provider had this size, root and head.

The key signs for the purpose `audit-checkpoint` and nothing signed for another purpose passes here. A checkpoint says what
the HSM's broker was shown, and that it continues what it had signed before of the same log; it does not say that the
entries tell the truth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Final

from moorline.audit.log import LogCheckpoint
from moorline.errors import Malformed, MoorlineError, NotAuthentic
from moorline.nfv import Role, parse_name
from moorline.wire import cose, keys, schema
from moorline.wire.schema import Bytes32, Size

PURPOSE: Final = "audit-checkpoint"
MAX_BYTES: Final = 4096
BROKER: Final = "broker"
_DOMAINS: Final = (BROKER, Role.ORCHESTRATOR.value, Role.VERIFIER.value)


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditCheckpoint:
    """A log's `size`, Merkle `root` and `head` at `time`, as the HSM `provider`/`hsm` of ledger `ledger_id` saw it."""

    ledger_id: Bytes32
    provider: str
    hsm: str
    log: Annotated[str, Size(at_most=128)]
    size: int
    root: Bytes32
    head: Bytes32
    time: int

    def of_log(self) -> LogCheckpoint:
        """What it commits to."""
        return LogCheckpoint(size=self.size, root=self.root, head=self.head)


def log_name(domain: str, identifier: str) -> str:
    """The name of a service's log, such as `broker/hsm-1`."""
    return f"{domain}/{parse_name(identifier, 'log')}"


def domain_of(log: str) -> str:
    """The domain its first entry is chained to: the kind of service. Raises Malformed("audit.log_name")."""
    domain, separator, identifier = log.partition("/")
    if not separator or domain not in _DOMAINS:
        raise Malformed("audit.log_name", "this names no service's log", expected="/".join(_DOMAINS), got=log[:80])
    parse_name(identifier, "log")
    return domain


def sign(checkpoint: AuditCheckpoint, signer: keys.Signer) -> bytes:
    """The COSE_Sign1 of a checkpoint."""
    return cose.sign(PURPOSE, schema.encode(checkpoint), signer)


def verify(data: bytes, key: keys.PublicKey, *, ledger_id: bytes, provider: str, hsm: str, log: str) -> AuditCheckpoint:
    """The checkpoint, known to be signed by `key` for this log of this provider's HSM on this ledger.

    Raises NotAuthentic("audit.checkpoint_not_authentic"), also for bytes that are no checkpoint: somebody changed them.
    """
    try:
        payload = cose.verify(cose.parse(PURPOSE, data, max_bytes=MAX_BYTES), key)
        checkpoint = schema.decode(AuditCheckpoint, payload, max_bytes=MAX_BYTES)
    except MoorlineError as error:
        raise NotAuthentic(
            "audit.checkpoint_not_authentic",
            f"a checkpoint of {log} is not signed by the HSM {provider}/{hsm}",
            got=error.code,
            remedy="do not use this file; ask its broker for the log again",
        ) from None
    is_for = (checkpoint.ledger_id, checkpoint.provider, checkpoint.hsm, checkpoint.log)
    if is_for != (ledger_id, provider, hsm, log):
        raise NotAuthentic(
            "audit.checkpoint_not_authentic",
            f"a checkpoint in the place of one of {log} was signed for another log, HSM or ledger",
            expected=f"{log} of {provider}/{hsm}",
            got=f"{checkpoint.log} of {checkpoint.provider}/{checkpoint.hsm}",
        )
    return checkpoint
