"""The attestation authority (RFC 9334 Verifier) of one provider: enrolment, challenge, appraisal, result. No HTTP here.

Enrolment is in services.verifier_enrolling.

Appraisal:
1. the quote is by the enrolled key (verification.tpm_quote) and answers an open challenge of this verifier, which it uses
   up;
2. the TPM's maker did not revoke it since (services.verifier_makers), and its counters did not go back; 3. the boot log
   replays; 4. the IMA list replays from what is held here, or is a piece of a longer one, of which how far it was read is
   kept, and nothing is judged before the last piece;
5. the certified location tag is genuine; 6. policy.host judges; 7. the results of a round are signed; 8. challenge,
   progress, withdrawal, result and next challenge of each host of the round are written in one transaction, and only then
   is anybody answered. Where nothing signs, what was withdrawn is written all the same.

A verdict gained or lost is an event with a cursor, stored with the verdict (storage.verifier_events); so is the silence of a
host whose lease ran out, which `sweep` finds.

Anybody can post evidence in a host's name, so a failure before step 1 is done is told to the sender and changes nothing: the
standing result ends by itself when its lease does. A failure after it is the host's own, and withdraws the result at once.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from moorline.clock import Instant
from moorline.digest import same
from moorline.errors import MoorlineError, Refused, Unavailable
from moorline.evidence.tpm_quote import parse_quote
from moorline.ledger.records import PlatformRecord
from moorline.nfv import parse_name
from moorline.policy import ear
from moorline.policy.reference_values import Reference
from moorline.rats import AttestationResult, Tier
from moorline.services import verifier_enrolling
from moorline.services.host_appraisal import (
    SKEW_S,
    Appraised,
    HostAppraisal,
    challenge_used,
    exhausted,
)
from moorline.services.verifier_parts import Parts
from moorline.services.verifier_queue import Entry, VerifierQueue
from moorline.storage.verifier_events import VerdictEvent
from moorline.storage.verifier_rounds import Change, EnrolledHost, Held, Progress, StoredResult
from moorline.wire import host as wire

EVENTS_PAGE: Final = 500
"""Events in one answer at most; the reader comes again for more."""
_NONCE: Final = 32
_TURN: Final = 16
"""Hosts appraised before others of the process get a turn."""


_Entry = Entry[wire.HostEvidence, wire.HostVerdict]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Judged:
    """Evidence that is the host's own: its appraisal, or the problem found on the way; `code` is why it does not stand.

    A piece of an IMA list has an appraisal without a result, and says nothing about whether the host stands.
    """

    entry: _Entry
    nonce: bytes
    before: Progress | None
    appraised: Appraised | None
    error: MoorlineError | None
    code: str | None

    @property
    def result(self) -> AttestationResult | None:
        """What was found out about the host, if anything was."""
        return None if self.appraised is None else self.appraised.result


class AttestationAuthority:
    """One verifier. State is in its store, so that it survives a restart."""

    def __init__(self, parts: Parts) -> None:
        self._parts, self._appraisal = parts, _appraisal(parts)
        self._writer = ear.Writer(parts.audience)
        self._queue = VerifierQueue(self._round)
        self._asking = VerifierQueue(self._give)
        self._changed = asyncio.Event()
        self.released = asyncio.Event()
        self._swept = parts.clock.now()
        self._patience_until = Instant(self._swept + parts.terms.lease_s)

    @property
    def reference(self) -> Reference:
        """The reference values this authority judges by now."""
        return self._parts.reference

    def judge_by(self, reference: Reference) -> None:
        """Judge by these reference values from the next host on; a host is judged by the ones or the others, never both."""
        parts = dataclasses.replace(self._parts, reference=reference)
        self._parts, self._appraisal = parts, _appraisal(parts)

    # Enrolment ------------------------------------------------------------------------------------------------------

    async def begin_enrolment(self, name: str, request: wire.EnrolRequest) -> wire.EnrolChallenge:
        """A credential that only the TPM of both keys can open (verifier_enrolling.begin). Raises what that does."""
        return await verifier_enrolling.begin(self._parts, name, request)

    async def finish_enrolment(self, name: str, proof: wire.EnrolProof) -> wire.Enrolled:
        """The binding of name and keys, for good (verifier_enrolling.finish). Raises what that does."""
        return await verifier_enrolling.finish(self._parts, name, proof)

    def enrolled(self, name: str) -> EnrolledHost:
        """The keys of an enrolled host; raises Refused("host.not_enrolled")."""
        return self._parts.store.host(parse_name(name, "host"))

    # Attestation ----------------------------------------------------------------------------------------------------

    async def ask(self, name: str) -> wire.HostChallenge:
        """A fresh nonce, and what is already held of this host's logs; those who ask at one time are given theirs together.

        Raises Refused("host.not_enrolled").
        """
        return await self._asking.join(parse_name(name, "host"), None)

    def challenge(self, name: str) -> wire.HostChallenge:
        """The same for one host at once. Raises Refused("host.not_enrolled")."""
        given = self._given((parse_name(name, "host"),))[name]
        if isinstance(given, MoorlineError):
            raise given
        return given

    async def _give(self, entries: list[Entry[None, wire.HostChallenge]]) -> None:
        given = await asyncio.to_thread(self._given, tuple(entry.host for entry in entries))
        for entry in entries:
            entry.tell(given[entry.host])

    def _given(self, names: tuple[str, ...]) -> dict[str, wire.HostChallenge | MoorlineError]:
        parts = self._parts
        nonces = {name: parts.random(_NONCE) for name in names}
        expires = Instant(parts.clock.now() + parts.terms.challenge_s)
        held = parts.store.open_challenges(nonces, expires)
        return {
            name: self._challenge(nonce, expires, held[name].progress) if name in held else _not_enrolled(name)
            for name, nonce in nonces.items()
        }

    def _challenge(self, nonce: bytes, expires: Instant, held: Progress | None) -> wire.HostChallenge:
        parts = self._parts
        go_on = held is not None and same(held.reference, parts.reference.digest) and not exhausted(held, parts.clock.now())
        return wire.HostChallenge(
            nonce=nonce,
            expires=expires,
            good_s=parts.terms.challenge_s,
            bank=parts.reference.bank,
            selection=parts.terms.pcrs,
            reset_count=0 if held is None else held.clock.reset_count,
            ima_from=held.ima_count if held is not None and go_on else 0,
            event_log_digest=None if held is None else held.boot_log,
            location="location" not in parts.terms.not_required,
        )

    async def appraise(self, name: str, evidence: wire.HostEvidence) -> wire.HostVerdict:
        """The signed verdict about a host, and its next challenge. Numbers are those of the module's docstring."""
        return await self._queue.join(parse_name(name, "host"), evidence)

    async def _round(self, entries: list[_Entry]) -> None:
        """Appraise, sign and write down a round, then answer it."""
        parts = self._parts
        asked = _asked(entries)
        held = await asyncio.to_thread(parts.store.look, asked)
        platforms = await parts.platforms(tuple(held))
        judged: list[_Judged] = []
        for number, entry in enumerate(entries):
            if entry.host not in asked:
                continue
            found = self._appraised(entry, asked[entry.host], held.get(entry.host), platforms)
            if isinstance(found, MoorlineError):
                entry.tell(found)
            else:
                judged.append(found)
            if number % _TURN == _TURN - 1:
                await asyncio.sleep(0)  # others of this process wait too
        signed, refusal = await self._signed(judged)  # 7
        now = parts.clock.now()
        next_expires = Instant(now + parts.terms.challenge_s)
        changes = [self._change(one, signed.get(one.entry.host)) for one in judged]
        settled = await asyncio.to_thread(  # 8
            parts.store.settle, changes, at=now, next_expires=next_expires, patience_until=self._patience_until
        )
        self.tell_readers()
        for one, change in zip(judged, changes, strict=True):
            one.entry.tell(self._answer(one, change, settled, refusal, next_expires))

    def _appraised(
        self, entry: _Entry, nonce: bytes, held: Held | None, platforms: Mapping[str, PlatformRecord | MoorlineError]
    ) -> _Judged | MoorlineError:
        if held is None:
            return _not_enrolled(entry.host)
        now = self._parts.clock.now()
        try:
            quote = self._appraisal.prove(held, entry.asked, nonce=nonce, now=now)  # 1
        except MoorlineError as error:
            return error
        try:
            platform = platforms[entry.host]
            if isinstance(platform, MoorlineError):
                raise platform
            appraised = self._appraisal.judge(held, entry.asked, quote, platform, nonce=nonce, now=now)  # 2 to 6
        except Unavailable as error:
            return error  # nothing was found out about the host
        except MoorlineError as error:
            return _Judged(entry=entry, nonce=nonce, before=held.progress, appraised=None, error=error, code=error.code)
        refusal = None if appraised.result is None else appraised.result.first_refusal()
        return _Judged(
            entry=entry,
            nonce=nonce,
            before=held.progress,
            appraised=appraised,
            error=None,
            code=None if refusal is None else refusal.code,
        )

    async def _signed(self, judged: list[_Judged]) -> tuple[dict[str, str], MoorlineError | None]:
        """Tokens by host, or why there are none."""
        messages = {one.entry.host: self._writer.signing_input(one.result) for one in judged if one.result is not None}
        if not messages:
            return {}, None
        try:
            signatures = await self._parts.sign(tuple(messages.values()))
        except MoorlineError as error:
            return {}, error
        pairs = zip(messages.items(), signatures, strict=True)
        return {name: ear.assemble(message, signature) for (name, message), signature in pairs}, None

    def _change(self, one: _Judged, token: str | None) -> Change:
        found = one.appraised
        if found is not None and found.result is None:
            return self._piece(one, found)
        affirms = found is not None and found.result is not None and found.result.status is Tier.AFFIRMING
        withdraw = None if affirms else one.code or "result.not_affirming"
        if found is None or (token is None and affirms):  # what nothing signed is read again from where it was read before
            return Change(
                host=one.entry.host,
                nonce=one.nonce,
                before=one.before,
                progress=None,
                boot_log=None,
                withdraw=withdraw,
                result=None,
                next_nonce=None,
            )
        assert found.result is not None
        result = None if token is None else _stored(one.entry.host, found.result, token, one.code)
        return Change(
            host=one.entry.host,
            nonce=one.nonce,
            before=one.before,
            progress=found.progress,
            boot_log=found.boot_log,
            withdraw=withdraw,
            result=result,
            next_nonce=None if token is None else self._parts.random(_NONCE),
        )

    def _piece(self, one: _Judged, found: Appraised) -> Change:
        """What stands, stands as long as its lease: a piece gives no verdict, takes none away and answers no question."""
        return Change(
            host=one.entry.host,
            nonce=one.nonce,
            before=one.before,
            progress=found.progress,
            boot_log=found.boot_log,
            withdraw=None,
            result=None,
            next_nonce=self._parts.random(_NONCE),
        )

    def _answer(
        self,
        one: _Judged,
        change: Change,
        settled: frozenset[str],
        refusal: MoorlineError | None,
        next_expires: Instant,
    ) -> wire.HostVerdict | MoorlineError:
        if change.host not in settled:
            return challenge_used(change.nonce)
        if one.error is not None:
            return one.error
        if change.next_nonce is None:
            assert refusal is not None
            return refusal
        following = self._challenge(change.next_nonce, next_expires, change.progress)
        if change.result is None:
            return wire.HostVerdict(ear=None, status=Tier.NONE.word, code="ima.unfinished", next=following)
        return wire.HostVerdict(ear=change.result.ear, status=change.result.status, code=one.code, next=following)

    def standing(self, name: str) -> StoredResult:
        """The result that holds now; raises Refused (`result.*`)."""
        return self._parts.store.standing_result(parse_name(name, "host"), now=self._parts.clock.now())

    async def events(self, *, after: int, wait_s: float) -> tuple[tuple[VerdictEvent, ...], int]:
        """Verdicts gained and lost after a cursor, as soon as there is one, or none after `wait_s`; and the newest cursor.

        Raises Conflict("events.cursor_unknown").
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + wait_s
        while True:
            changed, released = self._changed, self.released  # before the look: what comes after it sets these very events
            found, newest = await asyncio.to_thread(self._parts.store.events, after=after, limit=EVENTS_PAGE)
            if found or loop.time() >= until:
                return found, newest
            with suppress(TimeoutError):
                async with asyncio.timeout_at(until):
                    await changed.wait()
            if released.is_set():
                return (), newest

    def newest_event(self) -> int:
        """The newest cursor, 0 if there was no event yet."""
        return self._parts.store.newest_event()

    def patient(self) -> bool:
        """Whether this process has been up for a whole lease, and may blame hosts for their silence."""
        return self._parts.clock.now() >= self._patience_until

    async def sweep(self, watched: Callable[[str], bool] = lambda _: True) -> None:
        """Tell of the hosts, of those to watch, that fell silent. For `patience_until` see storage.verifier_events.

        A clock that went back makes this verifier patient anew: hosts that attest get leases by the new time, and whoever
        then still stands by the old one fell silent.
        """
        parts = self._parts
        now = parts.clock.now()
        if now < self._swept - SKEW_S:
            self._patience_until = Instant(now + parts.terms.lease_s)
        self._swept = now
        if not self.patient():
            return
        latest = Instant(now + parts.terms.lease_s + SKEW_S)
        if await asyncio.to_thread(parts.store.sweep, now=now, latest=latest, watched=watched):
            self.tell_readers()

    def tell_readers(self) -> None:
        """Wake whoever waits for events: there may be some, of this process or another over the same database."""
        waiting, self._changed = self._changed, asyncio.Event()
        waiting.set()

    def release_readers(self) -> None:
        """Answer whoever waits for events that there are none: this process stops, and they ask again, or another."""
        self.released.set()
        self.released = asyncio.Event()
        self.tell_readers()

    def overview(self) -> list[dict[str, object]]:
        """All enrolled hosts with their last results, for operators."""
        results = self._parts.store.results()
        rows: list[dict[str, object]] = []
        for enrolled in self._parts.store.hosts():
            last = results.get(enrolled.host)
            rows.append(
                {
                    "host": enrolled.host,
                    "enrolled": enrolled.enrolled,
                    "root": enrolled.root.value,
                    "status": None if last is None else last.status,
                    "code": None if last is None else last.code,
                    "withdrawn": None if last is None else last.withdrawn,
                    "issued": None if last is None else last.issued,
                    "expires": None if last is None else last.expires,
                }
            )
        return rows

    # ----------------------------------------------------------------------------------------------------------------


def _appraisal(parts: Parts) -> HostAppraisal:
    return HostAppraisal(
        verifier=parts.verifier,
        terms=parts.terms,
        reference=parts.reference,
        signers=parts.signers,
        simulated_allowed=parts.simulated_allowed,
        boot_log=parts.store.boot_log,
        measured=parts.measured,
    )


def _stored(host: str, result: AttestationResult, token: str, code: str | None) -> StoredResult:
    return StoredResult(
        host=host,
        ear=token,
        status=result.status.word,
        code=code,
        issued=result.issued,
        expires=result.expires,
        withdrawn=None,
    )


def _asked(entries: list[_Entry]) -> dict[str, bytes]:
    """The nonce that each host's quote says it answers; who sent no quote is told so."""
    asked: dict[str, bytes] = {}
    for entry in entries:
        try:
            asked[entry.host] = parse_quote(entry.asked.quoted).extra_data
        except MoorlineError as error:
            entry.tell(error)
    return asked


def _not_enrolled(name: str) -> Refused:
    return Refused("host.not_enrolled", "no such host is enrolled", got=name, remedy="enrol the host first")
