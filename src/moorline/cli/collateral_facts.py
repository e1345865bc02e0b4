"""Facts about platforms in a file, for fleets whose quotes are elsewhere: what a PCK certificate says, and a TDX module.

    {"platforms": [{"name": "rack-7", "tee": "tdx", "fmspc": "90c06f000000", "components": [16 numbers], "pce_svn": 11,
                    "tee_tcb_svn": "05010200000000000000000000000000", "qe_isv_svn": 4}]}

`tee_tcb_svn` is demanded for TDX and must not be there for SGX; `qe_isv_svn` may be left out.
"""

from __future__ import annotations

from typing import Final, NoReturn

from moorline.errors import Malformed
from moorline.evidence.dcap_quote import TeeType
from moorline.evidence.intel_collateral import parse_json
from moorline.verification.forecast import PlatformFacts

_COMPONENTS: Final = 16
_MEMBERS: Final = frozenset({"name", "tee", "fmspc", "components", "pce_svn", "tee_tcb_svn", "qe_isv_svn"})
_TEES: Final = {"sgx": TeeType.SGX, "tdx": TeeType.TDX}


def parse_facts(data: bytes) -> list[PlatformFacts]:
    """The platforms in a file. Raises Malformed("collateral.facts")."""
    document = parse_json(data)
    if not isinstance(document, dict) or set(document) != {"platforms"} or not isinstance(document["platforms"], list):
        _wrong('{"platforms": [...]}', type(document).__name__)
    return [_platform(one) for one in document["platforms"]]


def _platform(one: object) -> PlatformFacts:
    if not isinstance(one, dict) or set(one) - _MEMBERS:
        _wrong(", ".join(sorted(_MEMBERS)), one)
    tee = _TEES.get(str(one.get("tee")))
    if tee is None:
        _wrong("tee: sgx or tdx", one.get("tee"))
    svn = one.get("tee_tcb_svn")
    if (svn is None) != (tee is TeeType.SGX):
        _wrong("tee_tcb_svn for tdx, and for tdx only", svn)
    components = one.get("components")
    if not isinstance(components, list) or len(components) != _COMPONENTS:
        _wrong("components: sixteen numbers", components)
    name = one.get("name")
    if not isinstance(name, str) or not name:
        _wrong("name: a text", name)
    qe = one.get("qe_isv_svn")
    return PlatformFacts(
        name=name,
        tee=tee,
        fmspc=_hex(one.get("fmspc"), 6),
        components=tuple(_number(value, 0xFF) for value in components),
        pce_svn=_number(one.get("pce_svn"), 0xFFFF),
        tee_tcb_svn=None if svn is None else _hex(svn, 16),
        qe_isv_svn=None if qe is None else _number(qe, 0xFFFF),
    )


def _number(value: object, most: int) -> int:
    if type(value) is not int or not 0 <= value <= most:
        _wrong(f"a number from 0 to {most}", value)
    return value


def _hex(value: object, size: int) -> bytes:
    if not isinstance(value, str) or len(value) != 2 * size:
        _wrong(f"{size} bytes in hex", value)
    try:
        return bytes.fromhex(value)
    except ValueError:
        _wrong(f"{size} bytes in hex", value)


def _wrong(expected: str, got: object) -> NoReturn:
    raise Malformed("collateral.facts", "a file of platform facts is not as it must be", expected=expected, got=got)
