"""`moor vnf`: create and watch functions, as an operator of the orchestrator.

Whom to ask and as whom is in a settings file (operator.toml; `--as`, or the environment variable MOOR_OPERATOR).
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar, cast

import typer

from moorline.cli import render
from moorline.errors import EXIT_UNDECIDED, MoorlineError, Unavailable, from_problem

if TYPE_CHECKING:
    from moorline.wire.http import HttpClient

T = TypeVar("T")

app = typer.Typer(no_args_is_help=True)

_POLL_S: Final = 0.2
_DONE: Final = ("active", "failed", "ended")
Operator = Annotated[Path, typer.Option("--as", envvar="MOOR_OPERATOR", help="operator.toml: whom to ask, and as whom.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorSettings:
    """operator.toml: the orchestrator, and the operator's SVID."""

    orchestrator_url: str
    """The orchestrator's HTTPS address."""
    orchestrator_name: str
    """The DNS name in its certificate."""
    roots: Path
    """The consortium's root certificates, PEM."""
    certificate_chain: Path
    """The operator's certificate and those above it, PEM (moor hsm svid)."""
    private_key: Path
    """The certificate's private key, PEM, mode 0600."""


@app.callback()
def vnf() -> None:
    """Create and watch functions."""


@app.command()
def onboard(
    csar: Annotated[Path, typer.Argument(help="The package.")], operator: Operator, *, as_json: AsJson = False
) -> None:
    """Bring a package to the orchestrator, which verifies it."""

    async def work(client: HttpClient) -> Any:  # noqa: ANN401 - JSON
        headers = {"content-type": "application/zip"}
        return json.loads(await client.send("POST", "/v1/packages", content=csar.read_bytes(), headers=headers))

    answer = _ask(operator, work)
    _show(answer, as_json=as_json, names=("digest", "service", "version", "use_case", "jurisdiction", "signer"))


@app.command()
def packages(operator: Operator, *, as_json: AsJson = False) -> None:
    """List onboarded packages."""
    answer = _ask(operator, lambda client: client.get_json("/v1/packages"))
    _table(answer, "packages", ("service", "version", "use_case", "jurisdiction", "signer", "digest"), as_json=as_json)


@app.command()
def create(  # noqa: PLR0913 - one parameter an option
    operator: Operator,
    service: Annotated[str, typer.Option(help="Name of the service.")],
    package: Annotated[str, typer.Option(help="Digest of the package, hex.")],
    tenant: Annotated[str, typer.Option(help="Whose function it is.")],
    *,
    contract: Annotated[list[str] | None, typer.Option(help="A contract it serves; may be repeated.")] = None,
    setting: Annotated[list[str] | None, typer.Option(help="name=value for the function; may be repeated.")] = None,
    name: Annotated[str | None, typer.Option("--id", help="Name of the instance; the same again is no other.")] = None,
    wait_s: Annotated[float, typer.Option("--wait", help="Seconds to wait until it serves; 0 does not wait.")] = 0.0,
    as_json: AsJson = False,
) -> None:
    """Create a function. With --wait, exit code 1 says that it was refused, 2 that it is still under way."""
    settings = dict(pair.split("=", 1) for pair in setting or [] if "=" in pair)
    asked = {"service": service, "package": package, "tenant": tenant, "contracts": contract or [], "settings": settings}
    if name is not None:
        asked["id"] = name

    async def work(client: HttpClient) -> Any:  # noqa: ANN401 - JSON
        answer = cast("dict[str, Any]", await client.post_json("/v1/functions", asked))
        ends = time.monotonic() + wait_s
        while answer["state"] not in _DONE and time.monotonic() < ends:
            await asyncio.sleep(_POLL_S)
            answer = cast("dict[str, Any]", await client.get_json(f"/v1/functions/{answer['id']}"))
        return answer

    with render.progress(f"launching {service}"):
        answer = _ask(operator, work)
    _show_function(answer, as_json=as_json)
    if wait_s > 0 and answer["state"] != "active":
        raise typer.Exit(_why_not(answer).exit_code)


@app.command()
def show(
    function: Annotated[str, typer.Argument(help="Name of the instance.")],
    operator: Operator,
    *,
    address: Annotated[bool, typer.Option("--address", help="Where it serves, and nothing else.")] = False,
    wait_s: Annotated[float, typer.Option("--wait", help="Seconds to wait until it serves; 0 does not wait.")] = 0.0,
    generation: Annotated[int, typer.Option(min=1, help="With --wait: in this generation or a later one.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Show a function: where it is, why there, every step of its launch. With --wait: exit code 1 or 2 if it does not."""

    def there(answer: dict[str, Any]) -> bool:
        return answer["state"] == "active" and int(answer["generation"]) >= generation

    async def work(client: HttpClient) -> Any:  # noqa: ANN401 - JSON
        ends = time.monotonic() + wait_s
        while True:
            answer = cast("dict[str, Any]", await client.get_json(f"/v1/functions/{function}"))
            if there(answer) or answer["state"] in ("failed", "ended") or time.monotonic() >= ends:
                return answer
            await asyncio.sleep(_POLL_S)

    with render.progress(f"waiting for {function}"):
        answer = _ask(operator, work)
    if address:
        if not answer.get("address"):
            raise _why_not(answer)
        typer.echo(answer["address"])
        return
    _show_function(answer, as_json=as_json)
    if wait_s > 0 and not there(answer):
        raise typer.Exit(_why_not(answer).exit_code)


@app.command(name="list")
def functions(operator: Operator, *, as_json: AsJson = False) -> None:
    """List functions."""
    answer = _ask(operator, lambda client: client.get_json("/v1/functions"))
    columns = ("id", "service", "state", "generation", "host", "address", "spiffe_id")
    _table(answer, "functions", columns, as_json=as_json)


@app.command()
def end(
    function: Annotated[str, typer.Argument(help="Name of the instance.")], operator: Operator, *, as_json: AsJson = False
) -> None:
    """End a function: its keys are destroyed first, then its guest is stopped. Exit code 2: it is not done yet."""

    async def work(client: HttpClient) -> Any:  # noqa: ANN401 - JSON
        return json.loads(await client.send("DELETE", f"/v1/functions/{function}", headers={"accept": "application/json"}))

    answer = _ask(operator, work)
    _show_function(answer, as_json=as_json)
    if answer["state"] != "ended":
        raise typer.Exit(EXIT_UNDECIDED)


@app.command()
def hosts(operator: Operator, *, as_json: AsJson = False) -> None:
    """List hosts with their standing Attestation Results."""
    answer = _ask(operator, lambda client: client.get_json("/v1/hosts"))
    _table(answer, "hosts", ("host", "status", "root", "location", "code", "says"), as_json=as_json)


@app.command()
def explain(
    package: Annotated[str, typer.Argument(help="Digest of the package, hex.")],
    operator: Operator,
    *,
    as_json: AsJson = False,
) -> None:
    """Say where a function of this package would go now, and why not elsewhere. Exit code 1: nowhere."""
    answer = _ask(operator, lambda client: client.post_json("/v1/placement/explain", {"package": package}))
    if as_json:
        typer.echo(json.dumps(answer))
    else:
        _placement(answer)
    if answer["chosen"] is None:
        raise typer.Exit(1)


def _ask(settings_file: Path, work: Callable[[HttpClient], Awaitable[Any]]) -> Any:  # noqa: ANN401 - JSON
    from moorline.services import settings
    from moorline.wire.http import ClientIdentity, HttpClient

    operator = settings.load(OperatorSettings, settings_file)
    identity = ClientIdentity(
        certificate_chain_pem=operator.certificate_chain.read_bytes(), private_key_pem=operator.private_key.read_bytes()
    )

    async def exchange() -> Any:  # noqa: ANN401 - JSON
        async with HttpClient(
            operator.orchestrator_url,
            server_name=operator.orchestrator_name,
            roots_pem=operator.roots.read_bytes(),
            identity=identity,
            timeout_s=30.0,
        ) as client:
            return await work(client)

    return asyncio.run(exchange())


def _why_not(answer: dict[str, Any]) -> MoorlineError:
    problem = answer.get("problem")
    if problem is None:
        return Unavailable("launch.not_active_yet", f"the function is {answer['state']}", remedy="moor vnf show")
    return from_problem(problem)


def _show_function(answer: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(answer))
        return
    names = ("id", "service", "tenant", "state", "generation", "host", "address", "spiffe_id", "launcher")
    _show(answer, as_json=False, names=names)
    if answer.get("placement"):
        _placement(answer["placement"])
    if answer.get("events"):
        typer.echo("history:")
    for event in answer.get("events", []):
        typer.echo(f"  {_time(event)}  {event['generation']:>2}  {event['state']:<10} {event['says']}")
    for done in answer.get("clean_ups", []):
        _clean_up(done)
    if answer.get("waiting"):
        typer.echo(f"waiting: {from_problem(answer['waiting'])}")
    if answer.get("problem"):
        typer.echo(f"problem: {_why_not(answer)}")


def _time(event: dict[str, Any]) -> str:
    """UTC, to the millisecond where the record has it."""
    at = (event.get("at_ms") or event["at"] * 1000) / 1000
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def _clean_up(done: dict[str, Any]) -> None:
    typer.echo(f"clean-up of generation {done['generation']} on {done['host']}: {done['cause']}, {done['code']}")
    typer.echo(f"  destroyed: {', '.join(done['destroyed']) or 'nothing'}")
    if done["revoked_at_height"] is not None:
        typer.echo(f"  identity revoked at ledger height {done['revoked_at_height']}")
    for unproven in done["not_proven"]:
        typer.echo(f"  not proven: {unproven}")


def _placement(placement: dict[str, Any]) -> None:
    typer.echo(f"placement: {placement['says']}")
    for verdict in placement["verdicts"]:
        mark = "yes" if verdict["eligible"] else f"no, {verdict['code']}"
        typer.echo(f"  {verdict['host']}: {mark}")
        for says in verdict["says"]:
            typer.echo(f"      {says}")


def _show(answer: dict[str, Any], *, as_json: bool, names: tuple[str, ...]) -> None:
    if as_json:
        typer.echo(json.dumps(answer))
        return
    for name in names:
        if answer.get(name) is not None:
            typer.echo(f"{name:<12} {answer[name]}")


def _table(answer: Any, key: str, columns: tuple[str, ...], *, as_json: bool) -> None:  # noqa: ANN401 - JSON
    if as_json:
        typer.echo(json.dumps(answer))
        return
    render.table(answer[key], columns, key=key, as_json=False, empty=f"no {key} yet")
