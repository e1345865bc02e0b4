"""What both machines of a session share: a state, an end, and records once it is active."""

from __future__ import annotations

from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from moorline.channel.effects import State
from moorline.channel.messages import RECORD_CAP, pack, unpack
from moorline.channel.transcripts import derive
from moorline.digest import tagged
from moorline.errors import MoorlineError, NotAuthentic, Refused
from moorline.wire import schema
from moorline.wire.launch import ChannelProfile
from moorline.wire.session import Call, Hello, Record, Reply, SessionRole

VERSION: Final = 1
_COUNTER_LIMIT: Final = 1 << 32

PROOF_ROLES: Final = frozenset({SessionRole.FUNCTION, SessionRole.RESUME, SessionRole.PEER_HSM})
"""Roles that owe a proof (PROTOCOLS.md 4, table); the others must not send one."""

LAUNCH_ROLES: Final = frozenset({SessionRole.FUNCTION, SessionRole.RESUME})
"""Roles whose fields are launch fields."""


class Direction:
    """One direction of an active session: its key and its counter, from 0 without gaps."""

    def __init__(self, key: bytes, name: bytes) -> None:
        self._aead = AESGCM(key)
        self._name = name
        self._counter = 0

    def seal(self, plaintext: bytes) -> bytes:
        """The next record around this."""
        counter = self._next()
        sealed = self._aead.encrypt(counter.to_bytes(12, "big"), plaintext, tagged("session-record", self._name))
        return pack(Record(counter=counter, sealed=sealed))

    def open(self, body: bytes) -> bytes:
        """What is in the next record. Raises NotAuthentic("session.record_invalid") or Malformed."""
        record = unpack(Record, body, max_bytes=RECORD_CAP)
        if record.counter != self._counter:
            raise NotAuthentic(
                "session.record_invalid", "a record is not the next one", expected=self._counter, got=record.counter
            )
        counter = self._next()
        try:
            return self._aead.decrypt(counter.to_bytes(12, "big"), record.sealed, tagged("session-record", self._name))
        except InvalidTag:
            raise NotAuthentic("session.record_invalid", "a record does not open under this session's key") from None

    def _next(self) -> int:
        if self._counter >= _COUNTER_LIMIT:
            raise Refused("session.record_invalid", "this session has carried all records it may", expected="a new one")
        self._counter += 1
        return self._counter - 1


class End:
    """What both machines share: a state, an end, and records."""

    def __init__(self) -> None:
        self.state = State.START
        self._sending: Direction | None = None
        self._receiving: Direction | None = None

    def end(self) -> None:
        """Never active again; keys are forgotten."""
        self.state = State.ENDED
        self._sending = self._receiving = None

    def seal(self, message: Call | Reply) -> bytes:
        """The frame body of a record. Raises Refused("session.not_active") before activation and after the end."""
        if self.state is not State.ACTIVE or self._sending is None:
            raise _not_active()
        return self._sending.seal(schema.encode(message))

    def open(self, kind: type[Call | Reply], body: bytes) -> Call | Reply:
        """The message in a record. Any doubt ends the session: NotAuthentic("session.record_invalid") or Malformed."""
        if self.state is not State.ACTIVE or self._receiving is None:
            raise _not_active()
        try:
            return schema.decode(kind, self._receiving.open(body))
        except MoorlineError:
            self.end()
            raise

    def _go(self, awaited: State) -> None:
        if self.state is not awaited:
            raise self._out_of_turn()

    def _out_of_turn(self) -> Refused:
        awaited = self.state.value
        self.end()
        return Refused("session.unexpected_message", "a step of the session came out of turn", expected=awaited)

    def _keys(self, key: bytes, digest: bytes, mine: bytes, theirs: bytes) -> None:
        self._sending = Direction(derive(key, mine, digest), mine)
        self._receiving = Direction(derive(key, theirs, digest), theirs)


def _not_active() -> Refused:
    return Refused("session.not_active", "this session is not active, so it carries no records")


def require_offered(hello: Hello) -> None:
    """Raises Refused("session.profile_not_offered")."""
    # Only launch fields can permit the HPKE-only profile (PROTOCOLS.md 4), and only functions have some.
    if hello.profile is ChannelProfile.HPKE_ONLY and hello.role not in LAUNCH_ROLES:
        raise Refused(
            "session.profile_not_offered",
            "this role has no launch fields that could permit a session without TLS of the broker",
            expected=ChannelProfile.TLS.value,
            got=f"{hello.profile.value} from {hello.role.value}",
        )
