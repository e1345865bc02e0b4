"""`moor collateral forecast`: from a store and platforms to rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moorline.cli import collateral_options as options
from moorline.cli import render
from moorline.clock import Instant, rendered
from moorline.errors import EXIT_REFUSED, EXIT_UNDECIDED, EXIT_YES, Misconfigured

if TYPE_CHECKING:
    from moorline.storage.collateral_store import CollateralStore
    from moorline.verification.forecast import Evaluation, Forecast, PlatformFacts


def forecast(
    evidence: options.Evidence = None,
    *,
    store: options.Store,
    facts: Annotated[
        Path | None, typer.Option("--facts", metavar="FILE", help='Platforms as JSON: {"platforms": [...]}.')
    ] = None,
    lag_days: Annotated[
        int, typer.Option("--lag-days", min=0, help="Days from a recovery event to its evaluation being the standard.")
    ] = 365,
    at: options.At = None,
    as_json: render.AsJson = False,
) -> None:
    """Tell which Intel platforms fall out of date when a later TCB evaluation becomes the standard one.

    Compares the standard evaluation with every later one in the store (moor collateral fetch --upcoming). Platforms are
    those of the quotes, by their own unverified words, and those of --facts. Exit 1 if one falls or is out of date already,
    2 if that cannot be said.
    """
    from moorline.storage.collateral_store import open_collateral

    now = options.instant(at)
    opened = open_collateral(store, create=False)
    platforms = _platforms(evidence or [], facts)
    rows = [_forecast_row(_foretell(opened, platform, now, lag_days * options.DAY_S), now) for platform in platforms]
    columns = ("platform", "prospect", "now", "then", "at evaluation", "event", "expected", "new advisories")
    render.table(rows, columns, key="platforms", as_json=as_json, empty="no platform")
    prospects = {row["prospect"] for row in rows}
    if prospects & {"falls", "out"}:
        raise typer.Exit(EXIT_REFUSED)
    raise typer.Exit(EXIT_UNDECIDED if "unknown" in prospects else EXIT_YES)


def _platforms(evidence: Sequence[Path], facts: Path | None) -> list[PlatformFacts]:
    from moorline.cli.collateral_facts import parse_facts
    from moorline.verification.forecast import facts_of_quote

    platforms = [facts_of_quote(path.name, render.read(path)) for path in evidence]
    if facts is not None:
        platforms += parse_facts(render.read(facts))
    if not platforms:
        raise Misconfigured("collateral.no_platforms", "no platform is named", remedy="name quotes, or --facts")
    return platforms


def _foretell(store: CollateralStore, platform: PlatformFacts, now: Instant, lag_s: int) -> Forecast:
    from moorline.evidence.intel_collateral import parse_evaluation_numbers
    from moorline.verification.collateral import EARLY, STANDARD, Freshness, ItemKind, ItemName, freshness
    from moorline.verification.collateral_judging import evaluations_document
    from moorline.verification.forecast import forecast as foretell

    tee = platform.tee.name.lower()
    subject = f"{tee}/{platform.fmspc.hex()}"
    numbers = store.get(ItemName(kind=ItemKind.INTEL_EVALUATIONS, subject=tee))
    tracks = [
        name.track
        for name in store.names()
        if name.kind is ItemKind.INTEL_TCB_INFO and name.subject == subject and name.track != STANDARD
    ]
    current = store.get(ItemName(kind=ItemKind.INTEL_TCB_INFO, subject=subject, track=STANDARD))
    if current is not None and freshness(current.judged.validity, now) is not Freshness.CURRENT:
        raise Misconfigured(
            "collateral.not_current",
            "a forecast from a statement that is not current says nothing",
            expected=f"valid at {rendered(now)}",
            got=current.name,
            remedy="fetch or import it again, or ask --at the time it was current",
        )
    later = [one for track in sorted(tracks, key=lambda text: text == EARLY) if (one := _evaluation(store, subject, track))]
    return foretell(
        platform,
        _evaluation(store, subject, STANDARD),
        later,
        evaluations=None if numbers is None else parse_evaluation_numbers(evaluations_document(numbers.data).body),
        lag_s=lag_s,
    )


def _evaluation(store: CollateralStore, subject: str, track: str) -> Evaluation | None:
    from moorline.evidence.intel_collateral import parse_qe_identity, parse_tcb_info
    from moorline.verification.collateral import ItemKind, ItemName
    from moorline.verification.collateral_judging import enclave_identity_document, tcb_info_document
    from moorline.verification.forecast import Evaluation

    item = store.get(ItemName(kind=ItemKind.INTEL_TCB_INFO, subject=subject, track=track))
    if item is None:
        return None
    info = parse_tcb_info(tcb_info_document(item.data).body)
    held = store.get(ItemName(kind=ItemKind.INTEL_ENCLAVE_IDENTITY, subject=subject.partition("/")[0], track=track))
    identity = None if held is None else parse_qe_identity(enclave_identity_document(held.data).body)
    same = identity is not None and identity.evaluation == info.evaluation
    return Evaluation(tcb_info=info, qe_identity=identity if same else None)


def _forecast_row(found: Forecast, now: Instant) -> dict[str, Any]:
    expected = found.expected
    return {
        "platform": found.platform.name,
        "tee": found.platform.tee.name.lower(),
        "fmspc": found.platform.fmspc.hex(),
        "prospect": found.prospect.value,
        "now": None if found.now is None else found.now.status.value,
        "standard evaluation": None if found.now is None else found.now.evaluation,
        "then": None if found.then is None else found.then.status.value,
        "at evaluation": None if found.then is None else found.then.evaluation,
        "event": None if found.event is None else rendered(found.event),
        "expected": None if expected is None else rendered(expected) if expected > now else "any day",
        "new advisories": sorted(found.advisories),
        "rated": [] if found.now is None else list(found.now.parts),
    }
