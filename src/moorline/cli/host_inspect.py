"""`moor host inspect`: what this host can read of its guests, and the one door through which it may.

The configuration (/etc/moorline/inspection.toml) names the host, the log, and who may approve:

    host = "server-1"
    log = "/var/lib/moorline/inspection.log"
    [[approver]]
    name = "A. Ahn"
    key = "ahn.pem"           # public key; paths are relative to this file
"""

from __future__ import annotations

import dataclasses
import secrets
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from moorline.cli import render
from moorline.clock import SystemClock
from moorline.errors import EXIT_UNDECIDED, EXIT_YES, Malformed, Misconfigured

if TYPE_CHECKING:
    from moorline.host_agent.memory import InspectionBroker
    from moorline.wire.keys import PublicKey, Signer

app = typer.Typer(no_args_is_help=True)

CONFIG: Final = Path("/etc/moorline/inspection.toml")
Config = Annotated[Path, typer.Option("--config", metavar="FILE", help="The inspection broker's settings.")]
Output = Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where to write it; never over a file.")]
_HOUR_S: Final = 3600


@app.callback()
def inspect() -> None:
    """Show what this host can read of its guests; look only as two people approved."""


@app.command()
def control(*, as_json: render.AsJson = False) -> None:
    """Plant a value in another process and read it back: can this user of this host read memory? Exit 2 if not found."""
    from moorline.attesters.probes import memory as probe
    from moorline.attesters.probes.tree import Tree
    from moorline.host_agent import memory

    with render.progress("looking for the planted value"):
        found = memory.control()
    ways = {
        way.name: "cannot be told" if way.open is None else "open" if way.open else "closed" for way in probe.reach(Tree())
    }
    told: dict[str, Any] = {
        "found": found.found,
        "user": "root" if found.user == 0 else str(found.user),
        "why": found.why or None,
        "ways": ways if as_json else ", ".join(f"{name}: {state}" for name, state in ways.items()),
    }
    then = "this user reads any guest that is a process; only hardware stops that (SEV-SNP, TDX)" if found.found else None
    render.facts(told, as_json=as_json, then=then)
    raise typer.Exit(EXIT_YES if found.found else EXIT_UNDECIDED)


@app.command()
def request(  # noqa: PLR0913 - each is a field of the request
    *,
    process: Annotated[int, typer.Option(metavar="PID", help="The process to look into.")],
    function: Annotated[str, typer.Option(help="The function it is, such as vnf/records-1.")],
    inspector: Annotated[str, typer.Option(help="Who looks.")],
    reason: Annotated[str, typer.Option(help="Why.")],
    output: Output,
    hours: Annotated[int, typer.Option(min=1, max=8, help="How long it may be used, from now.")] = 1,
    looks: Annotated[int, typer.Option(min=1, max=1000, help="How often.")] = 1,
    most_bytes: Annotated[int, typer.Option("--most", min=1, metavar="BYTES", help="How much at once.")] = 1 << 20,
    config: Config = CONFIG,
    as_json: render.AsJson = False,
) -> None:
    """Ask for an inspection: write the request that two approvers sign."""
    from moorline.host_agent import memory
    from moorline.policy.inspection import InspectionRequest
    from moorline.wire import schema

    now = SystemClock().now()
    made = InspectionRequest(
        host=_settings(config)["host"],
        function=function,
        process=process,
        started=memory.started(process),
        inspector=inspector,
        reason=reason,
        not_before=now,
        not_after=now + hours * _HOUR_S,
        looks=looks,
        most_bytes=most_bytes,
        nonce=secrets.token_bytes(32),
    )
    render.new_file(output, schema.encode(made))
    then = [f"moor host inspect approve {output} --as NAME --key KEY -o APPROVAL (two people)"]
    render.files([output], as_json=as_json, then=then)


@app.command()
def approve(
    file: Annotated[Path, typer.Argument(help="The request.")],
    *,
    name: Annotated[str, typer.Option("--as", help="Your name, as the host's configuration has it.")],
    key: Annotated[Path, typer.Option(help="Your private key (PEM).")],
    output: Output,
    as_json: render.AsJson = False,
) -> None:
    """Read what is asked, and sign it."""
    from moorline.policy import inspection

    data = render.read(file)
    asked = inspection.parse_request(data)
    if not as_json:
        render.facts({**dataclasses.asdict(asked), "nonce": asked.nonce.hex()}, as_json=False)
    render.new_file(output, inspection.approve(data, name, _signer(key)))
    render.files(
        [output], as_json=as_json, then=["moor host inspect look REQUEST APPROVAL APPROVAL --start ADDRESS --size N"]
    )


@app.command()
def look(
    file: Annotated[Path, typer.Argument(help="The request.")],
    approvals: Annotated[list[Path], typer.Argument(help="The approvals.")],
    *,
    start: Annotated[str, typer.Option(metavar="ADDRESS", help="Where to begin, such as 0x7f00.")],
    size: Annotated[int, typer.Option(min=1, metavar="BYTES", help="How much to read.")],
    output: Output,
    config: Config = CONFIG,
    as_json: render.AsJson = False,
) -> None:
    """Look once: the log says who, why and where before anything is read, and afterwards what the digest of it was."""
    try:
        address = int(start, 0)
    except ValueError:
        raise Misconfigured("inspection.address", "an address is a number", got=start) from None
    read = _broker(config).look(render.read(file), [render.read(path) for path in approvals], start=address, size=size)
    render.new_file(output, read)
    output.chmod(0o600)
    render.files([output], as_json=as_json, then=["moor host inspect log shows who looked at what"], bytes=str(len(read)))


@app.command()
def log(*, config: Config = CONFIG, as_json: render.AsJson = False) -> None:
    """Show who looked at what, after verifying that the log is one chain."""
    rows = [
        {"number": one.number, "at": one.time, "event": one.event, "who": one.subject, **one.details}
        for one in _broker(config).entries()
    ]
    columns = ("number", "at", "event", "who", "approvers", "function", "reason", "size")
    render.table(rows, columns, key="entries", as_json=as_json, empty="nobody has looked at anything")


def _broker(config: Path) -> InspectionBroker:
    from moorline.host_agent.memory import InspectionBroker

    settings = _settings(config)
    return InspectionBroker(
        host=settings["host"],
        approvers={one["name"]: _public(config.parent / one["key"]) for one in settings["approver"]},
        log=config.parent / settings["log"],
        clock=SystemClock(),
    )


def _settings(config: Path) -> dict[str, Any]:
    try:
        found = tomllib.loads(render.read(config).decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Misconfigured("inspection.settings", "the settings cannot be read", got=f"{config}: {error}") from None
    approvers = found.get("approver")
    plain = set(found) == {"host", "log", "approver"} and isinstance(found["host"], str) and isinstance(found["log"], str)
    if not plain or not isinstance(approvers, list) or not all(_is_approver(one) for one in approvers):
        raise Misconfigured(
            "inspection.settings", "the settings are not those of an inspection broker", got=config,
            expected="host, log, and [[approver]] with name and key",
        )  # fmt: skip
    if len({one["name"] for one in approvers}) < 2 or len({one["name"] for one in approvers}) != len(approvers):
        raise Misconfigured("inspection.approvers", "two approvers at least, each named once", got=len(approvers))
    return found


def _is_approver(one: object) -> bool:
    return isinstance(one, dict) and set(one) == {"name", "key"} and all(isinstance(value, str) for value in one.values())


def _public(path: Path) -> PublicKey:
    from cryptography.hazmat.primitives import serialization

    from moorline.wire import keys

    try:
        key = serialization.load_pem_public_key(render.read(path))
    except ValueError:
        raise Misconfigured("inspection.key", "a key cannot be read", expected="PEM, a public key", got=path) from None
    return keys.parse_public(key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo))


def _signer(path: Path) -> Signer:
    from moorline.cli.evidence_cases import tokens

    try:
        return tokens.any_signer(render.read(path))
    except Malformed as error:
        raise Misconfigured("inspection.key", "a key cannot be read", got=f"{path}: {error.says}") from None
