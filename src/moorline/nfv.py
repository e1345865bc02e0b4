"""The words of ETSI NFV and SEC009: names and identifiers that every room uses, and nothing that acts.

Names are lower-case ASCII, digits and hyphens, one to 63 characters, as in a DNS label, so that they can stand in SPIFFE
IDs, DNS names, ledger keys and file names without escaping. `parse_name` refuses everything else.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from moorline.errors import Malformed

_NAME: Final = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_DOMAIN: Final = re.compile(r"[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?")


def parse_name(text: str, what: str) -> str:
    """`text` if it is a name; raises Malformed("name.malformed") otherwise. `what` names the field for people."""
    if _NAME.fullmatch(text) is None:
        raise Malformed(
            "name.malformed",
            f"{what} is not a name",
            expected="1 to 63 of a-z 0-9 and -, not at either end",
            got=text,
            remedy=f"choose another {what}",
        )
    return text


def parse_domain(text: str, what: str) -> str:
    """`text` if it is a lower-case DNS name without trailing dot; raises Malformed("name.malformed") otherwise."""
    labels = text.split(".")
    if _DOMAIN.fullmatch(text) is None or any(_NAME.fullmatch(label) is None for label in labels):
        raise Malformed("name.malformed", f"{what} is not a domain name", expected="labels of a-z 0-9 -", got=text)
    return text


class Role(StrEnum):
    """The second path element of a SPIFFE ID: what kind of thing holds it (PROTOCOLS.md 2)."""

    HSM = "hsm"
    SERVICE = "svc"
    DEVICE = "device"
    HOST = "host"
    ORCHESTRATOR = "orchestrator"
    VERIFIER = "verifier"
    LAUNCHER = "launcher"
    OPERATOR = "operator"
    AUTHORITY = "authority"


_ROLES: Final = {role.value: role for role in Role}


@dataclass(frozen=True, slots=True, kw_only=True)
class SpiffeId:
    """`spiffe://<trust domain>/<role>/<segment>[/<segment>]`. Parsing is exact: no query, no port, no empty segment."""

    trust_domain: str
    role: Role
    segments: tuple[str, ...]

    def __str__(self) -> str:
        return f"spiffe://{self.trust_domain}/{self.role}/{'/'.join(self.segments)}"

    @classmethod
    def parse(cls, uri: str) -> SpiffeId:
        """Raises Malformed("spiffe.malformed") unless `uri` is exactly one of our identities."""
        prefix, separator, rest = uri.partition("://")
        parts = rest.split("/")
        role = _ROLES.get(parts[1]) if len(parts) in (3, 4) else None
        if prefix != "spiffe" or not separator or role is None:
            raise Malformed("spiffe.malformed", "not a SPIFFE ID of this system", got=uri)
        parse_domain(parts[0], "trust domain")
        for segment in parts[2:]:
            parse_name(segment, "SPIFFE path segment")
        return cls(trust_domain=parts[0], role=role, segments=tuple(parts[2:]))
