"""One appraisal of Intel evidence from files: what `moor evidence` and the vectors run. Kinds, rules, words, facts.

The files are untrusted, the inputs and the policy words are the caller's own (../shared/vectors/CASES.md names them).
`class_of` puts every code of the Intel rules into the class of that document.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Final

from moorline.clock import Instant
from moorline.errors import Malformed, Misconfigured, Unavailable
from moorline.evidence import ccel, dcap_quote, eventlog
from moorline.evidence.dcap_quote import TeeType
from moorline.evidence.intel_collateral import TcbStatus
from moorline.evidence.ratls import parse_oe_report, parse_ratls_certificate
from moorline.evidence.sgx_quote import parse_sgx_quote
from moorline.evidence.tdx_quote import parse_tdx_quote
from moorline.policy.intel import IntelPlatformPolicy
from moorline.policy.match import Exact, NotRequired, OneOf
from moorline.policy.sgx import SgxPolicy, appraise_sgx
from moorline.policy.tdx import TdxPolicy, appraise_tdx
from moorline.rats import Finding, Outcome
from moorline.verification import sgx, tdx
from moorline.verification.ccel import verify_ccel
from moorline.verification.intel_collateral import Collateral, IntelEndorsements
from moorline.verification.intel_endorsements import assemble, kind_of_json
from moorline.verification.intel_pck import IntelAnchors
from moorline.verification.sgx import SgxClaims, verify_ratls, verify_sgx
from moorline.verification.tdx import TdxClaims, verify_tdx
from moorline.verification.verified import Verified

_QUOTES: Final = ("sgx-quote", "tdx-quote", "oe-report", "ratls-cert")
_LOG: Final = "ccel"
_TABLE: Final = "ccel-acpi-table"
_NOT_ASKED: Final = NotRequired("the caller does not ask")
_PLATFORM_ASKED: Final = frozenset({"status"})


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseFile:
    """One file: its name for people, its kind (None: to be found by content), its bytes."""

    name: str
    hint: str | None
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseOutcome:
    """What came out: facts by name, and what policy saw (empty where none was asked for). A NOT_MET finding refuses."""

    facts: dict[str, str | bool]
    findings: tuple[Finding, ...]

    def first_refusal(self) -> Finding | None:
        """The first rule that was not met."""
        return next((one for one in self.findings if one.outcome is Outcome.NOT_MET), None)


def run_case(
    *,
    evidence: Sequence[CaseFile],
    endorsements: Sequence[CaseFile],
    mode: str,
    at: Instant | None,
    inputs: Mapping[str, object],
    policy: Mapping[str, object],
    anchors: IntelAnchors,
    simulated_allowed: bool = False,
) -> CaseOutcome:
    """The outcome of one appraisal of one quote, with its event log if there is one.

    `mode` is `authentic` (no policy) or `policy`. `simulated_allowed` is for callers that named the roots themselves. The
    rest is as for `verify_case`.
    """
    if mode not in ("authentic", "policy"):
        raise Misconfigured("case.inputs", "no such mode", expected="authentic or policy", got=mode)
    verified, facts = verify_case(evidence=evidence, endorsements=endorsements, at=at, inputs=inputs, anchors=anchors)
    findings = _appraise(verified, policy, simulated_allowed=simulated_allowed) if mode == "policy" else ()
    return CaseOutcome(facts=facts, findings=findings)


def verify_case(
    *,
    evidence: Sequence[CaseFile],
    endorsements: Sequence[CaseFile],
    at: Instant | None,
    inputs: Mapping[str, object],
    anchors: IntelAnchors,
) -> tuple[Verified[SgxClaims] | Verified[TdxClaims], dict[str, str | bool]]:
    """What the files prove, before any policy, and the facts for people; with its event log if there is one.

    Where `inputs` names no `report_data_hex` the quote's own is taken, so nothing is said about freshness. Raises Malformed,
    NotAuthentic and Unavailable with the codes of the rules, Unavailable("intel.no_time") without a time: everything Intel
    signs is dated, and no time is not a time; Misconfigured("case.inputs") for inputs that are no such thing.
    """
    kinds = {one.hint or detect(one.data): one for one in evidence}
    quotes = [kind for kind in kinds if kind in _QUOTES]
    if len(quotes) != 1 or len(kinds) != len(evidence):
        raise Malformed(
            "case.evidence", "one quote is needed, and at most one of every other kind", got=sorted(map(str, kinds))
        )
    kind, wanted = quotes[0], _collateral(inputs)
    given = assemble([(one.hint or detect(one.data) or "", one.data) for one in endorsements])
    if at is None:
        _require_certification(kind, kinds[kind].data)
        raise Unavailable(
            "intel.no_time", "certificates and statements are dated, and no time was given", remedy="say when to appraise"
        )
    verified = _verify(kind, kinds[kind].data, given, _report_data(inputs), (wanted, anchors, at))
    facts = _facts(verified)
    if _LOG in kinds:
        facts |= _log(kinds, verified)
    return verified, facts


def detect(data: bytes) -> str | None:
    """The kind of an Intel file by its content, None if it is none of ours (certificates, CRLs and logs have no owner)."""
    if data[:1] in (b"{", b" ", b"\n", b"\r", b"\t"):
        return kind_of_json(data)
    if data[:4] == b"CCEL":
        return _TABLE
    for kind, parse in (("oe-report", parse_oe_report), ("ratls-cert", parse_ratls_certificate)):
        try:
            parse(data)
        except Malformed:
            continue
        return kind
    try:
        return "sgx-quote" if dcap_quote.tee_of(data) is TeeType.SGX else "tdx-quote"
    except Malformed:
        return None


def _verify(
    kind: str,
    data: bytes,
    given: IntelEndorsements,
    report_data: bytes | None,
    terms: tuple[Collateral, IntelAnchors, Instant],
) -> Verified[SgxClaims] | Verified[TdxClaims]:
    collateral, anchors, now = terms
    if kind == "ratls-cert":
        return verify_ratls(data, given, collateral=collateral, anchors=anchors, now=now)
    if kind == "tdx-quote":
        domain = parse_tdx_quote(data)
        expected = domain.report.report_data if report_data is None else report_data
        return verify_tdx(domain, given, report_data=expected, collateral=collateral, anchors=anchors, now=now)
    enclave = parse_sgx_quote(parse_oe_report(data) if kind == "oe-report" else data)
    expected = enclave.report.report_data if report_data is None else report_data
    return verify_sgx(enclave, given, report_data=expected, collateral=collateral, anchors=anchors, now=now)


def _require_certification(kind: str, data: bytes) -> None:
    """A quote without its certificates lacks an endorsement at any time; that is the better answer."""
    if kind == "tdx-quote":
        tdx.endorsements_needed(parse_tdx_quote(data))
    elif kind != "ratls-cert":
        sgx.endorsements_needed(parse_sgx_quote(parse_oe_report(data) if kind == "oe-report" else data))


def _log(kinds: Mapping[str | None, CaseFile], verified: Verified[SgxClaims] | Verified[TdxClaims]) -> dict[str, str | bool]:
    claims = verified.value
    if not isinstance(claims, TdxClaims):
        raise Malformed("case.evidence", "an event log of a TDX guest beside another quote")
    if _TABLE in kinds:
        ccel.parse_ccel_table(kinds[_TABLE].data)
    verify_ccel(eventlog.parse_event_log(kinds[_LOG].data), claims.report.rtmrs, registers=(0, 1, 2))
    return {f"rtmr{number}": claims.report.rtmrs[number].hex() for number in range(3)}


def _facts(verified: Verified[SgxClaims] | Verified[TdxClaims]) -> dict[str, str | bool]:
    claims = verified.value
    facts: dict[str, str | bool] = {
        "report_data": claims.report.report_data.hex(),
        "debug": claims.report.debug,
        "fmspc": claims.platform.pck.fmspc.hex().upper(),
    }
    if claims.platform.tcb_status is not None:
        facts["tcb_status"] = claims.platform.tcb_status.value
    if isinstance(claims, TdxClaims):
        return facts | {"mr_td": claims.report.mr_td.hex()}
    return facts | {"mrenclave": claims.report.mr_enclave.hex(), "mrsigner": claims.report.mr_signer.hex()}


# ---------------------------------------------------------------- inputs and policy words


def _collateral(inputs: Mapping[str, object]) -> Collateral:
    value = inputs.get("collateral")
    if not isinstance(value, str) or value not in set(Collateral):
        raise Misconfigured("case.inputs", "no such demand on collateral", expected=", ".join(Collateral), got=value)
    return Collateral(str(value))


def _report_data(inputs: Mapping[str, object]) -> bytes | None:
    value = inputs.get("report_data_hex")
    return None if value is None else _hex(value)


def _hex(value: object) -> bytes:
    try:
        return bytes.fromhex(str(value))
    except ValueError:
        raise Misconfigured("case.inputs", "not bytes in hex", got=value) from None


def _appraise(
    verified: Verified[SgxClaims] | Verified[TdxClaims], words: Mapping[str, object], *, simulated_allowed: bool
) -> tuple[Finding, ...]:
    unknown = set(words) - {"allow_debug", "accept_tcb", "measurements"}
    if unknown:
        raise Misconfigured("case.inputs", "no such policy word for Intel evidence", got=", ".join(sorted(unknown)))
    asked: dict[str, object] = {} if words.get("allow_debug", False) else {"debug": Exact(value=False)}
    measurements = words.get("measurements", {})
    for name, value in measurements.items() if isinstance(measurements, Mapping) else ():
        asked[{"mrenclave": "mr_enclave", "mrsigner": "mr_signer"}.get(str(name), str(name))] = Exact(_hex(value))
    accepted = words.get("accept_tcb")
    status = _NOT_ASKED if accepted is None else OneOf(frozenset(_statuses(accepted)))
    machine = IntelPlatformPolicy(
        status=status,
        **_rest(IntelPlatformPolicy, _PLATFORM_ASKED),
    )
    claims = verified.value
    kind = TdxPolicy if isinstance(claims, TdxClaims) else SgxPolicy
    known = {field.name for field in fields(kind)}
    if set(asked) - known:
        raise Misconfigured("case.inputs", "no such measurement", got=", ".join(sorted(set(asked) - known)))
    policy = kind(platform=machine, **_rest(kind, {*asked, "platform"}), **asked)  # type: ignore[arg-type] # as above
    if isinstance(policy, TdxPolicy):
        return appraise_tdx(verified, policy, simulated_allowed=simulated_allowed)  # type: ignore[arg-type] # the claims chose the kind
    return appraise_sgx(verified, policy, simulated_allowed=simulated_allowed)  # type: ignore[arg-type] # as above


def _rest(kind: type[IntelPlatformPolicy | SgxPolicy | TdxPolicy], asked: Iterable[str]) -> dict[str, NotRequired]:
    skipped = set(asked)
    return {field.name: _NOT_ASKED for field in fields(kind) if field.name not in skipped}


def _statuses(words: object) -> list[TcbStatus]:
    try:
        return [TcbStatus(word) for word in words] if isinstance(words, list | tuple) else [TcbStatus(str(words))]
    except ValueError:
        raise Misconfigured("case.inputs", "no such TCB status", got=words) from None


# ---------------------------------------------------------------- classes of codes

_CLASSES: Final = {
    "structure": (
        "quote.truncated", "quote.too_large", "quote.reserved", "quote.tee_type", "quote.body_type",
        "quote.certification_type", "quote.certification_size", "quote.signature_size", "quote.trailing", "ratls.too_large",
        "ratls.oe_header", "ratls.certificate", "ratls.evidence", "der.malformed", "ccel.table", "intel.document",
        "intel.tcb_info", "intel.qe_identity", "intel.evaluation_numbers", "intel.tcb_order", "intel.chain_malformed",
        "intel.pck_extension", "intel.crl_malformed", "intel.ambiguous", "intel.expected_report_data", "case.evidence",
    ),
    "unsupported": ("quote.version", "quote.key_type", "ratls.key_unsupported"),
    "key": ("intel.attestation_key",),
    "chain": (
        "intel.endorsement_missing", "intel.no_time", "intel.anchor_unknown", "intel.anchor_mixed", "intel.anchor_not_root",
        "intel.anchor_malformed", "intel.chain_broken", "intel.chain_role", "intel.crl_issuer",
    ),
    "signature": (
        "intel.quote_signature", "intel.qe_report_signature", "intel.collateral_signature", "intel.crl_signature",
        "ratls.signature_invalid",
    ),
    "revoked": ("intel.revoked",),
    "expired": ("intel.certificate_expired", "intel.collateral_expired", "intel.crl_expired", "intel.collateral_rollback"),
    "not_yet_valid": ("intel.certificate_not_yet_valid", "intel.collateral_not_yet_valid", "intel.crl_not_yet_valid"),
    "identity": (
        "intel.qe_vendor", "intel.qe_mismatch", "tdx.module_unknown", "tdx.module_mismatch", "sgx.root", "tdx.root",
        "intel.ppid", "intel.platform_instance_id", "tdx.mr_seam", "tdx.mr_signer_seam", "tdx.seam_attributes",
    ),
    "binding": ("intel.attestation_key_unbound", "ratls.key_unbound"),
    "report_data": ("sgx.report_data_mismatch", "tdx.report_data_mismatch"),
    "replay": ("ccel.replay_mismatch",),
    "log": ("ccel.register",),
    "debug": ("sgx.debug", "tdx.debug"),
    "tcb": (
        "intel.fmspc_mismatch", "intel.pce_mismatch", "intel.collateral_kind", "intel.status", "intel.advisories",
        "intel.tcb_evaluation", "intel.qe_evaluation", "intel.tcb_date", "intel.collateral", "intel.revocation",
        "intel.fmspc", "intel.sgx_type", "intel.dynamic_platform", "intel.cached_keys", "intel.smt_enabled",
    ),
}  # fmt: skip
_CLASS_OF: Final = {code: name for name, codes in _CLASSES.items() for code in codes}
_MEASURED: Final = frozenset(
    f"{prefix}.{field.name}"
    for kind, prefix in ((SgxPolicy, "sgx"), (TdxPolicy, "tdx"))
    for field in fields(kind)
    if field.name != "platform"
) - set(_CLASS_OF)


def class_of(code: str) -> str | None:
    """The code class of CASES.md for a code of the Intel rules, None for any other."""
    return _CLASS_OF.get(code) or ("measurement" if code in _MEASURED else None)
