"""`moor hsm explain`: which rule released a function's keys, or withheld them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final

import typer

from moorline.cli import acting, render
from moorline.errors import EXIT_REFUSED, EXIT_YES, Malformed, Refused

_SAID: Final = ("identity", "action", "allowed", "decided_by", "session", "at")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(explain)


def explain(
    request: Annotated[str, typer.Argument(help="An instance, an identity, a session, or a JSON file of facts.")],
    broker: acting.Broker,
    *,
    as_json: render.AsJson = False,
) -> None:
    """Say which rule decided: about the last requests of a function, or about facts written down in a file."""
    import json

    found = _decisions(request, broker)
    if not found:
        raise Refused(
            "release.no_decision",
            "the broker remembers no decision about it",
            got=request,
            remedy="decisions are kept for a week; what was consumed stands in the secure log (moor log show)",
        )
    newest = found[0]
    if as_json:
        typer.echo(json.dumps({"decisions": found}))
    else:
        render.facts({name: newest[name] for name in _SAID if name in newest}, as_json=False)
        for rule in newest.get("rules", ()):
            if rule["outcome"] != "met":
                typer.echo(f"not met: {rule['rule']}: {rule['says']} (expected {rule['expected']}, got {rule['got']})")
    raise typer.Exit(EXIT_YES if newest["allowed"] else EXIT_REFUSED)


def _decisions(request: str, broker: Path) -> list[dict[str, Any]]:
    from urllib.parse import quote

    path = Path(request)
    if path.suffix == ".json" or path.is_file():
        facts = _facts_in(path)
        said: Any = acting.at_broker(broker, lambda client: client.post_json("/v1/decisions/explain", facts))
        return [said]
    name = quote(request, safe="")
    answer: Any = acting.at_broker(broker, lambda client: client.get_json(f"/v1/decisions/{name}"))
    return list(answer["decisions"])


def _facts_in(path: Path) -> dict[str, Any]:
    import json

    try:
        found = json.loads(render.read(path))
    except ValueError as error:
        raise Malformed("release.facts_malformed", "the file is not JSON", got=str(error)) from None
    if not isinstance(found, dict):
        raise Malformed("release.facts_malformed", "a request is a JSON object", got=type(found).__name__)
    return found
