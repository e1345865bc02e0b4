"""Who acts on the command line: a provider with its offline key, an authority with its folder, an operator of a broker.

provider.toml is what `moor init provider` writes; `--as DIR` names its directory. The provider's key is read for each act
and is needed by no service, so that directory can be on a machine of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar

import typer

from moorline.cli import render
from moorline.errors import Misconfigured

if TYPE_CHECKING:
    from cryptography import x509

    from moorline.clock import Instant
    from moorline.ledger.client import LedgerClient, Submitter
    from moorline.ledger.light_client import LedgerTrust, ProvenState
    from moorline.ledger.transactions import Action, Body
    from moorline.wire.certificates import Issuer
    from moorline.wire.http import HttpClient

T = TypeVar("T")

PROVIDER_FILE: Final = "provider.toml"
BROKER_FILE: Final = "broker.toml"
As = Annotated[
    Path, typer.Option("--as", envvar="MOOR_PROVIDER", help="The acting provider's directory (moor init provider).")
]
By = Annotated[Path, typer.Option("--by", envvar="MOOR_AUTHORITY", help="The acting authority's folder.")]
Broker = Annotated[Path, typer.Option("--broker", envvar="MOOR_BROKER", help="The broker's directory (moor init broker).")]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProviderSettings:
    """provider.toml: a provider, its offline key, and the consortium as its people were given it."""

    name: str
    """The provider's name on the ledger."""
    trust_domain: str
    """The provider's trust domain."""
    key: Path
    """The provider's private key, PEM, mode 0600. It signs certificates of HSMs, ledger transactions and tickets."""
    certificate: Path
    """The provider's certificate and the authority's above it, PEM (moor authority issue)."""
    genesis: Path
    """The ledger's genesis: where the authorities are."""
    trust: Path
    """The ledger's trust file."""
    roots: Path
    """The consortium's root certificates, PEM."""


def remind(trust: LedgerTrust, path: Path, *, genesis: Path | None = None, now: Instant | None = None) -> None:
    """Say on standard error that a trust file ends soon, or has ended, and what renews it. Without `now`: at present."""
    from moorline.clock import SystemClock, rendered

    now = SystemClock().now() if now is None else now
    if not trust.ending(now):
        return
    days = (trust.ends - now) // 86_400
    when = f"ends in {days} days, at {rendered(trust.ends)}" if days >= 0 else f"ended at {rendered(trust.ends)}"
    new = path.with_name(f"{path.stem}-renewed{path.suffix}")
    renews = f"moor ledger trust --renew {path} --genesis {genesis or 'genesis.cbor'} --output {new}"
    then = renews if days >= 0 else "get a new one from somebody you trust"
    typer.echo(f"warning: the trust file {path} {when}; next: {then}", err=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Provider:
    """A provider that acts."""

    settings: ProviderSettings

    @property
    def name(self) -> str:
        """Its name on the ledger."""
        return self.settings.name

    def certificates(self) -> tuple[x509.Certificate, ...]:
        """Its own certificate, then the authority's. Raises Misconfigured("provider.no_certificate")."""
        from cryptography import x509

        try:
            found = x509.load_pem_x509_certificates(self.settings.certificate.read_bytes())
        except (OSError, ValueError) as error:
            raise Misconfigured(
                "provider.no_certificate",
                "this provider has no certificate yet",
                got=type(error).__name__,
                remedy=f"have an authority issue it: moor authority issue ... --output {self.settings.certificate}",
            ) from None
        return tuple(found)

    def issuer(self) -> Issuer:
        """The provider as issuer of its HSMs' certificates."""
        from moorline.hsm.provider import load_provider_key
        from moorline.wire.certificates import Issuer

        return Issuer(certificate=self.certificates()[0], key=load_provider_key(self.settings.key))

    def trust(self) -> LedgerTrust:
        """The ledger as it was provisioned."""
        from moorline.ledger.light_client import LedgerTrust

        found = LedgerTrust.parse(render.read(self.settings.trust))
        remind(found, self.settings.trust, genesis=self.settings.genesis)
        return found

    def ledger(self) -> LedgerClient:
        """A client of the authorities."""
        return ledger_client(self.settings.genesis)

    def authorities(self) -> tuple[tuple[str, str], ...]:
        """URL and server name of each authority."""
        from moorline.ledger.ceremony import endpoints
        from moorline.ledger.genesis import parse

        return tuple((one.url, one.server_name) for one in endpoints(parse(render.read(self.settings.genesis))))

    def send(self, *bodies: Body) -> int:
        """Sign and submit transactions in order; the height of the last. Raises what the ledger says."""
        from moorline.hsm.provider import load_provider_key
        from moorline.ledger.client import Submitter
        from moorline.ledger.transactions import Sender, SenderKind
        from moorline.wire.keys import KeySigner

        key = load_provider_key(self.settings.key)

        async def sent() -> int:
            height = 0
            async with self.ledger() as client:
                submitter = Submitter(
                    client,
                    sender=Sender(kind=SenderKind.PROVIDER, name=self.name),
                    signer=KeySigner(key),
                    ledger_id=self.trust().ledger_id,
                )
                for body in bodies:
                    height = (await submitter.send(body)).height
            return height

        with render.progress("waiting for the quorum"):
            return asyncio.run(sent())

    def prove(self, *keys: str) -> ProvenState:
        """What a quorum signed about these keys now."""
        from moorline.clock import SystemClock
        from moorline.ledger.light_client import verify_bundle

        async def proven() -> bytes:
            async with self.ledger() as client:
                return await client.prove(keys)

        return verify_bundle(asyncio.run(proven()), self.trust(), now=SystemClock().now())


def provider(directory: Path) -> Provider:
    """The provider whose directory this is."""
    from moorline.services import settings

    return Provider(settings=settings.load(ProviderSettings, directory / PROVIDER_FILE, service="provider"))


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerFacts:
    """What others need to know of a broker to find it."""

    trust_domain: str
    hsm: str
    listen_sessions: str
    listen_https: str
    admin_socket: str
    verifier: str | None
    verifier_url: str | None

    def require_verifier(self) -> tuple[str, str]:
        """Id and URL of the attestation authority. Raises Misconfigured("init.no_verifier")."""
        if self.verifier is None or self.verifier_url is None:
            raise Misconfigured(
                "init.no_verifier",
                "the broker knows no attestation authority",
                remedy="set verifier and verifier_url in broker.toml, or moor init broker --verifier ID=ADDRESS:PORT",
            )
        return self.verifier, self.verifier_url


def broker_facts(directory: Path) -> BrokerFacts:
    """The broker whose directory this is. Its own classes are not loaded: they bring half of the system with them."""
    import tomllib

    try:
        table = tomllib.loads(render.read(directory / BROKER_FILE).decode("utf-8"))
        names: dict[str, Any] = {field.name: table.get(field.name) for field in fields(BrokerFacts)}
        required = [names[name] for name in ("trust_domain", "hsm", "listen_sessions", "listen_https", "admin_socket")]
    except (tomllib.TOMLDecodeError, UnicodeDecodeError):
        required = [None]
    if not all(isinstance(value, str) for value in required):
        raise Misconfigured(
            "cli.broker_file",
            "the broker's settings file cannot be read",
            got=directory / BROKER_FILE,
            remedy="moor broker check says what is wrong with it",
        )
    return BrokerFacts(**names)


def at_broker(directory: Path, ask: Callable[[HttpClient], Awaitable[T]]) -> T:
    """Ask the admin socket of a broker; whoever can open it is the provider."""
    from moorline.wire.http import HttpClient

    socket = directory / broker_facts(directory).admin_socket

    async def asked() -> T:
        async with HttpClient("http://broker", server_name="", roots_pem=b"", uds=str(socket), timeout_s=30.0) as client:
            return await ask(client)

    return asyncio.run(asked())


def authority_sends(folder: Path, act: Callable[[Submitter], Awaitable[T]]) -> T:
    """Act as the authority whose folder this is."""
    from moorline.ledger.ceremony import load_authority
    from moorline.ledger.client import Submitter
    from moorline.ledger.genesis import parse
    from moorline.ledger.transactions import Sender, SenderKind

    keys = load_authority(folder.absolute())
    genesis = folder / "genesis.cbor"

    async def acted() -> T:
        async with ledger_client(genesis) as client:
            submitter = Submitter(
                client,
                sender=Sender(kind=SenderKind.AUTHORITY, name=keys.name),
                signer=keys.signer(),
                ledger_id=parse(render.read(genesis)).ledger_id,
            )
            return await act(submitter)

    with render.progress("waiting for the quorum"):
        return asyncio.run(acted())


def propose(
    folder: Path,
    action: Action,
    what: str,
    *,
    quiet: bool,
    as_json: bool,
    output: Path | None = None,
    valid_until: int | None = None,
) -> None:
    """An authority proposes; says which proposal others approve. With `output` it writes a file and sends nothing."""
    if output is not None:
        _propose_in_file(folder, action, what, quiet=quiet, as_json=as_json, output=output, valid_until=valid_until)
        return

    async def proposed(submitter: Submitter) -> tuple[int, str]:
        receipt, proposal = await submitter.send_proposal(action)
        return receipt.height, proposal

    height, proposal = authority_sends(folder, proposed)
    if quiet:
        typer.echo(proposal)
        return
    found = {"proposal": proposal, "what": what, "height": height}
    render.facts(found, as_json=as_json, then=f"another authority approves: moor authority approve {proposal} --by FOLDER")


def _propose_in_file(
    folder: Path, action: Action, what: str, *, quiet: bool, as_json: bool, output: Path, valid_until: int | None
) -> None:
    from moorline.cli import approvals
    from moorline.ledger import transactions

    signed = approvals.sign(folder, transactions.propose(action), valid_until)
    render.new_file(output, signed.data)
    proposal = transactions.proposal_id(signed.payload)
    if quiet:
        typer.echo(proposal)
        return
    render.facts(
        {"proposal": proposal, "what": what, "written to": str(output), "valid until block": signed.payload.valid_until},
        as_json=as_json,
        then=f"give others {output}: moor authority review, approve, submit",
    )


def ledger_client(genesis: Path) -> LedgerClient:
    """A client of the authorities of a genesis."""
    from moorline.ledger.ceremony import endpoints, pem_of
    from moorline.ledger.client import LedgerClient
    from moorline.ledger.genesis import parse

    found = parse(render.read(genesis))
    return LedgerClient(endpoints(found), roots_pem=pem_of(found.roots))
