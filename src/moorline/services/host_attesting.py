"""How a host's agent attests, to its provider's verifier and to every further one, each by itself.

A verifier is told nothing before it has proved to be the one that is configured (wire.http, `server_role`), and each further
one has an attestation key of its own in the TPM (ADR 0025). What one of them says or refuses is nothing to the others.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

import structlog

from moorline.errors import MoorlineError
from moorline.nfv import Role, parse_name
from moorline.rats import Tier
from moorline.services.condition import Condition
from moorline.wire.host import HostVerdict
from moorline.wire.http import HttpClient

if TYPE_CHECKING:
    from moorline.attesters.tpm import Tpm
    from moorline.host_agent.attestation import HostAttestation

RETRY_S: Final = 2.0
_ANSWER_S: Final = 10.0
Verdict = HostVerdict | MoorlineError


@dataclass(frozen=True, slots=True, kw_only=True)
class FurtherVerifier:
    """[[attestation.further]]: another authority that judges this host for itself: a tenant's, or one of the law.

    It has an attestation key of its own in this TPM, so that no verifier can pass its challenge on as another's.
    """

    url: str
    """Its HTTPS address."""
    name: str
    """The DNS name in its certificate, which also carries its SPIFFE ID of role verifier."""
    roots: Path | None = None
    """The root certificates it chains to, PEM; left out, the consortium's."""
    host: str | None = None
    """This host's name there; left out, its id."""
    also: tuple[str, ...] = ()
    """HTTPS addresses of further processes of the same verifier."""
    period_s: float = 60.0
    """Seconds between attestations to it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttestationSettings:
    """[attestation]: which TPM, which verifier, where the logs are. `tag` is the signed location tag, if any."""

    tcti: str
    """How the TPM is reached: swtpm:path=/path, device:/dev/tpmrm0."""
    verifier_url: str
    """The attestation authority's HTTPS address."""
    verifier_name: str
    """The DNS name in its certificate."""
    verifier_also: tuple[str, ...] = ()
    """HTTPS addresses of further processes of the same verifier, asked where the first does not answer."""
    event_log: Path
    """The firmware's event log."""
    ima: Path
    """The kernel's IMA list, ASCII."""
    tag: Path | None
    """The signed location tag, if the host has one (moor host tag)."""
    period_s: float = 10.0
    """Seconds between attestations."""
    further: tuple[FurtherVerifier, ...] = ()
    """Authorities beside the provider's own that judge this host, each by itself."""


class Host(Protocol):
    """What of a host's settings attestation needs."""

    @property
    def id(self) -> str:
        """The host's id on the ledger."""
        ...

    @property
    def roots(self) -> Path:
        """The consortium's root certificates, PEM."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Attesting:
    """The TPM, attestation towards the provider's own verifier, and towards every further one by its name."""

    tpm: Tpm
    own: HostAttestation
    further: tuple[tuple[str, HostAttestation], ...]


async def towards_all(host: Host, chosen: AttestationSettings, stack: contextlib.AsyncExitStack) -> Attesting:
    """Attestation towards all verifiers of these settings. Raises Misconfigured or Unavailable (`tpm.*`)."""
    from moorline.attesters.tpm import Tpm

    tpm = await asyncio.to_thread(Tpm.open, chosen.tcti)
    stack.callback(tpm.close)
    own = FurtherVerifier(
        url=chosen.verifier_url, name=chosen.verifier_name, also=chosen.verifier_also, period_s=chosen.period_s
    )
    further = [(one.name, await _towards(host, chosen, one, tpm.for_verifier(one.name), stack)) for one in chosen.further]
    return Attesting(tpm=tpm, own=await _towards(host, chosen, own, tpm, stack), further=tuple(further))


async def _towards(
    host: Host, chosen: AttestationSettings, verifier: FurtherVerifier, tpm: Tpm, stack: contextlib.AsyncExitStack
) -> HostAttestation:
    from moorline.host_agent.attestation import HELD_S, FileLogs, HostAttestation
    from moorline.host_agent.verifier_processes import VerifierProcesses

    roots_pem = (verifier.roots or host.roots).read_bytes()
    urls = (verifier.url, *verifier.also)

    async def processes(timeout_s: float) -> VerifierProcesses:
        clients = [
            HttpClient(url, server_name=verifier.name, server_role=Role.VERIFIER, roots_pem=roots_pem, timeout_s=timeout_s)
            for url in urls
        ]
        return VerifierProcesses([await stack.enter_async_context(client) for client in clients])

    return HostAttestation(
        host=host.id if verifier.host is None else parse_name(verifier.host, "host"),
        verifier=await processes(_ANSWER_S),
        held=await processes(HELD_S + _ANSWER_S),
        tpm=tpm,
        logs=FileLogs(chosen.event_log, chosen.ima),
        tag=None if chosen.tag is None else chosen.tag.read_bytes(),
        period_s=verifier.period_s,
    )


def logged(log: structlog.stdlib.BoundLogger, **about: str) -> Callable[[Verdict], None]:
    """Writes each verdict into the log."""

    def on_verdict(verdict: Verdict) -> None:
        if isinstance(verdict, MoorlineError):
            log.warning("not attested", **about, **verdict.as_problem())
        else:
            log.info("attested", **about, status=verdict.status, code=verdict.code)

    return on_verdict


def heard_by(log: structlog.stdlib.BoundLogger, judged: asyncio.Event, heard: Condition) -> Callable[[Verdict], None]:
    """What the verdicts of the provider's own verifier mean for this agent."""
    tell = logged(log)

    def on_verdict(verdict: Verdict) -> None:
        judged.set()
        if isinstance(verdict, MoorlineError):
            heard.set(standing=False, why=f"not attested: {verdict.code}")
        else:
            standing = verdict.status == Tier.AFFIRMING.word
            heard.set(standing=standing, why=f"the verdict is {verdict.status}: {verdict.code}")
        tell(verdict)

    return on_verdict


async def attest(attestation: HostAttestation, on_verdict: Callable[[Verdict], None]) -> None:
    """Attest to one verifier until cancelled."""
    while True:
        try:
            await attestation.run(on_verdict)
        except MoorlineError as error:
            # A verifier that is away, or refuses to enrol this host, is no reason to leave its guests alone.
            on_verdict(error)
            await asyncio.sleep(RETRY_S)
