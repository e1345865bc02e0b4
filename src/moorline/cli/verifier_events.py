"""`moor verifier events`: verdicts gained and lost, as they come; a connection that breaks is taken up where it was."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, cast

import typer

from moorline.cli import operator_identity
from moorline.clock import Instant, rendered
from moorline.errors import Malformed, Unavailable

if TYPE_CHECKING:
    from moorline.wire.http import HttpClient

_WAIT_S: Final = 15
_TIMEOUT_S: Final = 30.0
_RETRY_S: Final = 2.0


def events(
    at: Annotated[str, typer.Option("--at", help="The verifier: https://ADDRESS:PORT|SERVER-NAME.")],
    operator: Annotated[Path, typer.Option("--as", envvar="MOOR_OPERATOR", help="operator.toml: as whom to ask.")],
    *,
    after: Annotated[int, typer.Option(min=0, help="Begin behind this cursor.")] = 0,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until interrupted.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Show verdicts gained and lost, each with the cursor to go on from."""
    url, name = operator_identity.verifier_at(at)
    identity, roots_pem = operator_identity.read(operator)

    async def shown() -> None:
        from moorline.wire.http import HttpClient

        async with HttpClient(url, server_name=name, roots_pem=roots_pem, identity=identity, timeout_s=_TIMEOUT_S) as client:
            await _show(client, after, follow=follow, as_json=as_json)

    try:
        asyncio.run(shown())
    except KeyboardInterrupt:
        return


async def _show(client: HttpClient, after: int, *, follow: bool, as_json: bool) -> None:
    while True:
        asked = {"after": str(after), "wait_s": str(_WAIT_S if follow else 0)}
        try:
            page = _page(await client.get_json("/v1/events", asked))
        except Unavailable:
            if not follow:
                raise
            await asyncio.sleep(_RETRY_S)
            continue
        for one in page["events"]:
            typer.echo(json.dumps(one) if as_json else _line(one))
        after = page["next"]
        if not follow and after >= page["newest"]:
            if not as_json:
                typer.echo(f"next: moor verifier events --after {after} goes on from here")
            return


def _page(answer: object) -> dict[str, Any]:
    if not isinstance(answer, dict) or not {"events", "next", "newest"} <= set(answer):
        raise Malformed("cli.events_answer", "the verifier's answer is no page of events")
    return cast("dict[str, Any]", answer)


def _line(one: dict[str, Any]) -> str:
    why = f"  {one['code']}" if one["code"] else f"  until {rendered(Instant(one['result_expires']))}"
    return f"{one['cursor']:>8}  {rendered(Instant(one['at']))}  {one['host']:<20}  {one['kind']}{why}"
