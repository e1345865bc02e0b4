"""`moor collateral fetch`: which items evidence needs, who has them, and asking for them."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from moorline.cli import collateral_options as options
from moorline.cli import render
from moorline.clock import Clock, Instant, SystemClock
from moorline.errors import Malformed, Misconfigured

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from moorline.endorsers.pacing import Pacing
    from moorline.endorsers.port import Endorser
    from moorline.endorsers.transport import Surroundings
    from moorline.storage.collateral_intake import Outcome
    from moorline.storage.collateral_store import CollateralStore
    from moorline.verification.collateral import ItemName
    from moorline.verification.collateral_judging import Anchors

_AMD_KDS: Final = "https://kdsintf.amd.com"
_INTEL_PCS: Final = "https://api.trustedservices.intel.com"
_INTEL_CERTIFICATES: Final = "https://certificates.trustedservices.intel.com"


def fetch(  # noqa: PLR0913 - one option each
    evidence: options.Evidence = None,
    *,
    store: options.Store,
    item: Annotated[list[str] | None, typer.Option("--item", metavar="NAME", help="This item. Repeatable.")] = None,
    held: Annotated[bool, typer.Option("--held", help="Everything of AMD and Intel that the store holds, again.")] = False,
    product: Annotated[
        str | None, typer.Option("--product", help="Milan, Genoa or Turin, for reports that do not say.")
    ] = None,
    update: Annotated[str, typer.Option("--update", help="Which of Intel's evaluations: standard or early.")] = "standard",
    upcoming: Annotated[
        bool, typer.Option("--upcoming", help="For quotes: also every later evaluation, for `forecast`.")
    ] = False,
    kds: Annotated[str, typer.Option("--kds", envvar="MOOR_AMD_KDS", help="AMD's KDS, or a mirror.")] = _AMD_KDS,
    pcs: Annotated[str, typer.Option("--pcs", envvar="MOOR_INTEL_PCS", help="Intel's PCS, or a mirror.")] = _INTEL_PCS,
    certificates: Annotated[
        str, typer.Option("--certificates", envvar="MOOR_INTEL_CERTIFICATES", help="Where Intel's root CRL is.")
    ] = _INTEL_CERTIFICATES,
    enrolled: Annotated[
        Path | None,
        typer.Option("--enrolled", metavar="VERIFIER.TOML", help="Makers' lists about the TPMs this verifier enrolled."),
    ] = None,
    tpm_chain: Annotated[
        list[Path] | None,
        typer.Option("--tpm-chain", metavar="FILE", help="Makers' lists about the TPM of this chain, EK first."),
    ] = None,
    tpm_root: options.TpmRoots = None,
    allow_private: Annotated[
        bool, typer.Option("--allow-private", help="Ask for makers' lists at private addresses too: a mirror of this site.")
    ] = False,
    tls_roots: Annotated[
        Path | None, typer.Option("--tls-roots", metavar="FILE", help="Roots (PEM) of a mirror's TLS certificate.")
    ] = None,
    pace: Annotated[
        float, typer.Option("--pace", min=0.0, metavar="SECONDS", help="Least time between two requests to one vendor.")
    ] = 1.0,
    snp_anchors: options.SnpAnchors = None,
    intel_root: options.IntelRoots = None,
    at: options.At = None,
    as_json: render.AsJson = False,
) -> None:
    """Ask AMD, Intel and makers of TPMs for what EVIDENCE and hosts need, verify it, and store it.

    TPM makers are asked where the certificates above a TPM say, over http. Certificates of chips that are held are not asked
    for again. Each item is reported; exit 1 if one was refused, else 2 if one could not be had.
    """
    import asyncio

    from moorline.cli.collateral_enrolled import chains_of, list_points_of, tpm_anchors
    from moorline.endorsers.pacing import Pacing
    from moorline.endorsers.tpm_makers import Door, TpmMakers
    from moorline.storage.collateral_store import open_collateral
    from moorline.verification.collateral import ItemKind

    if update not in ("standard", "early"):
        raise typer.BadParameter("standard or early", param_hint="--update")
    opened = open_collateral(store, create=True)
    names = _wanted(evidence or [], item or [], product, update)
    around, pacing = _surroundings(), Pacing(interval_s=pace)
    tpm = tpm_anchors(enrolled, tpm_root)
    points = list_points_of(chains_of(enrolled, tpm_chain or []), tpm)
    makers = TpmMakers(points, door=Door(private=allow_private), surroundings=around, pacing=pacing)
    names += makers.names
    if held:
        names += [name for name in opened.names() if name.kind is not ItemKind.TPM_CRL]  # which say not where they are from
    if not names:
        raise Misconfigured(
            "collateral.nothing_asked",
            "nothing says what to fetch",
            remedy="name evidence files, --item, --held or --enrolled",
        )
    clock = SystemClock() if at is None else _Fixed(at=options.instant(at))
    urls = {"kds": kds, "pcs": pcs, "certificates": certificates}
    endorser = _endorser(urls, tls_roots, around, pacing, makers)
    anchors = dataclasses.replace(options.anchors_of(snp_anchors, intel_root), tpm=tpm)
    plan = _Plan(store=opened, anchors=anchors, clock=clock, endorser=endorser)
    outcomes = asyncio.run(_fetched(plan, names, upcoming=upcoming, as_json=as_json))
    if as_json:
        typer.echo(json.dumps({"items": [options.outcome_row(one) for one in outcomes]}, indent=1))
    raise typer.Exit(options.exit_code(outcomes))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fixed:
    """One time for one run of a command."""

    at: Instant

    def now(self) -> Instant:
        return self.at


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    store: CollateralStore
    anchors: Anchors
    clock: Clock
    endorser: Endorser


async def _fetched(plan: _Plan, names: list[ItemName], *, upcoming: bool, as_json: bool) -> list[Outcome]:
    from moorline.endorsers.collecting import collect, settled

    def told(outcome: Outcome) -> None:
        if not as_json:
            typer.echo(options.outcome_line(outcome))

    async def some(wanted: Iterable[ItemName]) -> tuple[Outcome, ...]:
        asked = settled(wanted, plan.store.names())
        return await collect(asked, plan.endorser, plan.store, anchors=plan.anchors, clock=plan.clock, told=told)

    outcomes = list(await some([*names, *(_lists(names) if upcoming else [])]))
    if upcoming:
        done = {outcome.name for outcome in outcomes}
        outcomes += await some(name for name in _later(plan.store, names) if name not in done)
    return outcomes


def _wanted(evidence: Sequence[Path], items: Sequence[str], product: str | None, update: str) -> list[ItemName]:
    from moorline.evidence import snp
    from moorline.verification.collateral import ItemName, needs_of, needs_of_snp

    if product is not None and product not in {line.value for line in snp.Product}:
        raise typer.BadParameter("Milan, Genoa or Turin", param_hint="--product")
    names = [ItemName.parse(text) for text in items]
    for path in evidence:
        data = render.read(path)
        if product is not None and len(data) == snp.REPORT_BYTES:
            needs = needs_of_snp(snp.parse_report(data), snp.Product(product))
        else:
            needs = needs_of(data, track=update)
        if not needs:
            raise Malformed(
                "collateral.no_needs",
                "not a report or quote that names what it needs",
                expected="a raw SNP report, SGX quote or TDX quote",
                got=path,
            )
        if any(len(need.items) > 1 for need in needs):
            raise Misconfigured(
                "collateral.product_needed", "the report does not say of which product it is", got=path, remedy="--product"
            )
        names += [need.items[0] for need in needs]
    return names


def _lists(names: Iterable[ItemName]) -> list[ItemName]:
    """The lists of evaluations that say which later ones there are."""
    from moorline.verification.collateral import ItemKind, ItemName

    tees = {name.subject.partition("/")[0] for name in names if name.kind is ItemKind.INTEL_TCB_INFO}
    return [ItemName(kind=ItemKind.INTEL_EVALUATIONS, subject=tee) for tee in sorted(tees)]


def _later(store: CollateralStore, names: Iterable[ItemName]) -> list[ItemName]:
    """TCB info and identities of every evaluation later than the standard one, by Intel's list."""
    from moorline.evidence.intel_collateral import parse_evaluation_numbers
    from moorline.verification.collateral import STANDARD, TRACKED, ItemKind, ItemName
    from moorline.verification.collateral_judging import evaluations_document

    later: list[ItemName] = []
    for name in sorted({name for name in names if name.kind in TRACKED}):
        listed = store.get(ItemName(kind=ItemKind.INTEL_EVALUATIONS, subject=name.subject.partition("/")[0]))
        standard = store.get(ItemName(kind=name.kind, subject=name.subject, track=STANDARD))
        if listed is None or standard is None:
            continue
        numbers = parse_evaluation_numbers(evaluations_document(listed.data).body).numbers
        reached = standard.judged.evaluation or 0
        later += [
            ItemName(kind=name.kind, subject=name.subject, track=str(number)) for number, _, _ in numbers if number > reached
        ]
    return later


def _surroundings() -> Surroundings:
    import asyncio
    import secrets
    import time

    from moorline.endorsers.transport import Surroundings

    return Surroundings(
        clock=SystemClock(),
        monotonic=time.monotonic,
        sleep=asyncio.sleep,
        jitter=lambda: secrets.randbelow(1 << 30) / (1 << 30),
    )


def _endorser(
    urls: dict[str, str], tls_roots: Path | None, around: Surroundings, pacing: Pacing, makers: Endorser
) -> Endorser:
    from moorline.endorsers import amd_kds, intel_pcs
    from moorline.endorsers.port import Endorsers
    from moorline.endorsers.transport import VendorHttp
    from moorline.verification.collateral import ItemKind

    roots = None if tls_roots is None else render.read(tls_roots)
    servers = {name: VendorHttp(url, surroundings=around, roots_pem=roots, pacing=pacing) for name, url in urls.items()}
    amd = amd_kds.AmdKds(servers["kds"])
    intel = intel_pcs.IntelPcs(servers["pcs"], servers["certificates"])
    by_kind: dict[ItemKind, Endorser] = dict.fromkeys(amd_kds.KINDS, amd)
    by_kind |= dict.fromkeys(intel_pcs.KINDS, intel)
    by_kind[ItemKind.TPM_CRL] = makers
    return Endorsers(by_kind)
