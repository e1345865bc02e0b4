"""`moor host probe`: what a look at files cannot show, shown by trying it; each with a control that has to be found.

    moor host probe capture --into 10.1.0.7:9000 --out 192.0.2.1:9001
    moor host probe concealment cpu -- curl -s https://function.example/
    moor host probe clean-up --snapshot before.json     # before the function starts; then, when it has ended:
    moor host probe clean-up --since before.json

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
    from moorline.policy.sec009.assessment import Observation

app = typer.Typer(no_args_is_help=True)

_SNAPSHOT: Final = "moorline-network-snapshot"
Report = Annotated[Path | None, typer.Option(metavar="FILE", help="Write what was seen, for moor host assess --probed.")]


@app.callback()
def probe() -> None:
    """Try what only trying shows: capture, concealment, clean-up."""


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


@app.command("clean-up")
def clean_up(
    *,
    snapshot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write what is there, before the function starts.")
    ] = None,
    since: Annotated[Path | None, typer.Option(metavar="FILE", help="Compare with such a snapshot, after it ended.")] = None,
    about: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Only what names this: an address, :port, a namespace; repeat.")
    ] = None,
    report: Report = None,
    as_json: render.AsJson = False,
) -> None:
    """Find what of the network a function left on this host (5.2.8)."""
    from moorline.attesters.probes import leftovers

    if (snapshot is None) is (since is None):
        raise Misconfigured("probe.snapshot", "say whether this is before or after", expected="--snapshot or --since FILE")
    if snapshot is not None:
        found = sorted(leftovers.held())
        render.new_file(snapshot, json.dumps({"kind": _SNAPSHOT, "held": found}, indent=1).encode())
        then = [f"moor host probe clean-up --since {snapshot}"]
        render.files([snapshot], as_json=as_json, then=then, things=str(len(found)))
        return
    assert since is not None
    _answer(leftovers.probe(_snapshot(since), about or ()), report, as_json=as_json)


def _snapshot(path: Path) -> list[str]:
    try:
        document = json.loads(render.read(path))
        held = document["held"]
        assert document["kind"] == _SNAPSHOT
        assert all(isinstance(one, str) for one in held)
    except (ValueError, TypeError, KeyError, AssertionError):
        raise Malformed("probe.snapshot", "this is no snapshot", got=path, remedy="make one with --snapshot") from None
    return list(held)


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise typer.BadParameter(f"{text}: an address is HOST:PORT")
    return host, int(port)


def _answer(seen: Observation, report: Path | None, *, as_json: bool) -> NoReturn:
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
    raise typer.Exit({Status.MET: EXIT_YES, Status.NOT_MET: EXIT_REFUSED}.get(seen.status, EXIT_UNDECIDED))
