"""TPM quotes of all kinds: bare, in other projects' envelopes, and vTPMs of Azure bound to SNP or TDX evidence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from cryptography.hazmat.primitives import serialization

from moorline.cli.evidence_cases import material
from moorline.cli.evidence_cases.case import Case
from moorline.cli.evidence_cases.compare import Facts
from moorline.cli.evidence_cases.families import snp as snp_family
from moorline.clock import Instant, Validity
from moorline.errors import Malformed, NotAuthentic, Unavailable
from moorline.evidence import azure_vtpm, corim, eventlog, snp, tpm_envelopes
from moorline.evidence import tpm_structures as tpm
from moorline.evidence.ima import PCR, parse_binary
from moorline.evidence.tdx_quote import parse_tdx_quote
from moorline.evidence.tpm_envelopes import QuotedEvidence, SignedQuote
from moorline.evidence.tpm_quote import Quote, parse_quote
from moorline.policy import intel_case
from moorline.policy.host import NO_FILES, FileStanding, appraise_files
from moorline.policy.reference_values import Reference
from moorline.policy.tpm import TpmFacts
from moorline.rats import EvidenceRoot, Finding
from moorline.verification import anchors, vtpm
from moorline.verification.eventlog import BootState, replay, verify_boot
from moorline.verification.ima import boot_aggregate, initial, verify_entries, verify_ima
from moorline.verification.intel_pck import production_intel_anchors
from moorline.verification.snp import verify_snp
from moorline.verification.verified import Verified

_ENVELOPES: Final = {
    "tpm-attestation-gotpm-proto": tpm_envelopes.parse_gotpm,
    "go-attestation-dump": tpm_envelopes.parse_goattest,
    "tpm-json-trustee": tpm_envelopes.parse_trustee,
    "enacttrust-token": tpm_envelopes.parse_enacttrust,
    "keylime-quote-string": tpm_envelopes.parse_keylime,
}
_AZURE: Final = frozenset(
    f"azure-{processor}-vtpm-json-v{version}" for processor in ("snp", "tdx") for version in (0, 1, 2)
) - {"azure-tdx-vtpm-json-v2"}
HINTS: Final = (
    frozenset(_ENVELOPES)
    | _AZURE
    | {
        "azure-hcl",
        "azure-tpm-quote-json",
        "azure-tpm-quote-bincode",
        "tdx-quote",
        "tpm-quote-msg",
        "tpm-quote-sig",
        "tpm-quote-sig-raw",
        "tpm2-tools-pcrs",
        "tcg-eventlog",
        "ima-ascii",
        "ima-binary",
    }
)
_BANKS: Final = {name: bank for bank, name in tpm.HASH_NAMES.items()}


def run(case: Case, facts: Facts) -> tuple[Finding, ...]:
    """The findings of one case (`compare.Family`)."""
    if case.mode == "policy":
        raise Unavailable("material.policy_unsupported", "no policy is defined for a quote by itself")
    _proven(case, facts)
    return ()


def verify(case: Case, facts: Facts, *, bank: Callable[[str], bool], allowed: Mapping[bytes, frozenset[bytes]]) -> TpmFacts:
    """What the case proves about the quote in a bank that `bank` says yes to (else the first), before the rest of a policy.

    `allowed` is digests by path; measured files are counted against them.
    """
    held, boots = _proven(case, facts)
    quote = next((one for one in held if bank(tpm.HASH_NAMES.get(one.value.bank, ""))), held[0])
    return TpmFacts(quote=quote, boot=boots.get(quote.value.bank), files=_files(case, quote.value, allowed))


def _proven(case: Case, facts: Facts) -> tuple[list[Verified[vtpm.VerifiedQuote]], dict[int, BootState]]:
    hints = {entry.hint for entry in case.evidence}
    if hints & _AZURE or "azure-hcl" in hints:
        return [_azure(case, facts)], {}
    return _quoted(case, _evidence(case), facts)


def _files(case: Case, quote: vtpm.VerifiedQuote, allowed: Mapping[bytes, frozenset[bytes]]) -> FileStanding | None:
    texts, binaries = case.all_of("ima-ascii"), case.all_of("ima-binary")
    if not texts and not binaries:
        return None
    if len(texts) + len(binaries) > 1 or PCR not in quote.pcrs:
        raise Unavailable("tpm.log_unproven", "not one IMA list, or the quote does not prove PCR 10", got=len(texts))
    if texts:
        progress = verify_ima(initial(quote.bank), texts[0], bank=quote.bank, quoted=quote.pcrs[PCR])
    else:
        entries = parse_binary(binaries[0])
        progress = verify_entries(initial(quote.bank), entries, bank=quote.bank, quoted=quote.pcrs[PCR])
    aggregated = set(range(10)) <= set(quote.pcrs)
    reference = Reference(
        bank=quote.bank,
        components={},
        files=dict(allowed),
        valid=Validity(not_before=_time(case), not_after=_time(case)),
        digest=b"",
    )
    return appraise_files(
        NO_FILES,
        progress.entries,
        reference=reference,
        aggregate=boot_aggregate(quote.pcrs) if aggregated else b"",  # which no entry has: it must be listed then
    )


# ---------------------------------------------------------------- a quote, and a key that is given or certified


def _evidence(case: Case) -> QuotedEvidence:
    first = case.evidence[0]
    if first.hint in _ENVELOPES:
        return _ENVELOPES[first.hint](case.read(first.file))
    logs = case.all_of("tcg-eventlog")
    if len(logs) > 1:
        raise Malformed("tpm.parts", "more than one boot log among the evidence", got=len(logs))
    return QuotedEvidence(
        quotes=(_parts(case),),
        ak_public=None,
        ak_spki=None,
        certificates=(),
        event_log=logs[0] if logs else None,
        node_id=None,
    )


def _parts(case: Case) -> SignedQuote:
    """A quote in separate files."""
    messages = case.all_of("tpm-quote-msg")
    signatures = case.all_of("tpm-quote-sig") + [_raw(one) for one in case.all_of("tpm-quote-sig-raw")]
    if len(messages) != 1 or len(signatures) != 1:
        raise Unavailable("tpm.parts", "not one quote and one signature among the evidence")
    bank: int | None = None
    pcrs: dict[int, bytes] = {}
    for values in case.all_of("tpm2-tools-pcrs"):
        banks = tpm_envelopes.parse_tpm2_tools_pcrs(values)
        if len(banks) != 1:
            raise Malformed("tpm.pcr_file", "values of more than one bank", got=len(banks))
        bank, pcrs = next(iter(banks.items()))
    return SignedQuote(message=messages[0], signature=signatures[0], bank=bank, pcrs=pcrs)


def _raw(signature: bytes) -> bytes:
    """A bare RSASSA signature over SHA-256 as TPMT_SIGNATURE."""
    return tpm.serialize_signature(tpm.Signature(tpm.ALG_RSASSA, tpm.ALG_SHA256, signature, b""))


def _quoted(
    case: Case, evidence: QuotedEvidence, facts: Facts
) -> tuple[list[Verified[vtpm.VerifiedQuote]], dict[int, BootState]]:
    wanted = _BANKS.get(case.text("pcr_bank") or "")
    for signed in evidence.quotes:
        quote = parse_quote(signed.message)
        if wanted is None or len(evidence.quotes) == 1 or signed.bank == wanted:
            facts.update(quote_facts(quote))
    if evidence.node_id is not None:
        facts["node_id"] = evidence.node_id.hex()
    key = _key(case, evidence)
    nonce = case.octets("nonce_hex")
    if nonce is None:
        raise Unavailable("material.nonce", "a quote is judged against a nonce, and the case gives none")
    held = [
        vtpm.verify_foreign_quote(
            signed.message,
            tpm.parse_signature(signed.signature),
            signed.pcrs,
            key=key,
            nonce=nonce,
            sha1=_sha1(case),
        )
        for signed in evidence.quotes
    ]
    if wanted is not None and all(one.value.bank != wanted for one in held):
        raise NotAuthentic("tpm.selection_mismatch", "no quote covers the bank that was asked for", got=len(held))
    if len(evidence.quotes) > 1:
        facts["pcr_banks"] = [tpm.HASH_NAMES[one.value.bank] for one in held]
        for one in held:
            facts[f"pcr_digest_{tpm.HASH_NAMES[one.value.bank]}_quote"] = one.value.quote.pcr_digest.hex()
    boots = {} if evidence.event_log is None else _log(evidence.event_log, [one.value for one in held], facts)
    return held, boots


def _sha1(case: Case) -> vtpm.Sha1:
    """Old evidence of others, in case folders, is judged by its own rules; what a person appraises today is not."""
    return vtpm.Sha1.REFUSED if case.text("sha1_signatures") == "refused" else vtpm.Sha1.ACCEPTED


def _log(data: bytes, held: list[vtpm.VerifiedQuote], facts: Facts) -> dict[int, BootState]:
    """The log replays to every quoted bank that it declares; what it does not extend it says nothing about."""
    log = eventlog.parse_event_log(data)
    facts["log_events"] = len(log.events)
    judged: dict[int, BootState] = {}
    for one in held:
        if one.bank in log.banks and one.pcrs:
            state = verify_boot(log, bank=one.bank, quoted=one.pcrs, pcrs=sorted(replay(log, one.bank)))
            if state.secure_boot is not None:
                facts["secure_boot"] = state.secure_boot
            judged[one.bank] = state
    if not judged:
        raise Unavailable("tpm.log_unproven", "no quoted bank is in the boot log")
    return judged


def quote_facts(quote: Quote) -> Facts:
    """What a quote says, for people."""
    facts: Facts = {
        "extra_data": quote.extra_data.hex(),
        "pcr_digest": quote.pcr_digest.hex(),
        "reset_count": quote.clock.reset_count,
        "safe": quote.clock.safe,
    }
    if len(quote.selections) == 1:
        chosen = quote.selections[0]
        facts["pcr_bank"] = tpm.HASH_NAMES.get(chosen.bank, hex(chosen.bank))
        facts["pcr_selection"] = list(chosen.indices)
    return facts


def _key(case: Case, evidence: QuotedEvidence) -> vtpm.QuoteKey:
    trust = case.text("ak_trust")
    if trust == "certificate":
        return _certified(case, evidence)
    if trust != "given":
        raise Unavailable("ak.trust_unknown", "the case does not say why the key is to be believed", got=trust)
    named = case.text("public_key_file")
    given = _named(case, named) if named is not None else _endorsed(case)
    if evidence.ak_public is not None and _spki(
        vtpm.given_public(evidence.ak_public, root=material.supplied_root(case))
    ) != _spki(given):
        raise NotAuthentic("ak.other_key", "the evidence names another key than the one enrolled")
    if evidence.ak_spki is not None and evidence.ak_spki != _spki(given):
        raise NotAuthentic("ak.other_key", "the evidence names another key than the one enrolled")
    return given


def _named(case: Case, file: str) -> vtpm.QuoteKey:
    data = case.read(file)
    hint = next((entry.hint for entry in case.endorsements if entry.file == file), "public-key-pem")
    if hint == "tpmt-public":
        return vtpm.given_public(data, root=material.supplied_root(case))
    if hint == "tpm2b-public":
        return vtpm.given_public(data[2:], root=material.supplied_root(case))
    return vtpm.given_key(material.spki(data), root=material.supplied_root(case))


def _endorsed(case: Case) -> vtpm.QuoteKey:
    for entry in case.endorsements:
        if entry.hint in ("corim", "comid"):
            keys = corim.parse_endorsed_keys(case.read(entry.file))
            if len(keys) == 1:
                return vtpm.given_key(material.spki(keys[0].pem.encode()), root=material.supplied_root(case))
        elif entry.hint in ("public-key-pem", "tpmt-public", "tpm2b-public"):
            return _named(case, entry.file)
    raise Unavailable("ak.unknown", "no attestation key was supplied", remedy="give the key that was enrolled")


def _certified(case: Case, evidence: QuotedEvidence) -> vtpm.QuoteKey:
    supplied = [*evidence.certificates]
    for entry in case.endorsements:
        if entry.hint in ("ak-cert-der", "ak-cert-pem", "cert-der", "cert-pem", "chain-pem"):
            supplied += material.certificates(case.read(entry.file))
    if evidence.ak_public is None or not supplied:
        raise Unavailable("ak.unknown", "the evidence brings no certificate of its key")
    return vtpm.certified_key(
        evidence.ak_public,
        supplied[0],
        (*supplied[1:], *vtpm.gce_intermediates()),
        roots=material.anchors(case) or vtpm.gce_roots(),
        now=_time(case),
    )


def _spki(key: vtpm.QuoteKey) -> bytes:
    return key.key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def _time(case: Case) -> Instant:
    if case.at is None:
        raise Unavailable("material.no_time", "certificates are dated, and the case gives no time to appraise at")
    return case.at


# ---------------------------------------------------------------- Azure: vTPM, runtime claims, hardware evidence


def _azure(case: Case, facts: Facts) -> Verified[vtpm.VerifiedQuote]:
    evidence = _azure_evidence(case)
    hcl = azure_vtpm.parse_hcl_report(evidence.hcl)
    claims = azure_vtpm.parse_runtime_claims(hcl.claims)
    quote = parse_quote(evidence.quote.message)
    facts.update(quote_facts(quote))
    if 0 in evidence.quote.pcrs:
        facts["pcr0"] = evidence.quote.pcrs[0].hex()
    if hcl.kind is azure_vtpm.ReportKind.SNP:
        report_data = _snp(case, hcl, evidence.vcek, facts)
    else:
        report_data = _tdx(case, hcl, evidence.td_quote, facts)
    key = vtpm.bound_key(hcl, claims, report_data=report_data, root=EvidenceRoot.HARDWARE)
    nonce = case.octets("nonce_hex")
    if nonce is None:
        raise Unavailable("material.nonce", "a quote is judged against a nonce, and the case gives none")
    verified = vtpm.verify_foreign_quote(
        evidence.quote.message,
        tpm.parse_signature(_raw(evidence.quote.signature)),
        evidence.quote.pcrs,
        key=key,
        nonce=nonce,
        sha1=vtpm.Sha1.REFUSED,
    )
    wanted = case.octets("user_data_hex")
    if wanted is not None and claims.user_data != wanted:
        raise NotAuthentic("vtpm.user_data_mismatch", "the runtime claims hold other user data than expected")
    return verified


def _azure_evidence(case: Case) -> azure_vtpm.AzureEvidence:
    first = case.evidence[0]
    if first.hint in _AZURE:
        return azure_vtpm.parse_envelope(case.read(first.file))
    hcl, td_quotes = case.all_of("azure-hcl"), case.all_of("tdx-quote")
    return azure_vtpm.AzureEvidence(
        hcl=hcl[0], quote=_azure_quote(case), td_quote=td_quotes[0] if td_quotes else None, vcek=None
    )


def _azure_quote(case: Case) -> azure_vtpm.VtpmQuote:
    for data in case.all_of("azure-tpm-quote-json"):
        return azure_vtpm.parse_quote_json(data)
    for data in case.all_of("azure-tpm-quote-bincode"):
        return azure_vtpm.parse_quote_bincode(data)
    messages, signatures = case.all_of("tpm-quote-msg"), case.all_of("tpm-quote-sig-raw")
    if len(messages) != 1 or len(signatures) != 1:
        raise Unavailable("tpm.parts", "not one quote and one signature among the evidence")
    return azure_vtpm.VtpmQuote(message=messages[0], signature=signatures[0], pcrs={})


def _snp(case: Case, hcl: azure_vtpm.HclReport, vcek: bytes | None, facts: Facts) -> bytes:
    report = snp.parse_report(hcl.hardware)
    facts.update(snp_family.report_facts(report))
    supplied = [] if vcek is None else [vcek]
    for entry in case.endorsements:
        supplied += material.certificates(case.read(entry.file))
    verify_snp(
        report,
        snp_family.endorsements(supplied, None, None),
        report_data=report.report_data,  # what it has to hold is judged with the runtime claims, by bound_key
        anchors=anchors.production_anchors(),
        now=_time(case),
    )
    return report.report_data


def _tdx(case: Case, hcl: azure_vtpm.HclReport, td_quote: bytes | None, facts: Facts) -> bytes:
    if td_quote is None:
        raise Unavailable("vtpm.td_quote_missing", "the evidence of a TDX guest brings no TD quote")
    outcome = intel_case.run_case(
        evidence=[intel_case.CaseFile(name="td-quote", hint="tdx-quote", data=td_quote)],
        endorsements=[
            intel_case.CaseFile(name=entry.file, hint=entry.hint, data=case.read(entry.file)) for entry in case.endorsements
        ],
        mode="authentic",
        at=case.at,
        inputs={"collateral": case.text("collateral") or "full"},
        policy={},
        anchors=production_intel_anchors(),
    )
    facts.update(outcome.facts)
    vtpm.require_same_domain(hcl, parse_tdx_quote(td_quote).report)
    return bytes.fromhex(str(outcome.facts["report_data"]))
