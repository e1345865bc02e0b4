"""The attestation authority (RFC 9334 Verifier) of one provider: enrolment, challenge, appraisal, result. No HTTP here.

Enrolment:
1. the endorsement certificate leads to a configured maker of TPMs that did not revoke it, as its current lists say, and
   the attestation key cannot sign foreign data;
2. the provider's platform record on the ledger names this endorsement key for this host, and says `simulated` exactly where
   the anchor is a simulated one;
3. neither the name nor the endorsement key belongs to another; 4. the TPM opens a credential made for both keys.

Appraisal:
1. the quote is by the enrolled key (verification.tpm_quote) and answers an open challenge of this verifier, which it uses
   up;
2. counters of the TPM did not go back; 3. the boot log replays; 4. the IMA list replays from what is held here;
5. the certified location tag is genuine; 6. policy.host judges; 7. how far the host was read is stored, and a result that
   is no longer affirming is withdrawn, before anything is signed or answered; 8. the result is signed and stored. Where the
   result affirms, nothing is to be withdrawn, and 7 is done with 8 in one transaction: if it is lost, the host is read again
   from where it was read before, and its old result ends with its lease.

A verdict gained or lost is an event with a cursor, stored with the verdict (storage.verifier_events); so is the silence of a
host whose lease ran out, which `sweep` finds.

Anybody can post evidence in a host's name, so a failure before step 1 is done is told to the sender and changes nothing: the
standing result ends by itself when its lease does. A failure after it is the host's own, and withdraws the result at once.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from cryptography.hazmat.primitives.asymmetric import ec

from moorline.clock import Clock, Instant
from moorline.digest import same
from moorline.errors import MoorlineError, NotAuthentic, Refused, Unavailable
from moorline.evidence.eventlog import parse_event_log
from moorline.evidence.ima import PCR as IMA_PCR
from moorline.evidence.tpm_quote import parse_quote
from moorline.evidence.tpm_structures import LOCATION_NV, parse_public
from moorline.ledger.records import PlatformRecord
from moorline.nfv import parse_name
from moorline.policy import ear, host, reference_values
from moorline.policy.reference_values import Reference
from moorline.rats import AttestationResult, EvidenceRoot, Tier
from moorline.storage.verifier_events import VerdictEvent
from moorline.storage.verifier_store import EnrolledHost, OpenEnrolment, Progress, StoredResult, VerifierStore
from moorline.verification import ima, tpm_identity, tpm_quote
from moorline.verification.eventlog import BootState, verify_boot
from moorline.verification.tpm_revocation import Revocation
from moorline.verification.verified import Verified
from moorline.wire import host as wire
from moorline.wire import keys, schema

PlatformLookup = Callable[[str], Awaitable[PlatformRecord]]
"""The active platform record of a host of this provider; raises Refused (`ledger.*`) if there is none."""

Sign = Callable[[bytes], Awaitable[bytes]]
"""ES256 over a message with the verifier's key, wherever it is: 64 bytes, r | s."""

EVENTS_PAGE: Final = 500
"""Events in one answer at most; the reader comes again for more."""
_NONCE: Final = 32
_SECRET: Final = 32
_BOOT_LOGS: Final = 64
_TEMPLATES: Final = ("ima-ng", "ima-sig")  # what distributions configure; lists of others are read the long way


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """How this authority appraises. `not_required` names fields of policy.host.HostPolicy, each with its reason."""

    lease_s: int
    challenge_s: int
    pcrs: tuple[int, ...]
    not_required: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What an authority is made of. `verifier` is its SPIFFE ID, `audience` its trust domain; `random` gives fresh bytes.

    `revocation` reads what is held of TPM makers' CRLs, at each enrolment.
    """

    verifier: str
    audience: str
    terms: Terms
    anchors: tuple[tpm_identity.TpmAnchor, ...]
    revocation: Callable[[], Revocation]
    simulated_allowed: bool
    reference: Reference
    signers: tuple[keys.PublicKey, ...]
    platform: PlatformLookup
    sign: Sign
    store: VerifierStore
    clock: Clock
    random: Callable[[int], bytes]


class AttestationAuthority:
    """One verifier. State is in its store, so that it survives a restart."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._policy = host.strict_policy(parts.reference, not_required=parts.terms.not_required)
        reference = parts.reference
        self._allowed = ima.AllowedLines.load(reference.files, bank=reference.bank, templates=_TEMPLATES)
        self._locks: dict[str, asyncio.Lock] = {}
        self._changed = asyncio.Event()
        self._patience_until = Instant(parts.clock.now() + parts.terms.lease_s)

    # Enrolment ------------------------------------------------------------------------------------------------------

    async def begin_enrolment(self, name: str, request: wire.EnrolRequest) -> wire.EnrolChallenge:
        """A credential that only the TPM of both keys can open. Raises what the module's steps 1 to 3 find."""
        parts = self._parts
        now = parts.clock.now()
        verified = tpm_identity.verify_endorsement(
            request.ek_public,
            request.ek_certificates,
            anchors=parts.anchors,
            revocation=await asyncio.to_thread(parts.revocation),
            now=now,
        )
        ak = parse_public(request.ak_public)
        tpm_quote.require_ak_attributes(ak)
        await self._registered(name, verified.value.digest, verified.root)
        parts.store.require_free(name, verified.value.digest)
        secret, enrolment = parts.random(_SECRET), parts.random(_NONCE)
        blob, sealed = self._credential(verified, ak.name, secret)
        expires = Instant(now + parts.terms.challenge_s)
        parts.store.open_enrolment(
            OpenEnrolment(
                enrolment=enrolment,
                host=name,
                ek_digest=verified.value.digest,
                ak_public=request.ak_public,
                root=verified.root,
                secret_digest=hashlib.sha256(secret).digest(),
                expires=expires,
            )
        )
        return wire.EnrolChallenge(enrolment=enrolment, credential_blob=blob, secret=sealed, expires=expires)

    async def finish_enrolment(self, name: str, proof: wire.EnrolProof) -> wire.Enrolled:
        """The binding of name and keys, for good. Raises NotAuthentic("enrol.unknown" | "enrol.activation"), Conflict."""
        parts = self._parts
        now = parts.clock.now()
        opened = parts.store.take_enrolment(proof.enrolment, now=now)
        if opened.host != name or not same(hashlib.sha256(proof.activated).digest(), opened.secret_digest):
            raise NotAuthentic(
                "enrol.activation", "the credential was not opened by the TPM it was made for", remedy="begin again"
            )
        await self._registered(name, opened.ek_digest, opened.root)
        bound = parts.store.enrol(
            EnrolledHost(host=name, ek_digest=opened.ek_digest, ak_public=opened.ak_public, root=opened.root, enrolled=now)
        )
        return wire.Enrolled(host=name, ak_name=parse_public(bound.ak_public).name, ek_digest=bound.ek_digest)

    def enrolled(self, name: str) -> EnrolledHost:
        """The keys of an enrolled host; raises Refused("host.not_enrolled")."""
        return self._parts.store.host(parse_name(name, "host"))

    # Attestation ----------------------------------------------------------------------------------------------------

    def challenge(self, name: str) -> wire.HostChallenge:
        """A fresh nonce, and what is already held of this host's logs. Raises Refused("host.not_enrolled")."""
        parts = self._parts
        self.enrolled(name)
        nonce = parts.random(_NONCE)
        expires = Instant(parts.clock.now() + parts.terms.challenge_s)
        parts.store.open_challenge(name, nonce, expires)
        held = parts.store.progress(name)
        judged_now = held is not None and same(held.reference, parts.reference.digest)
        return wire.HostChallenge(
            nonce=nonce,
            expires=expires,
            bank=parts.reference.bank,
            selection=parts.terms.pcrs,
            reset_count=0 if held is None else held.clock.reset_count,
            ima_from=held.ima_count if held is not None and judged_now else 0,
            event_log_digest=None if held is None else hashlib.sha256(held.event_log).digest(),
            location="location" not in parts.terms.not_required,
        )

    async def appraise(self, name: str, evidence: wire.HostEvidence) -> wire.HostVerdict:
        """The signed verdict about a host. Numbers are those of the module's docstring."""
        enrolled = self.enrolled(name)
        async with self._locks.setdefault(name, asyncio.Lock()):  # as many as there are enrolled hosts
            quote = self._verify_quote(enrolled, evidence)  # 1
            try:
                platform = await self._registered(name, enrolled.ek_digest, enrolled.root)
                facts, progress = self._verify_logs(enrolled, evidence, quote, platform)  # 2 to 5
            except Unavailable:
                raise  # nothing was found out about the host
            except MoorlineError as error:
                self._parts.store.withdraw(name, error.code, at=self._parts.clock.now())
                self._tell_readers()
                raise
            result = self._judge(facts, parse_quote(evidence.quoted).extra_data)  # 6
            refusal = result.first_refusal()
            code = None if refusal is None else refusal.code
            if result.status is Tier.AFFIRMING:
                return await self._publish(name, result, code, progress)  # 7 and 8
            withdraw = code or "result.not_affirming"
            self._parts.store.advance(name, progress, withdraw=withdraw, at=self._parts.clock.now())  # 7
            self._tell_readers()
            return await self._publish(name, result, code, None)  # 8

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
            changed = self._changed  # before the look: what comes after it sets this very event
            found, newest = self._parts.store.events(after=after, limit=EVENTS_PAGE)
            if found or loop.time() >= until:
                return found, newest
            with suppress(TimeoutError):
                async with asyncio.timeout_at(until):
                    await changed.wait()

    def newest_event(self) -> int:
        """The newest cursor, 0 if there was no event yet."""
        return self._parts.store.newest_event()

    def sweep(self) -> None:
        """Tell of hosts that fell silent. For `patience_until` see storage.verifier_events."""
        now = self._parts.clock.now()
        if now >= self._patience_until and self._parts.store.sweep(now=now):
            self._tell_readers()

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

    def _tell_readers(self) -> None:
        waiting, self._changed = self._changed, asyncio.Event()
        waiting.set()

    async def _registered(self, name: str, ek_digest: bytes, root: EvidenceRoot) -> PlatformRecord:
        platform = await self._parts.platform(parse_name(name, "host"))
        if not same(platform.ek_digest, ek_digest):
            raise Refused(
                "host.platform_mismatch",
                "the ledger registers another endorsement key for this host",
                expected=platform.ek_digest,
                got=ek_digest,
                remedy="register the platform with its TPM, or enrol the host under its own name",
            )
        if platform.simulated != (root is EvidenceRoot.TEST):
            raise Refused(
                "host.simulation_undeclared",
                "the platform record and the anchor disagree on whether this TPM is simulated",
                expected=f"simulated = {root is EvidenceRoot.TEST}",
                got=f"simulated = {platform.simulated}",
            )
        return platform

    def _credential(
        self, verified: Verified[tpm_identity.EndorsementKey], ak_name: bytes, secret: bytes
    ) -> tuple[bytes, bytes]:
        ek = verified.value.public
        key = ek.key()
        ephemeral = ec.generate_private_key(key.curve) if isinstance(key, ec.EllipticCurvePublicKey) else None
        seed = self._parts.random(len(ek.name) - 2)  # a name is two bytes of algorithm and its digest
        return tpm_identity.make_credential(ek, ak_name, secret, seed=seed, ephemeral=ephemeral)

    def _verify_quote(self, enrolled: EnrolledHost, evidence: wire.HostEvidence) -> Verified[tpm_quote.QuotedPcrs]:
        parts = self._parts
        nonce = parse_quote(evidence.quoted).extra_data
        verified = tpm_quote.verify_quote(
            evidence.quoted,
            evidence.signature,
            wire.pcr_map(evidence),
            key=tpm_quote.attestation_key(enrolled.ak_public, enrolled.root),
            qualifying=nonce,
            bank=parts.reference.bank,
            selection=parts.terms.pcrs,
        )
        # The nonce was read from the quote, so what makes it fresh is that it is open here, for this host, and only once.
        parts.store.take_challenge(enrolled.host, nonce, now=parts.clock.now())
        return verified

    def _verify_logs(
        self,
        enrolled: EnrolledHost,
        evidence: wire.HostEvidence,
        quote: Verified[tpm_quote.QuotedPcrs],
        platform: PlatformRecord,
    ) -> tuple[host.HostFacts, Progress]:
        parts = self._parts
        reference = parts.reference
        before = parts.store.progress(enrolled.host)
        booted = tpm_quote.verify_progress(None if before is None else before.clock, quote.value.clock)  # 2
        held = None if before is None or booted else before
        data = evidence.event_log if evidence.event_log is not None else (held.event_log if held is not None else None)
        if data is None:
            raise Refused(
                "host.event_log_missing", "the host booted and sent no boot log", remedy="send the log with the evidence"
            )
        pcrs = quote.value.pcrs
        boot = _boot_of(data, reference.bank, tuple((pcr, pcrs[pcr]) for pcr in parts.terms.pcrs if pcr != IMA_PCR))  # 3
        start, standing = self._ima_start(held, evidence.ima_from)
        read = ima.verify_ima(  # 4
            start, evidence.ima, bank=reference.bank, quoted=pcrs[IMA_PCR], allowed=self._allowed
        )
        standing = host.appraise_files(
            standing, read.entries, reference=reference, aggregate=ima.boot_aggregate(pcrs), allowed=read.allowed
        )
        facts = host.HostFacts(
            host=enrolled.host,
            ek_digest=enrolled.ek_digest,
            chip_id=platform.chip_id,
            quote=quote,
            boot=boot,
            boot_digest=hashlib.sha256(data).digest(),
            files=standing,
            location=self._location(enrolled, evidence, platform),  # 5
        )
        progress = Progress(
            clock=quote.value.clock,
            ima_count=read.state.count,
            ima_running=read.state.running,
            reference=reference.digest,
            standing=schema.encode(standing),
            event_log=data,
        )
        return facts, progress

    def _ima_start(self, held: Progress | None, offset: int) -> tuple[ima.ImaState, host.FileStanding]:
        if offset == 0:
            return ima.initial(self._parts.reference.bank), host.NO_FILES
        known = held is not None and same(held.reference, self._parts.reference.digest)
        if held is None or not known or held.ima_count != offset:
            raise Refused(
                "ima.wrong_offset",
                "the IMA list does not go on where this verifier stopped",
                expected=held.ima_count if held is not None and known else 0,
                got=offset,
                remedy="send the list from its beginning",
            )
        state = ima.ImaState(count=held.ima_count, running=held.ima_running)
        return state, schema.decode(host.FileStanding, held.standing)

    def _location(
        self, enrolled: EnrolledHost, evidence: wire.HostEvidence, platform: PlatformRecord
    ) -> host.ProvenLocation | None:
        shown = evidence.location
        if shown is None:
            return None
        certified = tpm_quote.verify_nv_certification(
            shown.certified,
            shown.signature,
            key=tpm_quote.attestation_key(enrolled.ak_public, enrolled.root),
            qualifying=parse_quote(evidence.quoted).extra_data,
            index=LOCATION_NV,
        )
        tag = reference_values.parse_verified_tag(shown.tag, self._parts.signers)
        digest = reference_values.tag_digest(shown.tag)
        if not same(digest, certified.value.contents):
            raise NotAuthentic(
                "host.location_tag_mismatch",
                "the location tag is not the one whose digest the TPM certifies",
                expected=certified.value.contents,
                got=digest,
                remedy="write the tag's digest into the TPM",
            )
        return host.ProvenLocation(
            tag=tag, digest=digest, registered_digest=platform.tag_digest, registered_location=platform.location
        )

    def _judge(self, facts: host.HostFacts, nonce: bytes) -> AttestationResult:
        parts = self._parts
        now = parts.clock.now()
        if not parts.reference.valid.contains(now):
            raise Unavailable(
                "reference.not_valid_now",
                "the reference values are not valid at this time",
                expected=f"{parts.reference.valid.not_before} to {parts.reference.valid.not_after}",
                got=now,
                remedy="configure the newest sets and restart the verifier",
            )
        appraisal = host.Appraisal(
            verifier=parts.verifier,
            issued=now,
            expires=Instant(now + parts.terms.lease_s),
            nonce=nonce,
            simulated_allowed=parts.simulated_allowed,
        )
        return host.appraise_host(facts, self._policy, reference=parts.reference, appraisal=appraisal)

    async def _publish(
        self, name: str, result: AttestationResult, code: str | None, progress: Progress | None
    ) -> wire.HostVerdict:
        message = ear.signing_input(result, audience=self._parts.audience)
        token = ear.assemble(message, await self._parts.sign(message))
        self._parts.store.put_result(
            StoredResult(
                host=name,
                ear=token,
                status=result.status.word,
                code=code,
                issued=result.issued,
                expires=result.expires,
                withdrawn=None,
            ),
            patience_until=self._patience_until,
            progress=progress,
        )
        self._tell_readers()
        return wire.HostVerdict(ear=token, status=result.status.word, code=code)


@lru_cache(maxsize=_BOOT_LOGS)  # bounded: a standing host shows the same log with the same PCR values every time
def _boot_of(data: bytes, bank: int, quoted: tuple[tuple[int, bytes], ...]) -> BootState:
    return verify_boot(parse_event_log(data), bank=bank, quoted=dict(quoted), pcrs=tuple(pcr for pcr, _ in quoted))
