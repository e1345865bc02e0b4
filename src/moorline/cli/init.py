"""`moor init`: write a service's commented settings file, and make what belongs to it. Nothing is ever overwritten.

Each command says what to do next. Keys that it makes are PEM files of mode 0600 in the directory it is given.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moorline.cli import acting, hsm_custody, init_founding, render
from moorline.cli.init_founding import Directory, Listen
from moorline.errors import Misconfigured
from moorline.nfv import Role

if TYPE_CHECKING:
    from moorline.cli.acting import BrokerFacts, Provider
    from moorline.hsm.token import TokenLocation
    from moorline.services.broker_settings import BrokerSettings
    from moorline.services.orchestrator_peers import NamedHost

app = typer.Typer(no_args_is_help=True)

Silicon = Annotated[Path, typer.Option(help="Socket of the machine's secure processor.")]


@app.callback()
def init() -> None:
    """Write commented settings and make what belongs to them; never overwrite."""


for founder in (init_founding.consortium, init_founding.authority, init_founding.provider):
    app.command()(founder)


@app.command()
def broker(  # noqa: PLR0913 - one parameter an option
    provider: acting.As,
    directory: Directory,
    sessions: Annotated[str, typer.Option(help="Where attested sessions are taken, address:port.")],
    https: Annotated[str, typer.Option(help="Where HTTPS is served, address:port.")],
    *,
    hsm: Annotated[str, typer.Option(help="The HSM's id.")] = "hsm-1",
    issuing_ca: Annotated[str, typer.Option(help="The issuing CA's id.")] = "ca-1",
    verifier: Annotated[
        str | None, typer.Option(help="The attestation authority, ID=ADDRESS:PORT; none without hosts.")
    ] = None,
    snp_anchors: Annotated[Path | None, typer.Option(help="SIMULATED anchors of processors.")] = None,
    minimum_tcb: Annotated[str | None, typer.Option(help="Least TCB of processors, such as 4,0,24,219.")] = None,
    pool: Annotated[list[str] | None, typer.Option(help="A service to make key pairs ahead for; may be repeated.")] = None,
    custodian: hsm_custody.Custodians = None,
    quorum: hsm_custody.Quorum = 2,
    as_json: render.AsJson = False,
) -> None:
    """Make a SoftHSM token with a provider's keys, the broker's settings, and what the provider must certify."""
    from moorline.cli import hsm_request
    from moorline.hsm.ceremony import initialise
    from moorline.services import settings

    acts = acting.provider(provider)
    if (directory / acting.BROKER_FILE).exists():
        raise Misconfigured(
            "cli.file_exists", "there is a broker here already", got=directory, remedy="choose another --dir"
        )
    token = directory / "token"
    with render.progress("making keys in the token"):
        made = initialise(token, label=acts.name, circle=hsm_custody.circle_of(custodian, quorum))
    judge = None if verifier is None else init_founding.pair(verifier, "--verifier")
    configured = replace(
        _broker_settings(acts, directory, made.location, hsm=hsm, issuing_ca=issuing_ca, doors=(sessions, https)),
        custody=token / "custody.cbor" if custodian else None,
        verifier=None if judge is None else judge[0],
        verifier_url=None if judge is None else f"https://{judge[1]}",
        snp_anchors=snp_anchors,
        snp_minimum_tcb=() if minimum_tcb is None else _numbers(minimum_tcb),
        pool_services=tuple(pool or ()),
    )
    asked = hsm_request.make(
        made.keys,
        provider=acts.name,
        trust_domain=acts.settings.trust_domain,
        hsm=hsm,
        issuing_ca=issuing_ca,
        sessions=sessions,
        https=https,
    )
    request = render.new_file(directory / hsm_request.FILE, asked.render())
    settings.write_commented(configured, directory / acting.BROKER_FILE, head=f"Broker of {acts.name}'s HSM {hsm}.")
    then = [f"moor hsm certify {request} --as {provider}", f"moor provider register hsm {request} --as {provider}"]
    assert made.location.pin_file is not None
    render.files([directory / acting.BROKER_FILE, request, made.location.pin_file], as_json=as_json, then=then)


@app.command()
def verifier(
    provider: acting.As,
    broker: acting.Broker,
    directory: Directory,
    listen: Listen,
    *,
    identifier: Annotated[str, typer.Option("--id", help="Its id.")] = "verifier-1",
    simulated_tpm_root: Annotated[list[Path] | None, typer.Option(help="Root of SIMULATED TPMs; may be repeated.")] = None,
    simulated_snp_root: Annotated[list[Path] | None, typer.Option(help="Anchors of SIMULATED processors.")] = None,
    as_json: render.AsJson = False,
) -> None:
    """Make an attestation authority's settings, and the keys that sign reference values and location tags."""
    from moorline.services import settings
    from moorline.services.verifier_settings import VerifierSettings

    acts, hsm = acting.provider(provider), acting.broker_facts(broker)
    simulated = bool(simulated_tpm_root or simulated_snp_root)
    signers = tuple(_signing_key(directory / f"{what}-signer.key.pem") for what in ("reference", "location"))
    configured = VerifierSettings(
        id=identifier,
        listen=listen,
        provider=acts.name,
        trust_domain=acts.settings.trust_domain,
        identity_chain=directory / "chain.pem",
        identity_key=directory / "key.pem",
        consortium_roots=acts.settings.roots,
        database=directory / "verifier.db",
        ledger_trust=acts.settings.trust,
        ledger_urls=_ledger_urls(acts),
        anchors=("vendor", "simulated") if simulated else ("vendor",),
        reference_values=(directory / "reference-values.cose",),
        reference_signers=signers,
        broker_url=f"https://{hsm.listen_https}",
        broker_name=_dns(hsm, Role.HSM, hsm.hsm),
        simulated_tpm_roots=tuple(simulated_tpm_root or ()),
        simulated_snp_roots=tuple(simulated_snp_root or ()),
    )
    file, signing_key = directory / "verifier.toml", directory / "reference-signer.key.pem"
    settings.write_commented(configured, file, head=f"Attestation authority {identifier} of {acts.name}.")
    render.files(
        [file, signing_key, directory / "location-signer.key.pem"],
        as_json=as_json,
        then=[
            f"moor hsm svid verifier {identifier} --broker {broker} --dir {directory}",
            f"moor verifier sign-reference-values FILE --key {signing_key} --output {configured.reference_values[0]}",
            f"moor verifier run --config {file}",
        ],
    )


@app.command()
def orchestrator(  # noqa: PLR0913 - one parameter an option
    provider: acting.As,
    broker: acting.Broker,
    directory: Directory,
    listen: Listen,
    launcher: Annotated[str, typer.Option(help="Where the launcher takes intents, address:port.")],
    package_signers: Annotated[Path, typer.Option(help="Certificates of publishers or their CAs (PEM).")],
    *,
    host: Annotated[list[str] | None, typer.Option(help=f"A host's agent, {init_founding.PAIR}; may be repeated.")] = None,
    identifier: Annotated[str, typer.Option("--id", help="Its id.")] = "orchestrator-1",
    as_json: render.AsJson = False,
) -> None:
    """Make an orchestrator's settings, its intent key, and the public key that signs the verifier's results."""
    from cryptography.hazmat.primitives import serialization

    from moorline.cli import hsm_request
    from moorline.services import settings
    from moorline.services.orchestrator import OrchestratorSettings
    from moorline.services.orchestrator_peers import Peer

    acts, hsm = acting.provider(provider), acting.broker_facts(broker)
    judge, judge_url = hsm.require_verifier()
    results_key = hsm_request.read(broker / hsm_request.FILE).keys().verifier
    pem = results_key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    verifier_key = render.new_file(directory / "verifier.pem", pem)
    public = _signing_key(directory / "intent.key.pem")
    configured = OrchestratorSettings(
        provider=acts.name,
        trust_domain=acts.settings.trust_domain,
        id=identifier,
        hsm=hsm.hsm,
        listen=listen,
        state=directory / "state",
        trust=acts.settings.trust,
        roots=acts.settings.roots,
        certificate_chain=directory / "chain.pem",
        private_key=directory / "key.pem",
        intent_key=directory / "intent.key.pem",
        launcher=launcher,
        package_signers=package_signers,
        verifier=Peer(url=judge_url, server_name=_dns(hsm, Role.VERIFIER, judge)),
        verifier_key=verifier_key,
        ledger=tuple(Peer(url=url, server_name=name) for url, name in acts.authorities()),
        hosts=tuple(_host(hsm, text) for text in host or ()),
    )
    file = directory / "orchestrator.toml"
    settings.write_commented(configured, file, head=f"Orchestrator {identifier} of {acts.name}.")
    render.files(
        [file, directory / "intent.key.pem", public],
        as_json=as_json,
        then=[
            f"moor hsm svid orchestrator {identifier} --broker {broker} --dir {directory}",
            f"moor provider register orchestrator {identifier} --key {public} --as {provider}",
            f"moor orchestrator run --config {file}",
        ],
    )


@app.command()
def operator(
    provider: acting.As,
    directory: Directory,
    orchestrator: Annotated[Path, typer.Option(help="The orchestrator's settings file.")],
    *,
    as_json: render.AsJson = False,
) -> None:
    """Make the settings with which a person uses the orchestrator (moor vnf)."""
    from moorline.cli.vnf import OperatorSettings
    from moorline.nfv import SpiffeId
    from moorline.services import settings
    from moorline.services.orchestrator import OrchestratorSettings
    from moorline.wire.certificates import dns_name

    acts = acting.provider(provider)
    asked = settings.load(OrchestratorSettings, orchestrator)
    name = dns_name(SpiffeId(trust_domain=asked.trust_domain, role=Role.ORCHESTRATOR, segments=(asked.id,)))
    configured = OperatorSettings(
        orchestrator_url=f"https://{asked.listen}",
        orchestrator_name=name,
        roots=acts.settings.roots,
        certificate_chain=directory / "chain.pem",
        private_key=directory / "key.pem",
    )
    file = directory / "operator.toml"
    settings.write_commented(configured, file, head=f"An operator of {acts.name}.")
    render.files(
        [file],
        as_json=as_json,
        then=[f"moor hsm svid operator NAME --broker DIR --dir {directory}", f"export MOOR_OPERATOR={file}"],
    )


@app.command()
def host(  # noqa: PLR0913 - one parameter an option
    provider: acting.As,
    broker: acting.Broker,
    directory: Directory,
    listen: Listen,
    silicon: Silicon,
    tcti: Annotated[str, typer.Option(help="Its TPM: swtpm:path=/path, device:/dev/tpmrm0.")],
    logs: Annotated[Path, typer.Option(help="Directory of its boot log and IMA list.")],
    *,
    identifier: Annotated[str, typer.Option("--id", help="Its id on the ledger.")],
    tag: Annotated[Path | None, typer.Option(help="Its signed location tag (moor host tag).")] = None,
    orchestrator: Annotated[str, typer.Option(help="Id of the orchestrator that may start guests here.")] = "orchestrator-1",
    as_json: render.AsJson = False,
) -> None:
    """Make the settings of a host's agent. It gets its identity by attesting; no key is made here."""
    from moorline.services import settings
    from moorline.services.host import HostSettings
    from moorline.services.host_attesting import AttestationSettings

    acts, hsm = acting.provider(provider), acting.broker_facts(broker)
    judge, judge_url = hsm.require_verifier()
    configured = HostSettings(
        provider=acts.name,
        trust_domain=acts.settings.trust_domain,
        id=identifier,
        listen=listen,
        state=directory / "state",
        silicon=f"unix:{silicon.absolute()}",
        orchestrator=orchestrator,
        roots=acts.settings.roots,
        certificate_chain=None,
        private_key=None,
        broker=hsm.listen_sessions,
        hsm=hsm.hsm,
        trust=acts.settings.trust,
        ledger_urls=_ledger_urls(acts),
        attestation=AttestationSettings(
            tcti=_absolute(tcti),
            verifier_url=judge_url,
            verifier_name=_dns(hsm, Role.VERIFIER, judge),
            event_log=logs / "event_log.bin",
            ima=logs / "ima.txt",
            tag=tag,
        ),
        status_socket=directory / "status.sock",
    )
    file = directory / "host.toml"
    settings.write_commented(configured, file, head=f"Agent of host {identifier} of {acts.name}.")
    render.files([file], as_json=as_json, then=[f"moor host run --config {file}"])


@app.command()
def launcher(
    provider: acting.As,
    broker: acting.Broker,
    directory: Directory,
    listen: Listen,
    silicon: Silicon,
    *,
    identifier: Annotated[str, typer.Option("--id", help="The guest's name.")] = "launcher-1",
    as_json: render.AsJson = False,
) -> None:
    """Make the settings of the launcher enclave's parent process."""
    from moorline.services import settings
    from moorline.services.launcher_parent import LauncherSettings

    acts, hsm = acting.provider(provider), acting.broker_facts(broker)
    configured = LauncherSettings(
        provider=acts.name,
        hsm=hsm.hsm,
        name=identifier,
        listen=listen,
        state=directory / "state",
        silicon=f"unix:{silicon.absolute()}",
        broker=hsm.listen_sessions,
        ticket=directory / "ticket.cose",
        trust=acts.settings.trust,
        status_socket=directory / "status.sock",
    )
    file = directory / "launcher.toml"
    settings.write_commented(configured, file, head=f"Launcher of {acts.name}.")
    render.files(
        [file],
        as_json=as_json,
        then=[
            f"moor launcher ticket --as {provider} --chip DIR --output {configured.ticket}",
            f"moor launcher run --config {file}",
        ],
    )


@app.command()
def silicon(
    directory: Directory,
    chip: Annotated[Path, typer.Option(help="Directory of its SIMULATED chip (moor simulate manufacturer).")],
    *,
    as_json: render.AsJson = False,
) -> None:
    """Make the settings of a SIMULATED secure processor; its socket is silicon.sock in its directory."""
    from moorline.services import settings
    from moorline.services.silicon import SiliconSettings

    configured = SiliconSettings(listen=directory / "silicon.sock", chip=chip, state=directory / "state")
    file = directory / "silicon.toml"
    settings.write_commented(configured, file, head="A SIMULATED secure processor.")
    render.files([file], as_json=as_json, then=[f"moor simulate silicon --config {file}"])


def _broker_settings(
    acts: Provider, directory: Path, token: TokenLocation, *, hsm: str, issuing_ca: str, doors: tuple[str, str]
) -> BrokerSettings:
    """A broker's settings as far as they follow from its provider, its directory and its token; `doors`: sessions, HTTPS."""
    from moorline.services.broker_settings import BrokerSettings

    return BrokerSettings(
        provider=acts.name,
        trust_domain=acts.settings.trust_domain,
        hsm=hsm,
        issuing_ca=issuing_ca,
        token_module=token.module,
        token_label=token.label,
        token_pin_file=token.pin_file,
        softhsm_conf=directory / "token" / "softhsm2.conf",
        database=directory / "broker.db",
        ledger_trust=acts.settings.trust,
        ledger_urls=_ledger_urls(acts),
        roots=acts.settings.roots,
        hsm_certificate=directory / "hsm.pem",
        issuing_ca_certificate=directory / "issuing-ca.pem",
        authority_certificates=directory / "chain.pem",
        listen_sessions=doors[0],
        listen_https=doors[1],
        admin_socket=directory / "admin.sock",
    )


def _signing_key(path: Path) -> Path:
    """A new P-256 key in `path` (0600), and its public half beside it, which is returned."""
    from cryptography.hazmat.primitives import serialization

    from moorline.hsm.provider import make_provider_key

    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    public = make_provider_key(path).public_key()
    beside = path.with_name(path.name.replace(".key.pem", ".pub.pem"))
    pem = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return render.new_file(beside, pem)


def _ledger_urls(acts: Provider) -> tuple[str, ...]:
    return tuple(f"{url}|{name}" for url, name in acts.authorities())


def _dns(hsm: BrokerFacts, role: Role, identifier: str) -> str:
    from moorline.nfv import SpiffeId
    from moorline.wire.certificates import dns_name

    return dns_name(SpiffeId(trust_domain=hsm.trust_domain, role=role, segments=(identifier,)))


def _host(hsm: BrokerFacts, text: str) -> NamedHost:
    from moorline.services.orchestrator_peers import NamedHost

    name, address = init_founding.pair(text, "--host")
    return NamedHost(id=name, url=f"https://{address}", server_name=_dns(hsm, Role.HOST, name))


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter("numbers with commas between them", param_hint="--minimum-tcb") from None


def _absolute(tcti: str) -> str:
    """A swtpm's socket, by its whole path: the service's working directory is its own business."""
    prefix, separator, path = tcti.partition("path=")
    return f"{prefix}path={Path(path).absolute()}" if separator else tcti
