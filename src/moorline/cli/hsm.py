"""`moor hsm`: set up a provider's HSM, and do at its broker's admin socket what the provider's own people do."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from moorline.cli import acting, hsm_backup, hsm_custody, hsm_explain, hsm_key, hsm_tenant, hsm_token, render
from moorline.nfv import Role

if TYPE_CHECKING:
    from moorline.wire.http import HttpClient

app = typer.Typer(no_args_is_help=True)
shown = typer.Typer(no_args_is_help=True, help="Show what the broker keeps.")
app.add_typer(shown, name="show")
app.add_typer(hsm_key.app, name="key")
app.add_typer(hsm_tenant.app, name="tenant")
app.add_typer(hsm_backup.app, name="backup")
hsm_token.register(app)
hsm_explain.register(app)
hsm_custody.register(app)

_YEAR_S: Final = 365 * 24 * 3600


@app.callback()
def hsm() -> None:
    """Set up an HSM, issue identities, look after its launches and peers."""


@app.command()
def init(
    directory: Annotated[Path, typer.Option("--dir", help="Where the token lives; made if it is not there.")],
    label: Annotated[str, typer.Option(help="The token's label.")],
    *,
    custodian: hsm_custody.Custodians = None,
    quorum: hsm_custody.Quorum = 2,
    as_json: render.AsJson = False,
) -> None:
    """Make a SoftHSM token with a provider's keys in it. `moor init broker` does this too, where there is no token yet."""
    from moorline.hsm.ceremony import initialise

    with render.progress("making keys in the token"):
        made = initialise(directory, label=label, circle=hsm_custody.circle_of(custodian, quorum))
    assert made.location.pin_file is not None
    render.files(
        [made.location.pin_file], as_json=as_json, then=["moor init broker --token DIR"], module=made.location.module
    )


@app.command()
def certify(
    request: Annotated[Path, typer.Argument(help="request.json of the HSM (moor init broker).")],
    provider: acting.As,
    *,
    years: Annotated[
        int, typer.Option(min=1, max=5, help="How long the certificates live; the provider's own bounds it.")
    ] = 1,
    as_json: render.AsJson = False,
) -> None:
    """Sign an HSM's certificates with the provider's key: hsm.pem, issuing-ca.pem and chain.pem beside the request."""
    import secrets

    from cryptography.hazmat.primitives import serialization

    from moorline.cli import hsm_request
    from moorline.clock import Instant, SystemClock, Validity
    from moorline.hsm.provider import certify_hsm

    acts = acting.provider(provider)
    asked = hsm_request.read(request)
    now = SystemClock().now()
    own, *above = acts.certificates()
    ends = min(now + years * _YEAR_S, int(own.not_valid_after_utc.timestamp()))
    made = certify_hsm(
        acts.issuer(),
        asked.keys(),
        trust_domain=acts.settings.trust_domain,
        hsm=asked.hsm,
        issuing_ca=asked.issuing_ca,
        address=asked.sessions,
        validity=Validity(not_before=Instant(now - 60), not_after=Instant(ends)),
        serials=(secrets.randbits(120), secrets.randbits(120)),
    )
    chains = {"hsm.pem": (made.hsm,), "issuing-ca.pem": (made.issuing_ca,), "chain.pem": (own, *above)}
    for name in chains:
        render.require_free(request.parent / name)
    written = [
        render.new_file(
            request.parent / name, b"".join(one.public_bytes(serialization.Encoding.PEM) for one in certificates)
        )
        for name, certificates in chains.items()
    ]
    render.files(
        written,
        as_json=as_json,
        then=[
            f"moor provider register hsm {request} --as {provider}",
            f"moor broker run --config {request.parent / acting.BROKER_FILE}",
        ],
    )


@app.command()
def svid(
    role: Annotated[Role, typer.Argument(help="What it is for: verifier, orchestrator, operator, host ...")],
    name: Annotated[str, typer.Argument(help="Whose it is, such as verifier-1.")],
    broker: acting.Broker,
    directory: Annotated[Path, typer.Option("--dir", help="Where chain.pem and key.pem (0600) go; replaced if there.")],
    *,
    as_json: render.AsJson = False,
) -> None:
    """Issue an identity to a service or person. It lives an hour at most: run this again before it is over."""
    import base64

    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    from moorline.nfv import SpiffeId
    from moorline.storage import whole_files
    from moorline.wire import keys

    domain = acting.broker_facts(broker).trust_domain
    spiffe_id = SpiffeId(trust_domain=domain, role=role, segments=(name,))
    key = ec.generate_private_key(ec.SECP256R1())
    public = base64.b64encode(keys.public_bytes(key.public_key())).decode("ascii")
    asked = {"public_key": public, "spiffe_id": str(spiffe_id)}
    answer: Any = acting.at_broker(broker, lambda client: client.post_json("/v1/svid", asked))
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    for file, data in (("key.pem", pem), ("chain.pem", answer["chain"].encode("ascii"))):
        whole_files.replace(directory / file, data, mode=whole_files.PRIVATE)
    render.facts(
        {"spiffe_id": str(spiffe_id), "directory": str(directory), "not_after": answer["not_after"]}, as_json=as_json
    )


@app.command()
def connect(
    provider: Annotated[str, typer.Argument(help="The other provider's name.")],
    hsm: Annotated[str, typer.Argument(help="Its HSM's id.")],
    broker: acting.Broker,
    *,
    rotate: Annotated[bool, typer.Option("--rotate", help="Agree on a new pair key; the one before stays good.")] = False,
    as_json: render.AsJson = False,
) -> None:
    """Meet another provider's HSM: each finds the other on the ledger, they exchange trust bundles and agree on a key."""
    body = {"provider": provider, "hsm": hsm, "rotate": rotate}
    answer: Any = acting.at_broker(broker, lambda client: client.post_json("/v1/peers/connect", body))
    render.facts(answer, as_json=as_json)


@app.command("enrolment-code")
def enrolment_code(
    device: Annotated[str, typer.Argument(help="The device's name at this provider.")],
    broker: acting.Broker,
    *,
    life_s: Annotated[int, typer.Option("--life", min=60, max=7 * 24 * 3600, help="Seconds the code is good for.")] = 600,
    quiet: render.Quiet = False,
    as_json: render.AsJson = False,
) -> None:
    """Make a one-time code with which a device enrols; an earlier one of the same device is void."""
    answer: Any = acting.at_broker(
        broker, lambda client: client.post_json("/v1/enrolment-codes", {"device": device, "ttl_s": life_s})
    )
    if quiet:
        typer.echo(answer["code"])
        return
    render.facts(answer, as_json=as_json, then="give it to the device: moor device enrol")


@app.command()
def epoch(broker: acting.Broker, *, as_json: render.AsJson = False) -> None:
    """Close the running epoch of launch keys, with grace, and open the next; ends a halt."""
    answer: Any = acting.at_broker(broker, lambda client: client.post_json("/v1/epochs", {}))
    render.facts(answer, as_json=as_json)


@app.command("revoke-launcher")
def revoke_launcher(
    launcher: Annotated[str, typer.Argument(help="The launcher's id, hex (moor hsm show launches).")],
    broker: acting.Broker,
    *,
    as_json: render.AsJson = False,
) -> None:
    """Void a launcher, and its epoch without grace."""
    answer: Any = acting.at_broker(broker, lambda client: client.post_json("/v1/launchers/revoke", {"launcher": launcher}))
    render.facts(answer, as_json=as_json)


@app.command("revoke-certificate")
def revoke_certificate(
    serial: Annotated[str, typer.Argument(help="The certificate's serial number, hex.")],
    broker: acting.Broker,
    *,
    reason: Annotated[str, typer.Option(help="Why, as RFC 5280 5.3.1 says it, such as key_compromise.")] = "unspecified",
    as_json: render.AsJson = False,
) -> None:
    """Revoke a certificate this broker gave out: at once in CRL and OCSP, on the ledger as soon as it takes it."""
    body = {"serial": serial, "reason": reason}
    answer: Any = acting.at_broker(broker, lambda client: client.post_json("/v1/certificates/revoke", body))
    render.facts(answer, as_json=as_json)


@app.command()
def revocation(broker: acting.Broker, *, as_json: render.AsJson = False) -> None:
    """Show how far revocations are, and the bound within which one is seen everywhere."""
    answer: Any = _read(broker, "/v1/revocation")
    render.facts(answer, as_json=as_json)


@shown.command("keys")
def show_keys(broker: acting.Broker, *, as_json: render.AsJson = False) -> None:
    """Show the public halves of the token's keys, base64."""
    answer: Any = _read(broker, "/v1/keys")
    render.facts(answer, as_json=as_json)


@shown.command("launches")
def show_launches(broker: acting.Broker, *, as_json: render.AsJson = False) -> None:
    """Show the latest launches, newest first."""
    columns = ("service", "instance", "generation", "host", "epoch", "sequence", "state", "spiffe_id")
    _table(broker, "launches", columns, as_json=as_json, empty="no launches yet")


@shown.command("alarms")
def show_alarms(broker: acting.Broker, *, as_json: render.AsJson = False) -> None:
    """Show what a person must look at, newest first."""
    _table(broker, "alarms", ("id", "at", "code", "says", "first", "second"), as_json=as_json, empty="no alarms")


@shown.command("peers")
def show_peers(broker: acting.Broker, *, as_json: render.AsJson = False) -> None:
    """Show HSMs of other providers whose trust bundles are kept."""
    columns = ("provider", "hsm", "sequence", "at", "transcript")
    _table(broker, "peers", columns, as_json=as_json, empty="no peers yet; next: moor hsm connect")


@shown.command("pairs")
def show_pairs(broker: acting.Broker, *, as_json: render.AsJson = False) -> None:
    """Show pair keys with other providers' HSMs, by pair epoch."""
    columns = ("provider", "hsm", "epoch", "state", "anchored_at_height", "at", "uses", "revoked_by_peer", "contracts")
    _table(broker, "pairs", columns, as_json=as_json, empty="no pairs yet; next: moor hsm connect")


@shown.command("pool")
def show_pool(broker: acting.Broker, *, as_json: render.AsJson = False) -> None:
    """Show how many key pairs are ready for launches."""
    answer: Any = _read(broker, "/v1/pool")
    render.table(
        answer["pools"],
        ("service", "profile", "ready"),
        key="pools",
        as_json=as_json,
        empty="no pools; they fill as launches come",
    )


@shown.command("audit")
def show_audit(broker: acting.Broker, *, as_json: render.AsJson = False) -> None:
    """Show the broker's log. `moor log export` takes it away with its proofs."""
    answer: Any = _read(broker, "/v1/audit")
    rows = answer.get("entries", [])
    render.table(rows, ("number", "at", "kind", "subject"), key="entries", as_json=as_json, empty="an empty log")


def _read(broker: Path, path: str) -> object:
    async def asked(client: HttpClient) -> object:
        return await client.get_json(path)

    return acting.at_broker(broker, asked)


def _table(broker: Path, what: str, columns: tuple[str, ...], *, as_json: bool, empty: str) -> None:
    answer: Any = _read(broker, f"/v1/{what}")
    render.table(answer[what], columns, key=what, as_json=as_json, empty=empty)
