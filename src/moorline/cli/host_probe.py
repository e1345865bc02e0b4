"""`moor host probe`: what a look at files cannot show, shown by trying it; each with a control that has to be found.

    moor host probe capture --into 10.1.0.7:9000 --out 192.0.2.1:9001
    moor host probe concealment cpu -- curl -s https://function.example/
    moor host probe clean-up --snapshot before.json     # before the function starts; then, when it has ended:
    moor host probe clean-up --since before.json
    moor host probe entropy --tpm device:/dev/tpmrm0

Exit 0 met, 1 not met, 2 could not decide. `--report FILE` is read by `moor host assess --probed FILE`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, NoReturn

import typer

from moorline.cli import render
from moorline.clock import SystemClock
from moorline.errors import EXIT_REFUSED, EXIT_UNDECIDED, EXIT_YES, Malformed, Misconfigured

if TYPE_CHECKING:
    from moorline.attesters.probes.leftovers import Held
    from moorline.policy.sec009.assessment import Observation

app = typer.Typer(no_args_is_help=True)

_SNAPSHOT: Final = "moorline-snapshot"
_SHOWN: Final = 20
Report = Annotated[Path | None, typer.Option(metavar="FILE", help="Write what was seen, for moor host assess --probed.")]


@app.callback()
def probe() -> None:
    """Try what only trying shows: capture, concealment, clean-up, the TPM's random numbers."""


@app.command()
def capture(
    *,
    into: Annotated[str, typer.Option(metavar="HOST:PORT", help="An address whose traffic is captured.")],
    out: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where the copies come out, on this machine.")],
    count: Annotated[int, typer.Option(min=100, max=10_000_000, help="How many datagrams.")] = 5000,
    rate: Annotated[float, typer.Option(min=1, max=200_000, help="Datagrams a second.")] = 2000.0,
    report: Report = None,
    as_json: render.AsJson = False,
) -> None:
    """Send a numbered stream through the point of capture and count what it delivers (5.3.1: all of it)."""
    from moorline.attesters.probes import capturing

    with render.progress(f"sending {count} datagrams"):
        seen = capturing.probe(_address(into), _address(out), capturing.Stream(count=count, rate=rate))
    _answer(seen, report, as_json=as_json)


@app.command()
def concealment(
    channel: Annotated[str, typer.Argument(help="cpu, ram, storage or net.")],
    use: Annotated[list[str] | None, typer.Argument(metavar="[-- COMMAND...]", help="What uses the function.")] = None,
    *,
    windows: Annotated[int, typer.Option(min=8, max=1000, help="Windows of use, and as many of idleness.")] = 24,
    seconds: Annotated[float, typer.Option(min=0.01, max=60, help="Length of a window.")] = 0.25,
    report: Report = None,
    as_json: render.AsJson = False,
) -> None:
    """Let an observer try to tell use of a function from idleness (5.2.5, 6.14)."""
    from moorline.attesters.probes import observing

    if channel not in observing.CHANNELS:
        raise typer.BadParameter(f"{channel}: a channel is one of {', '.join(observing.CHANNELS)}")
    with render.progress(f"observing {channel}"):
        try:
            seen = observing.probe(channel, tuple(use or ()), observing.Windows(count=windows, seconds=seconds))
        except OSError as error:
            raise Misconfigured(
                "probe.cannot_run", "what is to be tried cannot be run or observed here", got=error.strerror or error
            ) from None
    _answer(seen, report, as_json=as_json)


@app.command()
def entropy(
    *,
    tpm: Annotated[str, typer.Option(metavar="TCTI", help="How the TPM is reached.")] = "device:/dev/tpmrm0",
    report: Report = None,
    as_json: render.AsJson = False,
) -> None:
    """Put the random numbers of a TPM to the health tests of SP 800-90B; a failure counts, a pass is no proof (5.2.11)."""
    from moorline.attesters.probes import tpm_random
    from moorline.attesters.tpm import Tpm

    with render.progress("asking the TPM"), Tpm.open(tpm) as opened:
        seen = tpm_random.probe(f"TPM2_GetRandom of {tpm}", opened.random)
    _answer(seen, report, as_json=as_json)


@app.command("clean-up")
def clean_up(
    *,
    snapshot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write what is there, before the function starts.")
    ] = None,
    since: Annotated[Path | None, typer.Option(metavar="FILE", help="Compare with such a snapshot, after it ended.")] = None,
    of: Annotated[
        list[str] | None, typer.Option(metavar="AREA", help="network, memory, storage or keys; repeat. All, if left out.")
    ] = None,
    about: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Only what names this: an address, :port, a path; repeat.")
    ] = None,
    report: Report = None,
    as_json: render.AsJson = False,
) -> None:
    """Find what a function left on this host: sockets, processes, shared memory, files, mounts, keys (5.2.8).

    Exit 1 if something was left, 2 if a kind of thing could not be looked at, 0 if all was seen and nothing was left.
    """
    from moorline.attesters.probes import leftovers

    areas = tuple(of or leftovers.CAPABILITIES)
    if set(areas) - set(leftovers.CAPABILITIES):
        raise typer.BadParameter(f"an area is one of {', '.join(leftovers.CAPABILITIES)}", param_hint="--of")
    if (snapshot is None) is (since is None):
        raise Misconfigured("probe.snapshot", "say whether this is before or after", expected="--snapshot or --since FILE")
    if report is not None and len(areas) != 1:
        raise Misconfigured("probe.one_area", "a report is about one area", remedy=f"--of {' or --of '.join(areas)}")
    if snapshot is not None:
        _write_snapshot(snapshot, leftovers.held(areas), as_json=as_json)
        return
    assert since is not None
    before = _snapshot(since)
    with render.progress(f"looking for leftovers in {', '.join(areas)}"):
        found = leftovers.left(before, leftovers.held(areas), about or ())
    if len(areas) == 1:
        _answer(leftovers.judge(areas[0], found), report, as_json=as_json, exit_code=_left_code(found))
    _tell_left(found, as_json=as_json)


def _write_snapshot(path: Path, held: Held, *, as_json: bool) -> None:
    lists = {name: None if things is None else sorted(things) for name, things in held.items()}
    render.new_file(path, json.dumps({"kind": _SNAPSHOT, "held": lists}, indent=1).encode())
    unseen = [name for name, things in lists.items() if things is None]
    count = sum(len(things) for things in lists.values() if things is not None)
    more = {"not seen": ", ".join(unseen)} if unseen else {}
    render.files([path], as_json=as_json, then=[f"moor host probe clean-up --since {path}"], things=str(count), **more)


def _tell_left(found: dict[str, list[str] | None], *, as_json: bool) -> NoReturn:
    if as_json:
        typer.echo(json.dumps({"left": found}, indent=1))
    else:
        words = {name: "nothing is left" if new == [] else f"{len(new or ())} left" for name, new in found.items()}
        words |= {name: "not seen: its control was not found, now or then" for name, new in found.items() if new is None}
        render.facts(words, as_json=False)
        for name, new in found.items():
            for one in (new or [])[:_SHOWN]:
                typer.echo(f"  {name}: {one}")
    raise typer.Exit(_left_code(found))


def _left_code(found: dict[str, list[str] | None]) -> int:
    if any(found.values()):
        return EXIT_REFUSED
    return EXIT_UNDECIDED if None in found.values() else EXIT_YES


def _snapshot(path: Path) -> dict[str, frozenset[str] | None]:
    try:
        document = json.loads(render.read(path))
        held = document["held"]
        assert document["kind"] == _SNAPSHOT
        assert held
        assert all(things is None or all(isinstance(one, str) for one in things) for things in held.values())
        return {name: None if things is None else frozenset(things) for name, things in held.items()}
    except (ValueError, TypeError, KeyError, AttributeError, AssertionError):
        raise Malformed("probe.snapshot", "this is no snapshot", got=path, remedy="make one with --snapshot") from None


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise typer.BadParameter(f"{text}: an address is HOST:PORT")
    return host, int(port)


def _answer(seen: Observation, report: Path | None, *, as_json: bool, exit_code: int | None = None) -> NoReturn:
    from moorline.attesters.probes import machine
    from moorline.attesters.probes.tree import Tree
    from moorline.policy.sec009 import probed
    from moorline.policy.sec009.assessment import Status

    document = probed.as_document(seen, host=machine.host_name(Tree()), at=SystemClock().now())
    if report is not None:
        render.new_file(report, json.dumps(document, indent=1).encode())
    if as_json:
        typer.echo(json.dumps(document))
    else:
        render.facts(
            {name: value for name, value in document.items() if value}, as_json=False, then="moor host assess --probed"
        )
    judged = {Status.MET: EXIT_YES, Status.NOT_MET: EXIT_REFUSED}.get(seen.status, EXIT_UNDECIDED)
    raise typer.Exit(judged if exit_code is None else exit_code)
