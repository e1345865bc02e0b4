"""One module a family; each knows the hints of its evidence and calls the rooms. `FAMILIES` is the one table."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from moorline.cli.evidence_cases.case import Case
    from moorline.cli.evidence_cases.compare import Family

FAMILIES: Final = {
    "snp": "snp",
    "sgx": "intel",
    "tdx": "intel",
    "cca": "cca",
    "psa": "psa",
    "nitro": "nitro",
    "tpm": "tpm",
    "eventlog": "eventlog",
    "ima": "ima",
}
"""Family of a case folder -> module. A family that is not here is skipped as unsupported."""

_MODULES: Final = frozenset(FAMILIES.values())


def family_of(case: Case) -> Family | None:
    """What runs a case: its own family if that knows all of its hints, else another that does; None if none does."""
    own = FAMILIES.get(case.family)
    for name in sorted(_MODULES, key=lambda name: (name != own, name)):
        module = importlib.import_module(f"{__name__}.{name}")
        if all(entry.hint in module.HINTS for entry in case.evidence) and case.evidence:
            run: Family = module.run
            return run
    return None
