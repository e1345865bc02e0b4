"""The attacks: each against the real interface of a running process, each with the same request unharmed as its control.

An attempt returns the code the victim answered with, not what anybody hoped for.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import io
import secrets
import ssl
import zipfile
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from moorline.attesters.tpm import Tpm
from moorline.channel.messages import pack, reported, unpack_any
from moorline.cli.demo import federating, founding, hosting, operating
from moorline.cli.demo.attack_tools import Minted, Outcome, collect, mint, order_of, refused_with, tried
from moorline.cli.demo.world import HSM, VERIFIER, World, der, free_addresses, now
from moorline.clock import Instant, Validity
from moorline.host_agent.attestation import FileLogs, HostAttestation
from moorline.hsm import ceremony as hsm_ceremony
from moorline.hsm.provider import certify_hsm
from moorline.ledger import transactions as tx
from moorline.nfv import Role
from moorline.orchestration.descriptor import FUNCTION_FILE
from moorline.rats import Outcome as RuleOutcome
from moorline.rats import Tier
from moorline.services import settings
from moorline.simulators import firmware
from moorline.wire import frames, keys, schema
from moorline.wire import host as host_wire
from moorline.wire.http import HttpClient
from moorline.wire.launch import ChannelProfile
from moorline.wire.session import EvidenceFormat, Hello, Problem, SessionRole

# Ledger and HSMs -------------------------------------------------------------------------------------------------------


async def provider_not_admitted(world: World) -> Outcome:
    """Mallory has keys, a token and a certificate, and registers an HSM; nobody admitted it. Control: beta does the same."""

    async def register(name: str) -> str | None:
        provider = founding.stranger(world, name) if name == "mallory" else world.providers[name]
        made = await asyncio.to_thread(
            hsm_ceremony.initialise, world.stage.path("attacker", f"token-{name}"), label=f"{name}-second"
        )
        life = Validity(not_before=Instant(now() - 60), not_after=Instant(now() + 3600))
        certificates = certify_hsm(
            provider.issuer,
            made.keys,
            trust_domain=provider.trust_domain,
            hsm="hsm-2",
            issuing_ca="ca-2",
            address=provider.sessions,
            validity=life,
            serials=(secrets.randbits(120), secrets.randbits(120)),
        )
        return await refused_with(
            provider.submitter.send(
                tx.RegisterHsm(
                    id="hsm-2",
                    certificate=der(certificates.hsm),
                    address=provider.sessions,
                    est_url=f"https://{provider.https}/.well-known/est",
                    kem_public=made.keys.kem,
                    signing_public=keys.public_bytes(made.keys.identity),
                    bundle_sequence=1,
                )
            )
        )

    code = await register("mallory")
    control = await register("beta") is None
    return Outcome(code=code, control=control, says="beta's second HSM was registered by the same request")


async def oversized_message(world: World) -> Outcome:
    """A client of alpha's session port announces a hello of 64 MiB. Control: the same hello, announced as long as it is."""
    hello = pack(
        Hello(
            version=1,
            role=SessionRole.FUNCTION,
            formats=(EvidenceFormat.SNP,),
            kem_public=ec.generate_private_key(ec.SECP256R1())
            .public_key()
            .public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint),
            signing_public=keys.public_bytes(ec.generate_private_key(ec.SECP256R1()).public_key()),
            profile=ChannelProfile.TLS,
            fields=b"",
        )
    )
    kind, code = await _answer_to(world, (64 << 20).to_bytes(frames.HEADER, "big") + hello)
    ordinary, _ = await _answer_to(world, frames.frame(hello))
    return Outcome(
        code=code if kind == "problem" else None,
        control=ordinary == "challenge",
        says=f"the next client's hello is answered with a {ordinary}",
    )


async def _answer_to(world: World, first_bytes: bytes) -> tuple[str, str | None]:
    """The kind of message the broker answers with over its session port, and the code if it is a problem."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=world.roots_pem.decode())
    host, _, port = world.alpha.sessions.rpartition(":")
    reader, writer = await asyncio.open_connection(
        host, int(port), ssl=context, server_hostname=world.alpha.name_of(Role.HSM, HSM)
    )
    try:
        writer.write(first_bytes)
        await writer.drain()
        kind, item = unpack_any(await frames.read_frame(reader, deadline_s=10.0))
    finally:
        writer.close()
    return kind, reported(schema.from_item(Problem, item).problem).code if kind == "problem" else None


# Hosts -----------------------------------------------------------------------------------------------------------------


async def host_kernel_changed(world: World) -> Outcome:
    """h2 booted another kernel and attests with it. Control: h1, booted with the good one."""
    changed = await hosting.verdict(world, "h2")
    good = await hosting.verdict(world, "h1")
    broken = [finding.code for finding in changed.findings if finding.outcome is RuleOutcome.NOT_MET]
    first = changed.first_refusal()
    return Outcome(
        code=None if first is None or changed.status is Tier.AFFIRMING else first.code,
        control=good.status is Tier.AFFIRMING,
        says=f"h1 is {good.status.word}; rules h2 broke: {', '.join(broken)}",
    )


async def quote_replayed(world: World) -> Outcome:
    """h4's administrator answers a new challenge with h4's last evidence. Control: it answered its own challenge well."""
    one = hosting.host(world, "h4")
    assert one.tpm is not None
    async with Overheard(
        f"https://{world.facts['verifier_address']}",
        server_name=world.alpha.name_of(Role.VERIFIER, VERIFIER),
        roots_pem=world.roots_pem,
    ) as client:
        tpm = await asyncio.to_thread(Tpm.open, one.tpm.tcti)
        try:
            attestation = HostAttestation(
                host="h4",
                verifier=client,
                tpm=tpm,
                logs=FileLogs(
                    events=one.directory / "logs" / firmware.EVENT_LOG, ima=one.directory / "logs" / firmware.IMA_LIST
                ),
                tag=one.tag,
                period_s=hosting.PERIOD_S,
            )
            await attestation.enrol()
            before = await attestation.attest()
            old = client.sent["/v1/hosts/h4/evidence"]
            await client.post_cbor("/v1/hosts/h4/challenge", schema.encode(host_wire.ChallengeRequest(host="h4")))
            code = await refused_with(client.post_cbor("/v1/hosts/h4/evidence", old))
        finally:
            await asyncio.to_thread(tpm.close)
    return Outcome(
        code=code,
        control=before.status == Tier.AFFIRMING.word,
        says="the very same bytes were accepted in answer to the challenge they were made for",
    )


class Overheard(HttpClient):
    """A client that remembers what was sent, as the administrator of a host can."""

    def __init__(self, base_url: str, *, server_name: str, roots_pem: bytes) -> None:
        super().__init__(base_url, server_name=server_name, roots_pem=roots_pem)
        self.sent: dict[str, bytes] = {}

    async def post_cbor(self, path: str, body: bytes) -> bytes:
        """Send and remember."""
        self.sent[path] = body
        return await super().post_cbor(path, body)


async def simulated_root_in_production(world: World) -> Outcome:
    """Evidence of simulated silicon for a verifier under the shipped production configuration. Control: alpha's own."""
    report_data = secrets.token_bytes(64)
    outblob, auxblob = await collect(world, "h1", report_data=report_data)
    request = {
        "format": "snp",
        "evidence": base64.b64encode(outblob).decode(),
        "endorsements": base64.b64encode(auxblob).decode(),
        "report_data": report_data.hex(),
    }
    address = await _start_production_verifier(world)
    code = await refused_with(_appraise(world, address, request))
    control = await refused_with(_appraise(world, world.facts["verifier_address"], request))
    return Outcome(code=code, control=control is None, says="alpha's own verifier, told of the simulated root, accepts it")


async def _appraise(world: World, address: str, request: dict[str, str]) -> object:
    async with HttpClient(
        f"https://{address}",
        server_name=world.alpha.name_of(Role.VERIFIER, VERIFIER),
        roots_pem=world.roots_pem,
        identity=world.facts["operator"],
    ) as client:
        return await client.post_json("/v1/appraise", request)


async def _start_production_verifier(world: World) -> str:
    """A second verifier process under the policy that ships for production; from ours it has name, identity and ledger."""
    directory = world.stage.path("alpha", "verifier-production")
    ours = hosting.verifier_settings(world, world.stage.directory / "alpha" / "verifier")
    theirs = dataclasses.replace(ours, listen=free_addresses(1)[0], database=directory / "verifier.db")
    settings.write(theirs, directory / "verifier.toml")
    process = await world.stage.start(
        "verifier-production", "verifier", "run", "--config", str(directory / "verifier.toml"), "--production"
    )
    return process.address


# Packages --------------------------------------------------------------------------------------------------------------


async def package_tampered(world: World) -> Outcome:
    """One file of the signed package is changed. Control: the package as it was."""
    original: bytes = world.facts["csar"]
    changed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(original)) as before, zipfile.ZipFile(changed, "w", zipfile.ZIP_DEFLATED) as after:
        for entry in before.infolist():
            data = before.read(entry)
            after.writestr(entry, data + b"\n# and this" if entry.filename == FUNCTION_FILE else data)
    code = await refused_with(operating.onboard(world, changed.getvalue()))
    control = await refused_with(operating.onboard(world, original))
    return Outcome(code=code, control=control is None, says="the unchanged package is taken")


async def package_signed_by_stranger(world: World) -> Outcome:
    """The same content under another key of the same name. Control: under the publisher's."""
    code = await refused_with(operating.onboard(world, await asyncio.to_thread(operating.signed_by_stranger)))
    control = await refused_with(operating.onboard(world, world.facts["csar"]))
    return Outcome(code=code, control=control is None, says="the publisher's own signature is taken")


# Launches: the administrator of h1, who has root, the silicon's socket and everything the host was ever given -------------


async def rogue_vnf_without_token(world: World) -> Outcome:
    """The genuine function, genuine fields and commitment, but a token nobody minted. Control: the minted token."""
    minted = await mint(world, "records-rogue")
    world.facts["minted"] = minted
    guessed = dataclasses.replace(minted, token=secrets.token_bytes(32))
    code = await tried(world, order_of(world, guessed, "rogue-1"))
    control = await tried(world, order_of(world, minted, "rogue-2"))
    return Outcome(code=code, control=control is None, says="with the minted token the same guest gets its identity")


async def token_replayed(world: World) -> Outcome:
    """A second guest with a token that was used. Control: its first use, which succeeded; and the broker raised an alarm."""
    minted: Minted = world.facts["minted"]
    code = await tried(world, order_of(world, minted, "replay-1"))
    async with world.alpha.admin() as admin:
        alarms: Any = await admin.get_json("/v1/alarms")
        launches: Any = await admin.get_json("/v1/launches")
    used = [one for one in launches["launches"] if one["instance"] == minted.fields.instance and one["state"] == "confirmed"]
    raised = [alarm for alarm in alarms["alarms"] if alarm["code"] == code and alarm["first"] and alarm["second"]]
    says = f"alarm {raised[0]['id']} names both sessions" if raised else "NO ALARM was raised"
    return Outcome(code=code if raised else None, control=len(used) == 1, says=says)


# Devices ---------------------------------------------------------------------------------------------------------------


async def device_before_contract(world: World) -> Outcome:
    """A device of beta, properly enrolled, while alpha has granted beta nothing. The control comes after the contract."""
    await federating.enrol(world, "device-0")
    code = await refused_with(federating.store_and_read(world, "device-0"))
    world.facts["ungranted"] = code
    return Outcome(code=code, control=False, says="waiting for its control", unfinished=True)


async def device_after_contract(world: World) -> Outcome:
    """The same device and request once the contract is in force."""
    control = await refused_with(federating.store_and_read(world, "device-0"))
    return Outcome(
        code=world.facts["ungranted"],
        control=control is None,
        says="the same device is let in once the contract is accepted",
    )
