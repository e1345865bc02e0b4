"""The provider's own door: a unix socket that only the broker's user can open. Whoever can, is the provider.

Requests are small JSON objects with exactly the fields of their dataclass.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import dataclasses
import hashlib
from collections.abc import Callable
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field

from moorline.audit.log import LogEntry, entry_digest
from moorline.errors import Malformed
from moorline.hsm import lifecycle
from moorline.hsm.keys import KEM
from moorline.hsm.lifecycle import Use
from moorline.hsm.token.inspection import report_of
from moorline.nfv import Role, SpiffeId, parse_name
from moorline.services import (
    broker_admin_audit,
    broker_admin_devices,
    broker_admin_keys,
    broker_admin_tenants,
    broker_enrolment,
    broker_explain,
    broker_peers,
    http,
    metrics,
)
from moorline.services.broker import Broker
from moorline.services.broker_revocation import Lists
from moorline.services.broker_role import issued
from moorline.services.broker_tenants import OpenTenants
from moorline.wire import keys, schema
from moorline.wire.est import csr_key
from moorline.wire.launch import identity_name

_CODE_MAX_S: Final = 7 * 24 * 3600


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class SvidRequest(_Request):
    """Either `public_key` (base64 DER) or `csr` (PEM), and the name to certify."""

    spiffe_id: str
    public_key: str | None = None
    csr: str | None = None


class CodeRequest(_Request):
    """A one-time enrolment code for a device."""

    device: str
    ttl_s: int = Field(default=600, gt=0, le=_CODE_MAX_S)


class LauncherRequest(_Request):
    """A launcher by its id in hex."""

    launcher: str


class PeerRequest(_Request):
    """A registered HSM of another provider; `rotate` begins a new pair epoch with it."""

    provider: str
    hsm: str
    rotate: bool = False


async def serve(broker: Broker, lists: Lists, tenants: OpenTenants | None, bound: Callable[[str], None]) -> None:
    """Serve the admin socket until cancelled."""
    listen = f"unix:{broker.settings.admin_socket}"
    await http.serve(application(broker, lists, tenants), listen=listen, identity=None, client_roots_pem=None, ready=bound)


def application(broker: Broker, lists: Lists, tenants: OpenTenants | None = None) -> FastAPI:
    """All admin routes."""
    app = http.application("broker-admin", ready=lambda: metrics.why_broker_not_ready(broker))
    metrics.of_broker(app, broker)
    _issuing_routes(app, broker)
    _launch_routes(app, broker)
    _reading_routes(app, broker)
    broker_admin_audit.add_routes(app, broker)
    broker_explain.add_routes(app, broker)
    broker_admin_devices.add_routes(app, broker, lists)
    broker_admin_keys.add_routes(app, broker)
    broker_admin_tenants.add_routes(app, broker, tenants)
    return app


def _issuing_routes(app: FastAPI, broker: Broker) -> None:
    @app.post("/v1/svid")
    async def svid(asked: SvidRequest) -> dict[str, object]:
        """Certify a key of this provider's own services, operators and hosts."""
        return await asyncio.to_thread(_issue, broker, asked)

    @app.post("/v1/enrolment-codes")
    async def enrolment_code(asked: CodeRequest) -> dict[str, object]:
        """A code; an earlier one of the device is void."""
        return await asyncio.to_thread(_code, broker, asked)

    @app.post("/v1/peers/connect")
    async def connect(asked: PeerRequest) -> dict[str, object]:
        """Exchange trust bundles with a peer HSM, and agree on a pair key if there is none, or to rotate."""
        peer = await broker_peers.connect(broker, asked.provider, asked.hsm, rotate=asked.rotate)
        return {
            "provider": peer.provider,
            "hsm": peer.hsm,
            "transcript": peer.transcript.hex(),
            "sequence": peer.sequence,
            "at": peer.at,
        }


def _launch_routes(app: FastAPI, broker: Broker) -> None:
    @app.post("/v1/epochs")
    async def epochs() -> dict[str, int]:
        """Close the running epoch with grace and open the next; ends a halt."""
        opened = await asyncio.to_thread(broker.launch_keys.open_epoch, broker.clock.now())
        return {"epoch": opened.epoch, "not_after": opened.not_after}

    @app.post("/v1/clock")
    async def clock() -> dict[str, int]:
        """Accept this machine's clock though a later time was seen; leases and epochs end, and the next epoch is opened."""
        opened = await asyncio.to_thread(broker.launch_keys.accept_clock, broker.clock.machine_now())
        await asyncio.to_thread(broker.clock.mark)
        return {"epoch": opened.epoch, "not_after": opened.not_after, "now": broker.clock.now()}

    @app.post("/v1/launchers/revoke")
    async def revoke(asked: LauncherRequest) -> dict[str, int]:
        """Void a launcher, and its epoch without grace."""
        try:
            launcher = bytes.fromhex(asked.launcher)
        except ValueError:
            raise Malformed("broker.request_malformed", "a launcher id is hex", got=asked.launcher) from None
        opened = await asyncio.to_thread(broker.launch_keys.revoke_launcher, launcher, broker.clock.now())
        return {"epoch": opened.epoch, "not_after": opened.not_after}

    @app.get("/v1/launches")
    async def launches() -> dict[str, list[dict[str, object]]]:
        """The latest launches, newest first."""
        return {"launches": await asyncio.to_thread(_launches, broker)}

    @app.get("/v1/instances")
    async def instances() -> dict[str, list[dict[str, object]]]:
        """The latest generations of instances: where they run, whether they live, and what became of their identity."""
        return {"instances": await asyncio.to_thread(_instances, broker)}

    @app.get("/v1/pool")
    async def pool() -> dict[str, list[dict[str, object]]]:
        """The fill of the pools."""
        filled = await asyncio.to_thread(broker.store.pools)
        return {"pools": [{"service": name, "profile": p, "ready": n} for (name, p), n in filled.items()]}


def _reading_routes(app: FastAPI, broker: Broker) -> None:
    @app.get("/v1/keys")
    async def public() -> dict[str, str]:
        """The public halves of the keys in force; what relying parties are to know of the verifier keys; the certificate."""
        return await asyncio.to_thread(_keys_in_force, broker)

    @app.get("/v1/token")
    async def token() -> dict[str, object]:
        """The token: health, keys and their roles, what it lacks and what follows from that."""
        return dataclasses.asdict(await asyncio.to_thread(report_of, broker.token.inner))

    @app.get("/v1/alarms")
    async def alarms() -> dict[str, list[dict[str, object]]]:
        """What a person must look at, newest first."""
        found = await asyncio.to_thread(broker.store.alarms)
        return {
            "alarms": [
                {"id": a.alarm, "at": a.at, "code": a.code, "says": a.says, "first": a.first, "second": a.second}
                for a in found
            ]
        }

    @app.get("/v1/peers")
    async def peers() -> dict[str, list[dict[str, object]]]:
        """Peers whose trust bundles are kept."""
        found = await asyncio.to_thread(broker.store.peers)
        return {
            "peers": [
                {
                    "provider": p.provider,
                    "hsm": p.hsm,
                    "at": p.at,
                    "sequence": p.sequence,
                    "transcript": p.transcript.hex(),
                    "bundle_digest": hashlib.sha256(p.bundle).hexdigest(),
                }
                for p in found
            ]
        }

    @app.get("/v1/audit")
    async def audit(first: int = 0) -> dict[str, list[dict[str, object]]]:
        """Audit entries from `first` on, at most 1000."""
        found = await asyncio.to_thread(broker.store.audit, first=max(0, first))
        return {"entries": [_entry(data) for data in found]}


def _keys_in_force(broker: Broker) -> dict[str, str]:
    identity, ca = broker.identity.issuer.certificate, broker.ca.issuers.held()[0].certificate
    kem = lifecycle.usable(broker.hsm.key_rows(KEM), KEM, Use.NEW) or (KEM,)
    return {
        "identity": _b64(_public_of(identity)),
        "issuing_ca": _b64(_public_of(ca)),
        "verifier": _b64(keys.public_bytes(broker.verifier.accepted()[0])),
        "kem": _b64(broker.token.ec_point(kem[0])),
        "verifier_pem": "".join(_pem(key) for key in broker.verifier.announced()),
        "hsm_certificate": identity.public_bytes(serialization.Encoding.PEM).decode("ascii"),
    }


def _public_of(certificate: x509.Certificate) -> bytes:
    spki = serialization.PublicFormat.SubjectPublicKeyInfo
    return certificate.public_key().public_bytes(serialization.Encoding.DER, spki)


def _pem(key: keys.PublicKey) -> str:
    spki = serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_bytes(serialization.Encoding.PEM, spki).decode("ascii")


def _issue(broker: Broker, asked: SvidRequest) -> dict[str, object]:
    spiffe_id = SpiffeId.parse(asked.spiffe_id)
    if (asked.public_key is None) == (asked.csr is None):
        raise Malformed("broker.request_malformed", "a request has either public_key or csr")
    public = _public_key(asked.public_key) if asked.public_key is not None else _key_of_csr(asked.csr or "")
    # Functions get their identity by launch and attestation only; nobody can ask for one here.
    if spiffe_id.role is Role.SERVICE:
        raise Malformed("broker.request_malformed", "identities of functions come from launches", got=asked.spiffe_id)
    now = broker.clock.now()
    own = keys.public_bytes(public)
    leaf = broker.ca.issue(own, spiffe_id, now)
    broker.store.record_certificate(issued(leaf, spiffe_id, own), kind="svid-issued", at=now)
    pem = leaf.certificate.public_bytes(serialization.Encoding.PEM).decode("ascii")
    return {"certificate": pem, "chain": leaf.pem_chain().decode("ascii"), "not_after": leaf.not_after}


def _code(broker: Broker, asked: CodeRequest) -> dict[str, object]:
    device = parse_name(asked.device, "device")
    code, not_after = broker_enrolment.new_code(broker, device, ttl_s=asked.ttl_s)
    return {"code": code, "user": device, "not_after": not_after}


def _launches(broker: Broker) -> list[dict[str, object]]:
    td = broker.settings.trust_domain
    return [
        {
            "service": row.launch.service,
            "instance": row.launch.instance,
            "generation": row.launch.generation,
            "tenant": row.launch.tenant,
            "channel": row.launch.profile,
            "host": row.launch.host,
            "launcher": row.launch.launcher.hex(),
            "epoch": row.launch.epoch,
            "sequence": row.launch.sequence,
            "session": row.launch.session,
            "state": row.state,
            "at": row.at,
            "spiffe_id": f"spiffe://{td}/{Role.SERVICE}/{row.launch.service}/"
            + identity_name(row.launch.instance, row.launch.generation),
        }
        for row in broker.store.launches()
    ]


def _instances(broker: Broker) -> list[dict[str, object]]:
    return [
        {
            "instance": one.instance,
            "generation": one.generation,
            "id": one.identity,
            "service": one.service,
            "host": one.host,
            "state": one.state,
            "code": one.code,
            "destroyed": [what for what in one.destroyed.split(",") if what],
            "revoked_at_height": None if revocation is None else revocation.height,
            "at": one.at,
        }
        for one, revocation in broker.instances.rows()
    ]


def _public_key(text: str) -> keys.PublicKey:
    try:
        return keys.parse_public(base64.b64decode(text, validate=True))
    except binascii.Error:
        raise Malformed("broker.request_malformed", "public_key is not base64") from None


def _key_of_csr(pem: str) -> keys.PublicKey:
    try:
        der = x509.load_pem_x509_csr(pem.encode()).public_bytes(serialization.Encoding.DER)
    except Exception as error:  # the loader raises ValueError and others on odd text
        raise Malformed("est.csr_malformed", "the text is not a PKCS#10 request", got=type(error).__name__) from None
    return csr_key(der)


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _entry(data: bytes) -> dict[str, object]:
    entry = schema.decode(LogEntry, data)
    return {
        "number": entry.number,
        "at": entry.time,
        "kind": entry.event,
        "subject": entry.subject,
        "body": entry.details,
        "digest": entry_digest(data).hex(),
    }
