"""What else a function may ask of the HSM over its session: random bytes of the token, its storage key, a line in the log.

A function in an enclave has no source of randomness that its host could not watch but the processor's, and no log that its
host could not rewrite. The line is the function's own word: the entry says whose it is (the identity of its session), never
that it is true. There is a bound on what one session may write, so that nobody drowns the log.

The storage key is the one of the function's own generation, which it got at its launch. It need not keep it: whoever asks is
judged as for a renewal first, so that a function whose host lost its verdict is not told again.
"""

from __future__ import annotations

from typing import Final

from moorline.clock import Instant
from moorline.errors import Malformed, Unavailable
from moorline.services.broker import Broker
from moorline.wire import schema
from moorline.wire.launch import LaunchFields
from moorline.wire.session import ENTROPY_MAX, EntropyCall, EntropyReply, LogCall, StorageKeyReply

LINES: Final = 60
PERIOD_S: Final = 60


class LogRoom:
    """How much one session may still write: LINES in each PERIOD_S."""

    def __init__(self) -> None:
        self._since, self._written = Instant(0), 0

    def require_room(self, now: Instant) -> None:
        """Count one line. Raises Unavailable("session.log_full") beyond the bound."""
        if now - self._since >= PERIOD_S:
            self._since, self._written = now, 0
        if self._written >= LINES:
            raise Unavailable(
                "session.log_full",
                "this session has written as much to the log as it may",
                expected=f"{LINES} lines in {PERIOD_S} s",
                retry_after_s=max(1, PERIOD_S - (now - self._since)),
            )
        self._written += 1


def entropy(broker: Broker, body: bytes) -> bytes:
    """Random bytes of the token's generator. Raises Malformed."""
    asked = schema.decode(EntropyCall, body)
    if not 0 < asked.size <= ENTROPY_MAX:
        raise Malformed(
            "session.entropy_size", "so many random bytes are not given", expected=f"1..{ENTROPY_MAX}", got=asked.size
        )
    return schema.encode(EntropyReply(random=broker.token.random(asked.size)))


def storage_key(broker: Broker, fields: LaunchFields) -> bytes:
    """The key of this generation, if it is still there; that it may be given is the caller's to know.

    Raises Refused("renewal.storage_destroyed").
    """
    wrapped = broker.instances.storage_key(fields.instance, fields.generation)
    key = broker.launch_keys.storage_key(fields, wrapped)
    return schema.encode(StorageKeyReply(storage_key=key, generation=fields.generation))


def log(broker: Broker, spiffe_id: str, body: bytes, at: Instant) -> None:
    """One entry `function-said` in this HSM's secure log, durable before the answer. Raises Malformed."""
    said = schema.decode(LogCall, body)
    broker.store.append("function-said", {"spiffe_id": spiffe_id, "event": said.event, "says": said.says}, at=at)
