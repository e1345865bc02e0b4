"""How an attestation authority judges one host's evidence: steps 1 to 6 of services.attestation_authority, without a store.

`prove` is step 1: what fails there is told to the sender and changes nothing, since anybody can post evidence in a host's
name. `judge` is 2 to 6: what fails there is the host's own.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from moorline.clock import Instant
from moorline.digest import same
from moorline.errors import NotAuthentic, Refused, Unavailable
from moorline.evidence.eventlog import parse_event_log
from moorline.evidence.ima import PCR as IMA_PCR
from moorline.evidence.tpm_structures import LOCATION_NV
from moorline.ledger.records import PlatformRecord
from moorline.policy import distance, host, reference_values
from moorline.policy.distance import Judgement, Place
from moorline.policy.host_alike import AlikeHosts
from moorline.policy.reference_values import Reference
from moorline.rats import AttestationResult, EvidenceRoot
from moorline.storage.verifier_rounds import EnrolledHost, Held, Progress
from moorline.verification import ima, tpm_quote
from moorline.verification.eventlog import BootState, verify_boot
from moorline.verification.verified import Verified
from moorline.wire import host as wire
from moorline.wire import keys, schema

BOOTS: Final = 1024
"""Boots that are kept as they were read: hosts that boot alike share one, and a standing host shows the same each time."""
SKEW_S: Final = 5
"""By how much the clocks of two processes of one verifier may differ."""
MAX_PIECES: Final = 32
"""Pieces of one IMA list at most: 64 MiB of lines, some 400,000 files run since boot."""
PIECES_S: Final = 300
"""Seconds in which all pieces of a list must have come."""
_TEMPLATES: Final = ("ima-ng", "ima-sig")  # what distributions configure; lists of others are read the long way


Distance = Callable[[str, Place], Judgement]
"""What landmarks say about a host and the place it claims."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """How this authority appraises. `not_required` names fields of policy.host.HostPolicy, each with its reason."""

    lease_s: int
    challenge_s: int
    pcrs: tuple[int, ...]
    not_required: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Appraised:
    """The result, how far the host was read, and its boot log where it sent it.

    There is no result where the evidence was a piece of an IMA list that is not whole yet.
    """

    result: AttestationResult | None
    progress: Progress
    boot_log: bytes | None


class HostAppraisal:
    """Judges evidence of one provider's hosts by one set of reference values.

    `verifier` is the authority's SPIFFE ID; `boot_log` finds a log that a host sent before, by its digest; `measured` says
    what landmarks measured, where there are any.
    """

    def __init__(
        self,
        *,
        verifier: str,
        terms: Terms,
        reference: Reference,
        signers: tuple[keys.PublicKey, ...],
        simulated_allowed: bool,
        boot_log: Callable[[bytes], bytes | None],
        measured: Distance | None = None,
    ) -> None:
        self._verifier, self._terms, self._reference = verifier, terms, reference
        self._signers, self._simulated_allowed = signers, simulated_allowed
        self._boot_log, self._measured = boot_log, measured
        self._hosts = AlikeHosts(host.strict_policy(reference, not_required=terms.not_required), reference)
        self._allowed = ima.AllowedLines.load(reference.files, bank=reference.bank, templates=_TEMPLATES)
        self._boots: OrderedDict[tuple[bytes, tuple[bytes, ...]], BootState] = OrderedDict()

    def prove(
        self, held: Held, evidence: wire.HostEvidence, *, nonce: bytes, now: Instant
    ) -> Verified[tpm_quote.QuotedPcrs]:
        """Step 1. `nonce` is what the quote says it answers, and `held` says whether it is open.

        Raises what verification.tpm_quote finds, and NotAuthentic("tpm.nonce_mismatch").
        """
        enrolled = held.enrolled
        verified = tpm_quote.verify_quote(
            evidence.quoted,
            evidence.signature,
            wire.pcr_map(evidence),
            key=tpm_quote.attestation_key(enrolled.ak_public, enrolled.root),
            qualifying=nonce,
            bank=self._reference.bank,
            selection=self._terms.pcrs,
        )
        # The nonce was read from the quote: what makes it fresh is that it is open here, for this host, and is used up once.
        # One that is good for longer than any is was given before the clock went back, and its quote may be that old.
        latest = now + self._terms.challenge_s + SKEW_S
        if held.challenge_expires is None or not now <= held.challenge_expires <= latest:
            raise challenge_used(nonce)
        return verified

    def judge(
        self,
        held: Held,
        evidence: wire.HostEvidence,
        quote: Verified[tpm_quote.QuotedPcrs],
        platform: PlatformRecord,
        *,
        nonce: bytes,
        now: Instant,
    ) -> Appraised:
        """Steps 2 to 6. Raises Unavailable where nothing was found out about the host, any other error if something was."""
        _not_revoked(held.enrolled)
        registered(platform, held.enrolled.ek_digest, held.enrolled.root)
        facts, progress = self._verify_logs(held, evidence, quote, platform, nonce, now)
        if progress.pieces:
            return Appraised(result=None, progress=progress, boot_log=evidence.event_log)
        assert held.challenge_expires is not None
        asked = Instant(min(now, held.challenge_expires - self._terms.challenge_s))
        result = self._judge(facts, nonce, asked=asked, now=now)
        return Appraised(result=result, progress=progress, boot_log=evidence.event_log)

    def _verify_logs(
        self,
        held: Held,
        evidence: wire.HostEvidence,
        quote: Verified[tpm_quote.QuotedPcrs],
        platform: PlatformRecord,
        nonce: bytes,
        now: Instant,
    ) -> tuple[host.HostFacts, Progress]:
        reference, enrolled = self._reference, held.enrolled
        booted = tpm_quote.verify_progress(None if held.progress is None else held.progress.clock, quote.value.clock)  # 2
        before = None if booted else held.progress
        digest = _boot_log_digest(evidence, before)
        pcrs = quote.value.pcrs
        boot = self._boot(digest, evidence.event_log, pcrs)  # 3
        start, standing = self._ima_start(before, evidence.ima_from)
        read = ima.verify_ima(  # 4
            *(start, evidence.ima),
            bank=reference.bank,
            quoted=pcrs[IMA_PCR],
            allowed=self._allowed,
            more=evidence.ima_more,
        )
        pieces, since = (0, Instant(0)) if read.whole else _one_piece_more(before if evidence.ima_from else None, now)
        standing = host.appraise_files(
            standing, read.entries, reference=reference, aggregate=ima.boot_aggregate(pcrs), allowed=read.allowed
        )
        located = self._location(enrolled, evidence, platform, nonce)  # 5
        facts = host.HostFacts(
            host=enrolled.host,
            ek_digest=enrolled.ek_digest,
            chip_id=platform.chip_id,
            quote=quote,
            boot=boot,
            boot_digest=digest,
            files=standing,
            location=located,
            distance=self._judged_distance(located),
        )
        progress = Progress(
            clock=quote.value.clock,
            ima_count=read.state.count,
            ima_running=read.state.running,
            reference=reference.digest,
            standing=_standing_encoded(standing),
            boot_log=digest,
            pieces=pieces,
            pieces_since=since,
        )
        return facts, progress

    def _boot(self, digest: bytes, sent: bytes | None, pcrs: Mapping[int, bytes]) -> BootState:
        quoted = {pcr: pcrs[pcr] for pcr in self._terms.pcrs if pcr != IMA_PCR}
        key = (digest, tuple(quoted.values()))
        found = self._boots.get(key)
        if found is None:
            data = sent if sent is not None else self._boot_log(digest)
            if data is None:
                raise _log_missing()
            found = verify_boot(parse_event_log(data), bank=self._reference.bank, quoted=quoted, pcrs=tuple(quoted))
            self._boots[key] = found
            if len(self._boots) > BOOTS:
                self._boots.popitem(last=False)
        else:
            self._boots.move_to_end(key)
        return found

    def _ima_start(self, held: Progress | None, offset: int) -> tuple[ima.ImaState, host.FileStanding]:
        if offset == 0:
            return ima.initial(self._reference.bank), host.NO_FILES
        if held is not None and not same(held.reference, self._reference.digest):
            raise Unavailable(  # it was challenged before these values came: no fault of the host's
                "ima.judged_anew",
                "the reference values are others than when this host was asked",
                expected="the list from its beginning",
                got=f"from entry {offset}",
                remedy="send the list from its beginning",
            )
        if held is None or held.ima_count != offset:
            raise Refused(
                "ima.wrong_offset",
                "the IMA list does not go on where this verifier stopped",
                expected=0 if held is None else held.ima_count,
                got=offset,
                remedy="send the list from its beginning",
            )
        state = ima.ImaState(count=held.ima_count, running=held.ima_running)
        return state, _standing_decoded(held.standing)

    def _location(
        self, enrolled: EnrolledHost, evidence: wire.HostEvidence, platform: PlatformRecord, nonce: bytes
    ) -> host.ProvenLocation | None:
        shown = evidence.location
        if shown is None:
            return None
        certified = tpm_quote.verify_nv_certification(
            shown.certified,
            shown.signature,
            key=tpm_quote.attestation_key(enrolled.ak_public, enrolled.root),
            qualifying=nonce,
            index=LOCATION_NV,
        )
        tag = reference_values.parse_verified_tag(shown.tag, self._signers)
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

    def _judged_distance(self, located: host.ProvenLocation | None) -> Judgement | None:
        if self._measured is None or located is None or located.tag.geographical is None:
            return None
        return self._measured(located.tag.host, distance.parse_place(located.tag.geographical))

    def _judge(self, facts: host.HostFacts, nonce: bytes, *, asked: Instant, now: Instant) -> AttestationResult:
        if not self._reference.valid.contains(now):
            raise Unavailable(
                "reference.not_valid_now",
                "the reference values are not valid at this time",
                expected=f"{self._reference.valid.not_before} to {self._reference.valid.not_after}",
                got=now,
                remedy="put the newest sets in place",
            )
        appraisal = host.Appraisal(
            verifier=self._verifier,
            issued=now,
            expires=Instant(asked + self._terms.lease_s),  # a lease counts from the question, not from the answer
            nonce=nonce,
            simulated_allowed=self._simulated_allowed,
        )
        return self._hosts.appraise(facts, appraisal)


@lru_cache(maxsize=BOOTS)  # hosts that ran the same files have the same standing
def _standing_decoded(data: bytes) -> host.FileStanding:
    return schema.decode(host.FileStanding, data)


@lru_cache(maxsize=BOOTS)
def _standing_encoded(standing: host.FileStanding) -> bytes:
    return schema.encode(standing)


def registered(platform: PlatformRecord, ek_digest: bytes, root: EvidenceRoot) -> None:
    """Raises Refused (`host.platform_mismatch`, `host.simulation_undeclared`) unless the record is of this very TPM."""
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


def _not_revoked(enrolled: EnrolledHost) -> None:
    if enrolled.refused is not None:
        raise NotAuthentic(
            "host.tpm_revoked",
            "the maker of this host's TPM revoked it, or an authority above it, after it enrolled",
            got=enrolled.host,
            remedy="put another TPM into the machine and give it a new name",
        )


def exhausted(progress: Progress, now: Instant) -> bool:
    """Whether the pieces of a host's list were too many, or took too long: then it begins anew."""
    return progress.pieces >= MAX_PIECES or (progress.pieces > 0 and not 0 <= now - progress.pieces_since < PIECES_S)


def _one_piece_more(before: Progress | None, now: Instant) -> tuple[int, Instant]:
    """Number of pieces with this one, and when the first came. Raises Refused("ima.never_whole")."""
    if before is None or before.pieces == 0:
        return 1, now
    if exhausted(before, now):
        raise Refused(
            "ima.never_whole",
            "the pieces of the IMA list do not add up to what the TPM quotes",
            expected=f"at most {MAX_PIECES} pieces in {PIECES_S} s",
            got=f"{before.pieces + 1} pieces in {now - before.pieces_since} s",
            remedy="find out why the list does not end; boot the host if it is longer",
        )
    return before.pieces + 1, before.pieces_since


def challenge_used(nonce: bytes) -> NotAuthentic:
    """What is said to evidence whose challenge is not open: never given, used up, expired, or another host's."""
    return NotAuthentic(
        "tpm.nonce_mismatch",
        "the attestation answers no open challenge",
        expected="a nonce of this verifier, unused and not expired",
        got=nonce,
        remedy="ask for a fresh challenge and quote again",
    )


def _boot_log_digest(evidence: wire.HostEvidence, before: Progress | None) -> bytes:
    if evidence.event_log is not None:
        return hashlib.sha256(evidence.event_log).digest()
    if before is None:
        raise _log_missing()
    return before.boot_log


def _log_missing() -> Refused:
    return Refused("host.event_log_missing", "the host booted and sent no boot log", remedy="send the log with the evidence")
