"""`moor device`: enrol a device at its provider, and use a function of another one."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from moorline.cli import render
from moorline.errors import Malformed, Misconfigured

if TYPE_CHECKING:
    from moorline.device.keys import Where
    from moorline.ledger.client import Endpoint
    from moorline.verification.chains import VerifiedChain

T = TypeVar("T")

app = typer.Typer(no_args_is_help=True)
connect = typer.Typer(no_args_is_help=True, help="Use the sample records function over the device channel")
app.add_typer(connect, name="connect")

Directory = Annotated[Path, typer.Option("--dir", help="The device's directory (made 0700)")]
Url = Annotated[str, typer.Option(help="The broker's HTTPS address, e.g. https://127.0.0.1:8443")]
ServerName = Annotated[str, typer.Option(help="The broker's DNS name, e.g. hsm-1.hsm.beta.test")]
Address = Annotated[str, typer.Option(help="Where the function listens, host:port or unix:/path")]
Provider = Annotated[str, typer.Option(help="The provider whose function this is")]
Service = Annotated[str, typer.Option(help="The service wanted")]
Contract = Annotated[str, typer.Option(help="The contract between the two providers")]
Record = Annotated[str, typer.Option("--name", help="The record's name")]
Profile = Annotated[
    str, typer.Option(help="tls, or no-pfs (keys from the HSMs, no forward secrecy) where the contract allows it")
]
Json = Annotated[bool, typer.Option("--json", help="Answer in JSON")]


@app.command("enrol")
def enrol_command(  # noqa: PLR0913 - one option each
    directory: Directory,
    url: Url,
    server_name: ServerName,
    trust: Annotated[Path, typer.Option(help="The consortium's trust file (LedgerTrust)")],
    name: Annotated[str, typer.Option(help="The device's name at its provider")],
    ledger: Annotated[list[str], typer.Option(help="URL=SERVER_NAME of an authority; may be repeated")],
    *,
    code_file: Annotated[Path | None, typer.Option(help="File with the one-time enrolment code")] = None,
    token_module: Annotated[Path | None, typer.Option(help="PKCS#11 module: make the key in a token of it")] = None,
    token_label: Annotated[str | None, typer.Option(help="The token's label; with --token-module")] = None,
    pin_file: Annotated[Path | None, typer.Option(help="File with its PIN, mode 0600; with --token-module")] = None,
    tpm: Annotated[str | None, typer.Option(help="TCTI of a TPM to make the key in: device:/dev/tpmrm0")] = None,
    as_json: Json = False,
) -> None:
    """Make a key, in a file, a PKCS#11 token or a TPM, enrol at the provider over EST, keep the certificate.

    Without --code-file the enrolment code is taken from MOOR_ENROLMENT_CODE, or asked for. No option takes it: every user of
    the machine may read command lines.
    """
    from moorline.clock import SystemClock
    from moorline.device.enrolment import enrol
    from moorline.device.store import DeviceStore
    from moorline.ledger.light_client import LedgerTrust

    store = DeviceStore(directory=directory)
    where, code = _where(name, token_module, token_label, pin_file, tpm), _code(code_file)
    store.provision(LedgerTrust.parse(_read(trust)), tuple(_endpoint(text) for text in ledger))
    if where is not None:
        store.hold_key(where)
    now = SystemClock().now()
    chain = _run(enrol(store, url=url, server_name=server_name, device=name, code=code, now=now))
    _say_identity(chain, as_json=as_json)


def _where(name: str, module: Path | None, label: str | None, pin_file: Path | None, tpm: str | None) -> Where | None:
    from moorline.device.keys import InToken, InTpm

    if tpm is not None and module is not None:
        raise typer.BadParameter("a key is in a token or in a TPM: give --token-module or --tpm")
    if tpm is not None:
        return InTpm(tcti=tpm, name=name)
    if module is None:
        return None
    if label is None or pin_file is None:
        raise typer.BadParameter("a token is named by --token-label and opened with --pin-file")
    return InToken(module=str(module), token_label=label, pin_file=str(pin_file.resolve()))


@app.command("renew")
def renew_command(directory: Directory, url: Url, server_name: ServerName, *, as_json: Json = False) -> None:
    """Get a fresh certificate for the same key: by EST (simplereenroll), or signed in the token or TPM by CMP."""
    from moorline.clock import SystemClock
    from moorline.device.enrolment import renew
    from moorline.device.store import DeviceStore

    store = DeviceStore(directory=directory)
    chain = _run(renew(store, url=url, server_name=server_name, now=SystemClock().now()))
    _say_identity(chain, as_json=as_json)


@app.command("show")
def show_command(directory: Directory, *, as_json: Json = False) -> None:
    """Show who this device is, until when, and whom it can ask about the ledger."""
    from moorline.clock import SystemClock
    from moorline.device.keys import encode
    from moorline.device.store import DeviceStore
    from moorline.verification.chains import verify_chain

    store = DeviceStore(directory=directory)
    own, highest = store.chain(), store.highest()
    chain = verify_chain(own[0], own[1:], store.trust().roots, SystemClock().now())
    found = {
        "spiffe_id": str(chain.spiffe_id),
        "provider": chain.provider_name,
        "not_after": int(chain.leaf.not_valid_after_utc.timestamp()),
        "key": encode(store.where()).decode() if store.held_elsewhere else "key.pem",
        "ledger": store.trust().ledger_id.hex(),
        "authorities": [endpoint.url for endpoint in store.endpoints()],
        "highest checkpoint seen": None if highest is None else highest.height,
    }
    render.facts(found, as_json=as_json)


@connect.command("put")
def put_command(  # noqa: PLR0913 - one option each
    directory: Directory,
    address: Address,
    provider: Provider,
    service: Service,
    contract: Contract,
    name: Record,
    data: Annotated[str | None, typer.Option(help="The record, as text")] = None,
    file: Annotated[Path | None, typer.Option(help="The record, from a file")] = None,
    *,
    profile: Profile = "tls",
    as_json: Json = False,
) -> None:
    """Store a record."""
    if (data is None) == (file is None):
        raise typer.BadParameter("give --data or --file")
    content = data.encode() if data is not None else _read(file or Path())
    _ask(directory, address, (provider, service, contract), profile, {"op": "put", "name": name, "data": content})
    typer.echo(json.dumps({"ok": True, "name": name, "bytes": len(content)}) if as_json else f"stored {name}")


@connect.command("get")
def get_command(
    directory: Directory,
    address: Address,
    provider: Provider,
    service: Service,
    contract: Contract,
    name: Record,
    *,
    profile: Profile = "tls",
    as_json: Json = False,
) -> None:
    """Read a record back."""
    answer = _ask(directory, address, (provider, service, contract), profile, {"op": "get", "name": name})
    content = answer.get("data")
    if not isinstance(content, bytes):
        raise Malformed("device.answer", "the function's answer holds no record")
    text = content.decode("utf-8", errors="replace")
    typer.echo(json.dumps({"ok": True, "name": name, "data": text, "hex": content.hex()}) if as_json else text)


@connect.command("list")
def list_command(
    directory: Directory,
    address: Address,
    provider: Provider,
    service: Service,
    contract: Contract,
    *,
    profile: Profile = "tls",
    as_json: Json = False,
) -> None:
    """Name the records of this device."""
    names = _ask(directory, address, (provider, service, contract), profile, {"op": "list"}).get("names")
    if not isinstance(names, list):
        raise Malformed("device.answer", "the function's answer holds no names")
    typer.echo(json.dumps({"ok": True, "names": names}) if as_json else "\n".join(map(str, names)))


def _ask(
    directory: Path, address: str, wanted: tuple[str, str, str], profile: str, request: dict[str, object]
) -> dict[str, object]:
    from moorline.clock import SystemClock
    from moorline.device import no_pfs
    from moorline.device.connection import Wanted, connected
    from moorline.device.store import DeviceStore
    from moorline.wire import cbor

    if profile not in ("tls", "no-pfs"):
        raise typer.BadParameter("a profile is tls or no-pfs")
    provider, service, contract = wanted
    function = Wanted(provider=provider, service=service, contract=contract)
    store = DeviceStore(directory=directory)

    async def once() -> bytes:
        if profile == "no-pfs":
            async with await no_pfs.connect(store, address, function, clock=SystemClock()) as plain:
                return await plain.request(cbor.encode(request))
        async with connected(store, address, function, clock=SystemClock()) as connection:
            return await connection.request(cbor.encode(request))

    answer = cbor.decode(_run(once()))
    if not isinstance(answer, dict):
        raise Malformed("device.answer", "the function's answer is not a map")
    return answer


def _say_identity(chain: VerifiedChain, *, as_json: bool) -> None:
    facts = {
        "ok": True,
        "spiffe_id": str(chain.spiffe_id),
        "provider": chain.provider_name,
        "not_after": int(chain.leaf.not_valid_after_utc.timestamp()),
    }
    typer.echo(json.dumps(facts) if as_json else f"this device is {facts['spiffe_id']}")


def _endpoint(text: str) -> Endpoint:
    from moorline.ledger.client import Endpoint

    url, separator, name = text.partition("=")
    if not separator or not name:
        raise Misconfigured("device.endpoint", "not an authority", expected="URL=SERVER_NAME", got=text)
    return Endpoint(url=url, server_name=name)


def _code(file: Path | None) -> str:
    given = os.environ.get("MOOR_ENROLMENT_CODE", "") if file is None else _read(file).decode("ascii", errors="replace")
    return given.strip() or str(typer.prompt("Enrolment code", hide_input=True))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise Misconfigured("device.file", "the file cannot be read", got=f"{path}: {type(error).__name__}") from None


def _run(work: Coroutine[Any, Any, T]) -> T:
    with render.progress("asking"):
        return asyncio.run(work)
