"""How a host attests: enrol once, then answer challenges with a quote and what its logs gained since.

The agent runs on a machine whose administrator may be the attacker, so nothing here is trusted by anybody: it carries
bytes from the TPM and the logs to the verifier. It comes once a period, and at once when the verifier asks (`held`: the
verifier over connections that may wait for long). It sends the boot log only when the verifier does not hold it, and the IMA
list from where the verifier stopped, in pieces if it is long; after a refusal it starts over from its beginning, once.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from moorline.attesters.tpm import Quoted, Tpm
from moorline.errors import Malformed, MoorlineError, Unavailable
from moorline.evidence.tpm_quote import parse_quote
from moorline.evidence.tpm_structures import ALG_SHA256
from moorline.host_agent.verifier_processes import Poster
from moorline.wire import host as wire
from moorline.wire import schema

RETRY_S: Final = 2.0
HELD_S: Final = 100
"""Seconds for which a request to be asked stays open at the verifier."""
_ANSWER_S: Final = 2.0
"""A challenge that is good for less than this is not answered: another is asked for."""


_FROM_THE_BEGINNING: Final = frozenset(
    {"ima.replay_mismatch", "ima.wrong_offset", "ima.judged_anew", "host.event_log_missing"}
)
"""Refusals that the whole list may mend: the verifier knows less of this host than its challenge said."""
_CHALLENGE_GONE: Final = "tpm.nonce_mismatch"


@dataclass(frozen=True, slots=True)
class ImaLines:
    """Whole lines of an IMA list; `more` says that others follow which found no place."""

    data: bytes
    more: bool


_NO_LINES: Final = ImaLines(b"", more=False)


class LogSource(Protocol):
    """Where the logs of this boot are."""

    def event_log(self) -> bytes:
        """The boot log, whole."""
        ...

    def ima_lines(self, first: int) -> ImaLines:
        """The lines of the IMA list from entry number `first` on, at most MAX_IMA_DELTA bytes, whole lines."""
        ...


@dataclass(frozen=True, slots=True)
class FileLogs:
    """Logs in two files: those of securityfs on a host, those of the firmware simulator elsewhere."""

    events: Path
    ima: Path

    def event_log(self) -> bytes:
        """The boot log, whole. Raises Unavailable("host.no_event_log")."""
        try:
            return self.events.read_bytes()
        except OSError as error:
            raise Unavailable("host.no_event_log", "the boot log cannot be read", got=error) from None

    def ima_lines(self, first: int) -> ImaLines:
        """The lines from entry `first` on. Raises Unavailable("host.no_ima_list")."""
        kept, more = bytearray(), False
        try:
            with self.ima.open("rb") as file:
                for number, line in enumerate(file):
                    if number < first or not line.endswith(b"\n"):
                        continue
                    if len(kept) + len(line) > wire.MAX_IMA_DELTA:
                        more = True
                        break
                    kept += line
        except OSError as error:
            raise Unavailable("host.no_ima_list", "the IMA list cannot be read", got=error) from None
        return ImaLines(bytes(kept), more)


class HostAttestation:
    """Attestation of one host towards one verifier. `tag` is the signed location tag, if this host has one."""

    def __init__(
        self,
        *,
        host: str,
        verifier: Poster,
        tpm: Tpm,
        logs: LogSource,
        tag: bytes | None,
        period_s: float,
        held: Poster | None = None,
    ) -> None:
        self._host, self._verifier, self._tpm, self._logs = host, verifier, tpm, logs
        self._tag, self._period_s = tag, period_s
        self._held_open, self._asked = held, asyncio.Event()
        self._enrolled = False
        self._next: tuple[wire.HostChallenge, float] | None = None

    async def enrol(self) -> wire.Enrolled:
        """Bind this TPM to the host's name at the verifier; harmless to repeat. Raises what the verifier answers."""
        endorsement = await asyncio.to_thread(self._tpm.endorsement)
        request = wire.EnrolRequest(
            ek_public=endorsement.public,
            ek_certificates=endorsement.certificates,
            ak_public=await asyncio.to_thread(self._tpm.attestation_key),
        )
        answer = await self._verifier.post_cbor(f"/v1/hosts/{self._host}/enrol", schema.encode(request))
        challenge = schema.decode(wire.EnrolChallenge, answer)
        activated = await asyncio.to_thread(self._tpm.activate, challenge.credential_blob, challenge.secret)
        proof = wire.EnrolProof(enrolment=challenge.enrolment, activated=activated)
        answer = await self._verifier.post_cbor(f"/v1/hosts/{self._host}/enrol/finish", schema.encode(proof))
        self._enrolled = True
        return schema.decode(wire.Enrolled, answer)

    async def attest(self) -> wire.HostVerdict:
        """Answer one challenge, or as many as the IMA list has pieces; the verdict.

        Raises the verifier's typed error where there is none.
        """
        try:
            return await self._attest_from(None)
        except MoorlineError as error:
            if error.code == _CHALLENGE_GONE:
                offset = None
            elif error.code in _FROM_THE_BEGINNING:
                offset = 0
            else:
                raise
        return await self._attest_from(offset)

    async def run(self, on_verdict: Callable[[wire.HostVerdict | MoorlineError], None]) -> None:
        """Enrol, then attest every period and when asked, until cancelled. Errors are reported and tried again."""
        listening = asyncio.ensure_future(self._listen()) if self._held_open is not None else None
        try:
            while True:
                asked = self._asked.is_set()
                self._asked.clear()
                if asked:
                    self._next = None  # a challenge from before the question answers nothing
                try:
                    if not self._enrolled:
                        await self.enrol()
                    on_verdict(await self.attest())
                except MoorlineError as error:
                    on_verdict(error)
                    if asked:
                        await asyncio.sleep(min(self._period_s, RETRY_S))
                        self._asked.set()
                await self._pause()
        finally:
            if listening is not None:
                listening.cancel()

    async def _pause(self) -> None:
        """Until the period is over, or the verifier asks."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._period_s if self._enrolled else min(self._period_s, RETRY_S)):
                await self._asked.wait()

    async def _listen(self) -> None:
        """Keep one request open at the verifier, which is answered when it asks; until cancelled."""
        assert self._held_open is not None
        known = 0
        while True:
            waiting = wire.AskWait(host=self._host, known=known, wait_s=HELD_S)
            began = asyncio.get_running_loop().time()
            try:
                answer = await self._held_open.post_cbor("/v1/wait", schema.encode(waiting))
                number = schema.decode(wire.Asked, answer).number
            except MoorlineError:
                await asyncio.sleep(RETRY_S)  # not enrolled yet, or the verifier is away: attesting says which
                continue
            if number > known:
                known = number
                self._asked.set()
            elif asyncio.get_running_loop().time() - began < RETRY_S:
                await asyncio.sleep(RETRY_S)  # somebody else waits in this name, or the verifier holds nothing

    async def evidence_for_session(self, binding: bytes) -> bytes:
        """HostEvidence for the attested session, role `host`: a quote that answers this session and no other; no logs."""
        quoted = await asyncio.to_thread(
            self._tpm.quote, wire.session_qualifying_data(binding), ALG_SHA256, tuple(range(11))
        )
        return schema.encode(_evidence(quoted, ALG_SHA256))

    async def _attest_from(self, offset: int | None) -> wire.HostVerdict:
        verdict = await self._attest_once(offset)
        while verdict.ear is None:  # a piece was taken; it is the verifier that bounds how many
            verdict = await self._attest_once(None)
        return verdict

    async def _attest_once(self, offset: int | None) -> wire.HostVerdict:
        challenge = self._held() or await self._ask()
        evidence = await asyncio.to_thread(self._answer, challenge, offset)
        answer = await self._verifier.post_cbor(f"/v1/hosts/{self._host}/evidence", schema.encode(evidence))
        verdict = schema.decode(wire.HostVerdict, answer, max_bytes=wire.MAX_EVIDENCE)
        if verdict.next is not None:
            self._next = (verdict.next, asyncio.get_running_loop().time())
        return verdict

    def _held(self) -> wire.HostChallenge | None:
        """The challenge that came with the last verdict, once, while it is good."""
        held, self._next = self._next, None
        if held is None or asyncio.get_running_loop().time() - held[1] > held[0].good_s - _ANSWER_S:
            return None
        return held[0]

    async def _ask(self) -> wire.HostChallenge:
        asked = schema.encode(wire.ChallengeRequest(host=self._host))
        answer = await self._verifier.post_cbor(f"/v1/hosts/{self._host}/challenge", asked)
        return schema.decode(wire.HostChallenge, answer)

    def _answer(self, challenge: wire.HostChallenge, offset: int | None) -> wire.HostEvidence:
        quoted = self._tpm.quote(challenge.nonce, challenge.bank, challenge.selection)
        same_boot = parse_quote(quoted.attest).clock.reset_count == challenge.reset_count
        first = (challenge.ima_from if same_boot else 0) if offset is None else offset
        events = self._logs.event_log()
        known = offset is None and same_boot and hashlib.sha256(events).digest() == challenge.event_log_digest
        location = self._location(challenge.nonce) if challenge.location else None
        # The list is read after the quote, so that it is never behind it; the verifier takes what was quoted and no more.
        return _evidence(
            quoted,
            challenge.bank,
            event_log=None if known else events,
            ima_from=first,
            ima=self._logs.ima_lines(first),
            location=location,
        )

    def _location(self, nonce: bytes) -> wire.LocationEvidence | None:
        certified = None if self._tag is None else self._tpm.certify_location(nonce)
        if certified is None or self._tag is None:
            return None
        return wire.LocationEvidence(tag=self._tag, certified=certified[0], signature=certified[1])


def _evidence(
    quoted: Quoted,
    bank: int,
    *,
    event_log: bytes | None = None,
    ima_from: int = 0,
    ima: ImaLines = _NO_LINES,
    location: wire.LocationEvidence | None = None,
) -> wire.HostEvidence:
    if len(quoted.pcrs) > wire.MAX_PCRS:
        raise Malformed("host.too_many_pcrs", "more PCRs were asked for than there are", got=len(quoted.pcrs))
    return wire.HostEvidence(
        quoted=quoted.attest,
        signature=quoted.signature,
        bank=bank,
        pcrs=tuple(wire.PcrValue(index=index, digest=digest) for index, digest in sorted(quoted.pcrs.items())),
        event_log=event_log,
        ima_from=ima_from,
        ima=ima.data,
        ima_more=ima.more,
        location=location,
    )
