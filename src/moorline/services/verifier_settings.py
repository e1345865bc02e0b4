"""verifier.toml: what an attestation authority is configured with, and what a production one puts in its place."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Final

from moorline.errors import Misconfigured
from moorline.policy import host as policy_host
from moorline.policy.match import NotRequired
from moorline.rats import EvidenceRoot
from moorline.services import (
    settings,
)
from moorline.services.verifier_push import ReceiverSettings

_ALL_BOOT: Final = tuple(range(11))
_NO_LISTS: Final = "makers of SIMULATED TPMs publish no revocation lists"
_CLOCK_REASON: Final = "a TPM that lost power says so until its clock is safe again; its counters are compared all the same"


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifierSettings:
    """verifier.toml. Paths are relative to it. `ledger_urls` are `url|server name`; keys and certificates PEM or DER.

    `anchors` names the sets that count: `vendor`, and `simulated` where the ledger's genesis allows it. The roots of TPM
    makers that are not shipped are configured by file, by what they are. `reference_signers` sign reference values and
    location tags. The EAR key is in the token (`broker_url`, `broker_name`), or in `ear_key` where there is none.
    """

    id: str
    """This attestation authority's id; its certificate must say so."""
    listen: str
    """Where it serves HTTPS, address:port."""
    provider: str
    """The provider whose hosts it judges."""
    trust_domain: str
    """The provider's trust domain."""
    identity_chain: Path
    """Its certificate and those above it, PEM (moor hsm svid)."""
    identity_key: Path
    """The certificate's private key, PEM, mode 0600."""
    consortium_roots: Path
    """The consortium's root certificates, PEM."""
    database: Path
    """Its SQLite file."""
    ledger_trust: Path
    """The ledger's trust file."""
    ledger_urls: tuple[str, ...]
    """The authorities, each as url|name in its certificate."""
    anchors: tuple[str, ...]
    """The sets of anchors that count: "vendor", and "simulated" where the genesis allows simulation."""
    reference_values: tuple[Path, ...]
    """Signed sets of reference values (moor verifier sign-reference-values), or folders of them; changes are read."""
    reference_signers: tuple[Path, ...]
    """Public keys or certificates that may sign reference values and location tags."""
    database_url: str | None = None
    """A PostgreSQL database in place of the file; written as in broker.toml."""
    broker_url: str | None = None
    """The broker's HTTPS address: results are signed by the key in its token."""
    broker_name: str | None = None
    """The DNS name in the broker's certificate."""
    ear_key: Path | None = None
    """A private key file (0600) to sign results with, where there is no broker."""
    tpm_hardware_roots: tuple[Path, ...] = ()
    """Roots of TPM makers beside the shipped ones."""
    tpm_virtual_roots: tuple[Path, ...] = ()
    """Roots of virtual TPMs."""
    tpm_intermediates: tuple[Path, ...] = ()
    """Certificates of TPM makers between those roots and endorsement keys, for TPMs that do not bring them along."""
    tpm_collateral: Path | None = None
    """The collateral store that holds TPM makers' revocation lists (moor collateral add, or import)."""
    tpm_crls_not_required: dict[str, str] = field(default_factory=lambda: {EvidenceRoot.TEST.value: _NO_LISTS})
    """Kinds of root (hardware, virtual, test) for which a missing revocation list is no obstacle, each with the reason."""
    simulated_tpm_roots: tuple[Path, ...] = ()
    """Roots of SIMULATED TPMs."""
    simulated_snp_roots: tuple[Path, ...] = ()
    """Anchor files of SIMULATED SEV-SNP processors."""
    lease_s: int = 60
    """Seconds a result stands."""
    challenge_s: int = 30
    """Seconds a challenge is good for."""
    landmarks: Path | None = None
    """Landmarks whose measurements may refute the place in a host's tag: [landmark.NAME] with place and key."""
    measurements: Path | None = None
    """The folder of what these landmarks measured: HOST.pem, the host's echo key, and HOST.*.cose."""
    pull_every_s: int | None = None
    """Ask each host whose last result is older than this; left out, hosts come by themselves, once a period."""
    takeover_s: float = 5.0
    """Of several processes over one database: seconds after which the others do the work of one that is not heard of."""
    pcrs: tuple[int, ...] = _ALL_BOOT
    """The PCRs that hosts must quote."""
    not_required: dict[str, str] = field(default_factory=lambda: {"clock_safe": _CLOCK_REASON})
    """Fields of the appraisal policy that are not required, each with the reason."""
    connections: int = 32768
    """Connections at once: twice as many as there are hosts, since each keeps one open to be asked, and some more."""
    may_ask: tuple[str, ...] = ()
    """SPIFFE IDs of other trust domains that may read results about hosts, beside those of its own who act on them."""
    receivers: tuple[ReceiverSettings, ...] = ()
    """Somebody who is told of every verdict gained and lost, by signed events pushed over HTTPS."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProductionPolicy:
    """services/defaults/verifier-production.toml: what a production verifier puts in place of its settings."""

    anchors: tuple[str, ...]
    lease_s: int
    challenge_s: int
    pcrs: tuple[int, ...]
    not_required: dict[str, str]
    tpm_crls_not_required: dict[str, str]


def production(configured: VerifierSettings) -> VerifierSettings:
    """`configured` under the shipped production policy: vendor anchors alone, whatever the settings list."""
    shipped = resources.files("moorline.services.defaults").joinpath("verifier-production.toml")
    with resources.as_file(shipped) as path:
        policy = settings.load(ProductionPolicy, path)
    return dataclasses.replace(
        configured,
        anchors=policy.anchors,
        lease_s=policy.lease_s,
        challenge_s=policy.challenge_s,
        pcrs=policy.pcrs,
        not_required=policy.not_required,
        tpm_crls_not_required=policy.tpm_crls_not_required,
        simulated_tpm_roots=(),
        simulated_snp_roots=(),
    )


def require_policy(configured: VerifierSettings) -> None:
    """Raises Misconfigured("verifier.not_required" | "policy.no_reason") for what is no field, or has no reason."""
    known = {one.name for one in dataclasses.fields(policy_host.HostPolicy)}
    unknown = set(configured.not_required) - known
    if unknown:
        raise Misconfigured(
            "verifier.not_required", "not_required names no field of the policy", expected=sorted(known), got=sorted(unknown)
        )
    for reason in configured.not_required.values():
        NotRequired(reason)
