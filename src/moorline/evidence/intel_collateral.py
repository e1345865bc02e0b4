"""Intel's signed statements about platforms: TCB info, enclave identities, evaluation data numbers. No trust, no crypto.

Formats: Intel Provisioning Certification Service API, versions 3 and 4 (TCB info v2 and v3, enclave identity v2), and their
predecessors v1, which parse but which verification refuses. The statement is JSON and the signature covers its exact bytes,
so a `SignedDocument` keeps those bytes and nothing is ever written back. What makes a statement well-formed here:

1. UTF-8 JSON of at most 256 KiB; no member twice, no float, no number outside its field's range, no NaN;
2. every mandatory member is there, of its type and, for hex strings, of its exact length; times are `YYYY-MM-DDThh:mm:ssZ`;
3. exactly sixteen components in every TCB level; the TCB type is 0, the only one whose comparison is defined;
4. statuses are of the closed list that their place allows;
5. no TCB level stands after one that it exceeds: the first match counts, so such a level could never be reached.

Members that are not named here are ignored, as the API's versioning demands of its readers (a new member does not change the
version). Everything that comes out is untrusted until `verification.intel_collateral` has seen it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Final

from moorline.clock import Instant
from moorline.errors import Malformed

MAX_DOCUMENT: Final = 1 << 18
_TIME: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z", re.ASCII)
_WRAPPED: Final = re.compile(
    r'[ \t\r\n]*\{[ \t\r\n]*"(tcbInfo|enclaveIdentity|qeIdentity|tcbEvaluationDataNumbers)"[ \t\r\n]*:[ \t\r\n]*(?=\{)'
)
_SIGNATURE: Final = re.compile(
    r'[ \t\r\n]*,[ \t\r\n]*"signature"[ \t\r\n]*:[ \t\r\n]*"([0-9a-fA-F]{128})"[ \t\r\n]*\}[ \t\r\n]*', re.ASCII
)
_COMPONENTS: Final = 16
_MAX_LEVELS: Final = 256
_SGX_NAMES: Final = tuple(f"sgxtcbcomp{number:02d}svn" for number in range(1, _COMPONENTS + 1))

_TYPE: Final = "a member is missing or of the wrong type"


class TcbStatus(StrEnum):
    """What Intel says of a TCB level, and what comes of several. NOT_SUPPORTED: no level matches; never acceptable."""

    UP_TO_DATE = "UpToDate"
    SW_HARDENING_NEEDED = "SWHardeningNeeded"
    CONFIGURATION_NEEDED = "ConfigurationNeeded"
    CONFIGURATION_AND_SW_HARDENING_NEEDED = "ConfigurationAndSWHardeningNeeded"
    TD_RELAUNCH_ADVISED = "TDRelaunchAdvised"
    TD_RELAUNCH_ADVISED_CONFIGURATION_NEEDED = "TDRelaunchAdvisedConfigurationNeeded"
    OUT_OF_DATE = "OutOfDate"
    OUT_OF_DATE_CONFIGURATION_NEEDED = "OutOfDateConfigurationNeeded"
    REVOKED = "Revoked"
    NOT_SUPPORTED = "NotSupported"


_PLATFORM_STATUSES: Final = frozenset(
    {
        TcbStatus.UP_TO_DATE,
        TcbStatus.SW_HARDENING_NEEDED,
        TcbStatus.CONFIGURATION_NEEDED,
        TcbStatus.CONFIGURATION_AND_SW_HARDENING_NEEDED,
        TcbStatus.OUT_OF_DATE,
        TcbStatus.OUT_OF_DATE_CONFIGURATION_NEEDED,
        TcbStatus.REVOKED,
    }
)
_ENCLAVE_STATUSES: Final = frozenset({TcbStatus.UP_TO_DATE, TcbStatus.OUT_OF_DATE, TcbStatus.REVOKED})


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedDocument:
    """A statement as it was signed: the exact bytes, r and s (64 bytes), the signer's chain in PEM, if at hand."""

    body: bytes
    signature: bytes | None
    chain: bytes | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TcbLevel:
    """One level of a platform's TCB. `tdx_components` exists in TDX statements only."""

    components: tuple[int, ...]
    tdx_components: tuple[int, ...] | None
    pce_svn: int
    date: Instant | None
    status: TcbStatus
    advisories: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class IsvLevel:
    """One level of an enclave or TDX module: the least ISVSVN that has `status`."""

    isv_svn: int
    date: Instant | None
    status: TcbStatus
    advisories: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TdxModuleIdentity:
    """Who made a TDX module, and which attributes it must have. `version` is the N of `TDX_0N`; None for the first kind."""

    version: int | None
    mr_signer: bytes
    attributes: bytes
    attributes_mask: bytes
    levels: tuple[IsvLevel, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TcbInfo:
    """TCB info for one FMSPC. `id` is `SGX` or `TDX`; version 1 has no evaluation number, old versions no PCEID."""

    id: str
    version: int
    issue_date: Instant
    next_update: Instant
    fmspc: bytes
    pce_id: bytes | None
    evaluation: int | None
    module: TdxModuleIdentity | None
    modules: tuple[TdxModuleIdentity, ...]
    levels: tuple[TcbLevel, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class QeIdentity:
    """The identity of one of Intel's enclaves. `id` is `QE`, `TD_QE`, `QVE` or `QAE`."""

    id: str
    version: int
    issue_date: Instant
    next_update: Instant
    evaluation: int | None
    misc_select: int
    misc_select_mask: int
    attributes: bytes
    attributes_mask: bytes
    mr_signer: bytes
    isv_prod_id: int
    levels: tuple[IsvLevel, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationNumbers:
    """Which TCB evaluations exist, newest first as Intel lists them: (number, recovery event, tcb date)."""

    id: str
    issue_date: Instant
    next_update: Instant
    numbers: tuple[tuple[int, Instant, Instant], ...]


# ---------------------------------------------------------------- documents


def signed_document(data: bytes, *, chain: bytes | None) -> SignedDocument:
    """The statement and signature in an answer of Intel's service: `{"tcbInfo": {...}, "signature": "<hex>"}` and its like.

    The body is cut out byte for byte, since the signature covers it as it stands. Raises Malformed("intel.document").
    """
    text = _text(data)
    head = _WRAPPED.match(text)
    if head is None:
        raise Malformed(
            "intel.document", "not a signed statement of Intel's service", expected="tcbInfo, enclaveIdentity ..."
        )
    _, end = _scan(text, head.end())
    tail = _SIGNATURE.fullmatch(text, end)
    if tail is None:
        raise Malformed("intel.document", "the statement lacks a signature of 64 bytes in hex")
    return SignedDocument(body=text[head.end() : end].encode(), signature=bytes.fromhex(tail.group(1)), chain=chain)


def parse_tcb_info(body: bytes) -> TcbInfo:
    """The TCB info in the signed bytes. Input is untrusted. Raises only Malformed (`intel.document`, `intel.tcb_info`)."""
    root = _Members(parse_json(body), "intel.tcb_info")
    version = root.number("version", 255)
    if version not in (1, 2, 3):
        raise Malformed("intel.tcb_info", "unknown version of TCB info", expected="1, 2 or 3", got=version)
    kind = root.text("id") if version == 3 else "SGX"
    if kind not in ("SGX", "TDX"):
        raise Malformed("intel.tcb_info", "TCB info is neither for SGX nor for TDX", got=kind)
    if version > 1 and root.number("tcbType", 255) != 0:
        raise Malformed("intel.tcb_info", "unknown type of TCB", expected=0)
    tdx = kind == "TDX"
    info = TcbInfo(
        id=kind,
        version=version,
        issue_date=root.time("issueDate"),
        next_update=root.time("nextUpdate"),
        fmspc=root.hex("fmspc", 6),
        pce_id=root.hex("pceId", 2) if version != 2 or root.has("pceId") else None,
        evaluation=root.number("tcbEvaluationDataNumber", 0xFFFFFFFF) if version > 1 else None,
        module=_module(root.object("tdxModule"), versioned=False) if tdx else None,
        modules=tuple(_module(one, versioned=True) for one in root.objects("tdxModuleIdentities", optional=True))
        if tdx
        else (),
        levels=tuple(_level(one, version, tdx=tdx) for one in root.objects("tcbLevels")),
    )
    _ordered([_vector(level) for level in info.levels])
    versions = [module.version for module in info.modules]
    if len(set(versions)) != len(versions):
        raise Malformed("intel.tcb_info", "a TDX module identity is there twice")
    return info


def parse_qe_identity(body: bytes) -> QeIdentity:
    """The enclave identity in the signed bytes. Input is untrusted. Raises only Malformed (`intel.*`)."""
    root = _Members(parse_json(body), "intel.qe_identity")
    version = root.number("version", 255)
    if version not in (1, 2):
        raise Malformed("intel.qe_identity", "unknown version of an enclave identity", expected="1 or 2", got=version)
    kind = root.text("id") if version == 2 else "QE"
    if kind not in ("QE", "TD_QE", "QVE", "QAE"):
        raise Malformed("intel.qe_identity", "unknown enclave", expected="QE, TD_QE, QVE or QAE", got=kind)
    return QeIdentity(
        id=kind,
        version=version,
        issue_date=root.time("issueDate"),
        next_update=root.time("nextUpdate"),
        evaluation=root.number("tcbEvaluationDataNumber", 0xFFFFFFFF) if version == 2 else None,
        misc_select=int.from_bytes(root.hex("miscselect", 4), "little"),
        misc_select_mask=int.from_bytes(root.hex("miscselectMask", 4), "little"),
        attributes=root.hex("attributes", 16),
        attributes_mask=root.hex("attributesMask", 16),
        mr_signer=root.hex("mrsigner", 32),
        isv_prod_id=root.number("isvprodid", 0xFFFF),
        levels=_isv_levels(root) if version == 2 else (_only_level(root),),
    )


def parse_evaluation_numbers(body: bytes) -> EvaluationNumbers:
    """The TCB evaluation data numbers in the signed bytes. Input is untrusted. Raises only Malformed (`intel.*`)."""
    root = _Members(parse_json(body), "intel.evaluation_numbers")
    return EvaluationNumbers(
        id=root.text("id"),
        issue_date=root.time("issueDate"),
        next_update=root.time("nextUpdate"),
        numbers=tuple(
            (one.number("tcbEvaluationDataNumber", 0xFFFFFFFF), one.time("tcbRecoveryEventDate"), one.time("tcbDate"))
            for one in root.objects("tcbEvalNumbers")
        ),
    )


def parse_json(data: bytes) -> object:
    """Any JSON under rule 1, for envelopes around Intel's statements. Raises Malformed("intel.document")."""
    text = _text(data)
    start = len(text) - len(text.lstrip(" \t\r\n"))
    value, end = _scan(text, start)
    if text[end:].strip(" \t\r\n"):
        raise Malformed("intel.document", "bytes follow the JSON value")
    return value


# ---------------------------------------------------------------- parts


def _level(one: _Members, version: int, *, tdx: bool) -> TcbLevel:
    tcb = one.object("tcb")
    if version == 3:
        components = _components(tcb, "sgxtcbcomponents")
    else:
        components = tuple(tcb.number(name, 255) for name in _SGX_NAMES)
    return TcbLevel(
        components=components,
        tdx_components=_components(tcb, "tdxtcbcomponents") if tdx else None,
        pce_svn=tcb.number("pcesvn", 0xFFFF),
        date=one.time("tcbDate") if version > 1 else None,
        status=one.status("tcbStatus" if version > 1 else "status", _PLATFORM_STATUSES),
        advisories=one.texts("advisoryIDs"),
    )


def _components(tcb: _Members, name: str) -> tuple[int, ...]:
    found = tuple(one.number("svn", 255) for one in tcb.objects(name))
    if len(found) != _COMPONENTS:
        raise Malformed("intel.tcb_info", "a TCB level has the wrong number of components", expected=16, got=len(found))
    return found


def _module(one: _Members, *, versioned: bool) -> TdxModuleIdentity:
    version: int | None = None
    if versioned:
        found = re.fullmatch(r"TDX_([0-9A-F]{2})", one.text("id"), re.ASCII)
        if found is None:
            raise Malformed("intel.tcb_info", "a TDX module identity has no version", expected="TDX_<hex>")
        version = int(found.group(1), 16)
    return TdxModuleIdentity(
        version=version,
        mr_signer=one.hex("mrsigner", 48),
        attributes=one.hex("attributes", 8),
        attributes_mask=one.hex("attributesMask", 8),
        levels=_isv_levels(one) if versioned else (),
    )


def _isv_levels(root: _Members) -> tuple[IsvLevel, ...]:
    levels = tuple(
        IsvLevel(
            isv_svn=one.object("tcb").number("isvsvn", 0xFFFF),
            date=one.time("tcbDate"),
            status=one.status("tcbStatus", _ENCLAVE_STATUSES),
            advisories=one.texts("advisoryIDs"),
        )
        for one in root.objects("tcbLevels")
    )
    _ordered([(level.isv_svn,) for level in levels])
    return levels


def _only_level(root: _Members) -> IsvLevel:
    """Version 1 knows one ISVSVN only: what is at least that was up to date."""
    return IsvLevel(isv_svn=root.number("isvsvn", 0xFFFF), date=None, status=TcbStatus.UP_TO_DATE, advisories=())


def _vector(level: TcbLevel) -> tuple[int, ...]:
    return (*level.components, level.pce_svn, *(level.tdx_components or ()))


def _ordered(vectors: list[tuple[int, ...]]) -> None:
    for at, later in enumerate(vectors):
        for earlier in vectors[:at]:
            if all(more >= less for more, less in zip(later, earlier, strict=True)):
                raise Malformed(
                    "intel.tcb_order",
                    "a TCB level can never be reached: one before it asks for no more",
                    remedy="fetch the statement again: its levels must come from the newest to the oldest",
                )


# ---------------------------------------------------------------- strict JSON


class _Members:
    """The members of one JSON object, asked for by name and type. Raises Malformed with the code of its statement."""

    def __init__(self, members: object, code: str) -> None:
        if not isinstance(members, dict):
            raise _wrong(code, "an object", members)
        self._members = members
        self._code = code

    def has(self, name: str) -> bool:
        return name in self._members

    def number(self, name: str, most: int) -> int:
        value = self._members.get(name)
        if type(value) is not int or not 0 <= value <= most:
            raise _wrong(self._code, f"{name}: 0 to {most}", value)
        return value

    def text(self, name: str) -> str:
        value = self._members.get(name)
        if not isinstance(value, str):
            raise _wrong(self._code, f"{name}: a string", value)
        return value

    def hex(self, name: str, size: int) -> bytes:
        value = self.text(name)
        if len(value) != 2 * size or not re.fullmatch(r"[0-9a-fA-F]*", value, re.ASCII):
            raise _wrong(self._code, f"{name}: {size} bytes in hex", value)
        return bytes.fromhex(value)

    def time(self, name: str) -> Instant:
        value = self.text(name)
        if not _TIME.fullmatch(value):
            raise _wrong(self._code, f"{name}: YYYY-MM-DDThh:mm:ssZ", value)
        try:
            return Instant(int(datetime.fromisoformat(value[:-1]).replace(tzinfo=UTC).timestamp()))
        except ValueError:
            raise _wrong(self._code, f"{name}: a time that exists", value) from None

    def status(self, name: str, allowed: frozenset[TcbStatus]) -> TcbStatus:
        value = self.text(name)
        if value not in allowed:
            raise _wrong(self._code, f"{name}: a known status", value)
        return TcbStatus(value)

    def texts(self, name: str) -> tuple[str, ...]:
        values = self._members.get(name, [])
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise _wrong(self._code, f"{name}: strings", values)
        return tuple(values)

    def object(self, name: str) -> _Members:
        return _Members(self._members.get(name), self._code)

    def objects(self, name: str, *, optional: bool = False) -> list[_Members]:
        values = self._members.get(name, [] if optional else None)
        if not isinstance(values, list) or len(values) > _MAX_LEVELS or not (values or optional):
            raise _wrong(self._code, f"{name}: a list of 1 to {_MAX_LEVELS} objects", values)
        return [_Members(value, self._code) for value in values]


def _wrong(code: str, expected: str, got: object) -> Malformed:
    if code == "intel.tcb_info":
        return Malformed("intel.tcb_info", _TYPE, expected=expected, got=got)
    if code == "intel.qe_identity":
        return Malformed("intel.qe_identity", _TYPE, expected=expected, got=got)
    return Malformed("intel.evaluation_numbers", _TYPE, expected=expected, got=got)


def _text(data: bytes) -> str:
    if len(data) > MAX_DOCUMENT:
        raise Malformed("intel.document", "the statement is too large", expected=f"<= {MAX_DOCUMENT} bytes", got=len(data))
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise Malformed("intel.document", "the statement is not UTF-8") from None


def _scan(text: str, start: int) -> tuple[object, int]:
    try:
        return _DECODER.raw_decode(text, start)
    except (ValueError, RecursionError) as error:  # JSONDecodeError is a ValueError; RecursionError is nesting without end
        raise Malformed("intel.document", "not JSON as statements are written", got=type(error).__name__) from None


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) != len(pairs):
        message = "a member is there twice"
        raise ValueError(message)
    return members


def _refused(what: str) -> Callable[[str], object]:
    def refuse(_: str) -> object:
        raise ValueError(what)

    return refuse


def _integer(digits: str) -> int:
    if len(digits) > 20:
        message = "a number is too long"
        raise ValueError(message)
    return int(digits)


_DECODER: Final = json.JSONDecoder(
    object_pairs_hook=_once,
    parse_float=_refused("a float"),
    parse_int=_integer,
    parse_constant=_refused("not a number"),
)
