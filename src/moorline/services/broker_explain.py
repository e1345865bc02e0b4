"""Why keys were released or withheld: the last decisions, rule by rule, for `moor hsm explain`.

They are kept in the broker's database, written twice a second beside the sessions: any broker process over it answers for
all of them, also after a restart. A process that is killed takes the last half second's along; what was consumed and refused
for good stands in the secure log. A request that somebody writes down (facts as `hsm.release_policy.facts_of` makes them) is
decided by the policy alone: what the protocol demands is then what the facts claim.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import structlog
from fastapi import FastAPI

from moorline.clock import Instant
from moorline.errors import Malformed, MoorlineError, Refused
from moorline.hsm.release import ReleaseDecision, ReleaseRequest
from moorline.hsm.release_policy import PolicyDecision, RecordFacts, ReleaseAction, ReleasePolicy, facts_of
from moorline.storage.broker_decisions import StoredDecision
from moorline.wire.launch import identity_name

if TYPE_CHECKING:
    from moorline.services.broker import Broker

_KEPT: Final = 1000
_WRITE_EVERY_S: Final = 0.5
_LOG: Final = structlog.stdlib.get_logger("broker")


@dataclass(frozen=True, slots=True, kw_only=True)
class Decided:
    """One decision. `refusal` is what the function was told, None if it got what it asked for."""

    at: Instant
    session: str
    identity: str
    facts: dict[str, Any]
    floor: ReleaseDecision
    policy: PolicyDecision
    refusal: MoorlineError | None
    stands_on: dict[str, object] | None
    """The verdict about the host that this decision stands on, and falls with: whose, by whom, its digest, how old."""

    def as_json(self) -> dict[str, object]:
        """As `moor hsm explain` shows it."""
        rules = [
            {"rule": one.code, "outcome": one.outcome.value, "says": one.says, "expected": one.expected, "got": one.got}
            for one in self.floor.findings
        ]
        decisive = self.floor.refusal.code if self.floor.refusal is not None else ", ".join(self.policy.rules)
        return {
            "at": self.at,
            "session": self.session,
            "identity": self.identity,
            "action": self.facts["action"],
            "allowed": self.refusal is None,
            "decided_by": decisive,
            "rules": rules,
            "policy": {"allowed": self.policy.allowed, "rules": list(self.policy.rules)},
            "facts": self.facts,
            "stands_on": self.stands_on,
        }


class Decisions:
    """Makes decisions, and remembers them until they are written: the newest thousand. Safe for threads."""

    def __init__(self, policy: ReleasePolicy) -> None:
        self.policy = policy
        self._kept: OrderedDict[tuple[str, str], Decided] = OrderedDict()
        self._turn = threading.Lock()

    def decide(
        self, action: ReleaseAction, request: ReleaseRequest, floor: ReleaseDecision, record: RecordFacts, *, session: str
    ) -> None:
        """Floor and policy must both allow. Raises the floor's refusal, or Refused("release.policy_denied")."""
        facts = facts_of(action, request, floor, record)
        policy = self.policy.decide_known(facts)
        refusal: MoorlineError | None = floor.refusal
        if refusal is None:
            try:
                policy.require()
            except Refused as denied:
                refusal = denied
        identity = identity_name(request.fields.instance, request.fields.generation)
        made = Decided(
            at=request.now,
            session=session,
            identity=identity,
            facts=facts,
            floor=floor,
            policy=policy,
            refusal=refusal,
            stands_on=_stands_on(request),
        )
        with self._turn:
            self._kept[identity, session] = made
            self._kept.move_to_end((identity, session))
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        if refusal is not None:
            raise refusal

    def about(self, name: str) -> tuple[Decided, ...]:
        """Decisions not written yet about an instance, an identity or a session (or a part of its name), newest first."""
        with self._turn:
            kept = list(reversed(self._kept.values()))
        return tuple(
            one
            for one in kept
            if name in (one.identity, one.facts["principal"]["instance"]) or (name and name in one.session)
        )

    def taken(self) -> tuple[Decided, ...]:
        """Those not written yet, oldest first; they are the caller's to write."""
        with self._turn:
            kept = tuple(self._kept.values())
            self._kept.clear()
        return kept

    def put_back(self, made: tuple[Decided, ...]) -> None:
        """They could not be written now. What was decided since about the same is newer, and stays."""
        with self._turn:
            newer = self._kept
            self._kept = OrderedDict(((one.identity, one.session), one) for one in made)
            self._kept.update(newer)
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)


async def keep_writing(broker: Broker) -> None:
    """Write decisions to the database, until cancelled; then once more."""
    while True:
        try:
            await asyncio.sleep(_WRITE_EVERY_S)
            await asyncio.to_thread(_write, broker)
        except asyncio.CancelledError:
            with suppress(MoorlineError):
                _write(broker)
            raise
        except MoorlineError as error:
            _LOG.warning("decisions not written yet", code=error.code)


def _write(broker: Broker) -> None:
    made = broker.decisions.taken()
    if not made:
        return
    try:
        broker.explanations.keep([_stored(one) for one in made], at=broker.clock.now())
    except MoorlineError:
        broker.decisions.put_back(made)
        raise


def _stored(one: Decided) -> StoredDecision:
    return StoredDecision(
        identity=one.identity,
        session=one.session,
        instance=one.facts["principal"]["instance"],
        at=one.at,
        body=json.dumps(one.as_json(), separators=(",", ":")).encode(),
    )


def _stands_on(request: ReleaseRequest) -> dict[str, object] | None:
    result, digest = request.host.result, request.host.result_digest
    if result is None or digest is None:
        return None
    return {
        "subject": result.subject,
        "verifier": result.verifier,
        "result_digest": digest.hex(),
        "age_s": max(0, request.now - result.issued),
        "expires": result.expires,
    }


def add_routes(app: FastAPI, broker: Broker) -> None:
    """Explanations at the provider's own door."""

    @app.get("/v1/decisions/{name}")
    async def decisions(name: str) -> dict[str, list[dict[str, object]]]:
        """What was decided about an instance, an identity or a session, at whichever process, newest first."""
        await asyncio.to_thread(_write, broker)
        found = await asyncio.to_thread(broker.explanations.about, name)
        return {"decisions": [json.loads(body) for body in found]}

    @app.post("/v1/decisions/explain")
    async def explain(facts: dict[str, Any]) -> dict[str, object]:
        """What the policy says about facts somebody wrote down."""
        if set(facts) != {"action", "principal", "context"} or facts["action"] not in set(ReleaseAction):
            raise Malformed(
                "release.facts_malformed",
                "a request has action, principal and context",
                expected="/".join(ReleaseAction),
                got=", ".join(sorted(facts)),
                remedy="see docs/spec/release.md, or take `facts` of another explanation",
            )
        said = broker.decisions.policy.decide(facts)
        return {"allowed": said.allowed, "decided_by": ", ".join(said.rules), "facts": facts}
