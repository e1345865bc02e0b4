"""A device's connection to a function with keys from its home HSM, without forward secrecy (PROTOCOLS.md 7).

The home HSM checks contract, service and function's HSM on the ledger for the device, which only has to know its home:
by TLS name and chain, under the device's own certificate. The keys come sealed to a KEM key made for this one request.
"""

from __future__ import annotations

import secrets

from moorline.channel import nopfs
from moorline.channel.driver import new_kem
from moorline.channel.session import open_sealed
from moorline.clock import Clock
from moorline.device import tls_key
from moorline.device.connection import Wanted
from moorline.device.enrolment import client_identity, roots_pem
from moorline.device.store import DeviceStore
from moorline.errors import NotAuthentic
from moorline.nfv import Role, SpiffeId
from moorline.verification.chains import verify_chain
from moorline.wire import schema
from moorline.wire.http import CBOR_TYPE, HttpClient
from moorline.wire.nopfs import NONCE, VERSION, DeviceKeyRequest, DeviceKeys, NoPfsHello, NoPfsOffer, sealing_info


async def connect(
    store: DeviceStore, address: str, wanted: Wanted, *, clock: Clock, deadline_s: float = 10.0
) -> nopfs.NoPfsConnection:
    """A connection to the wanted function at `address`; the caller closes it.

    Raises NotAuthentic("device.other_function"), `peer.*`, `nopfs.*`, and what the home HSM or the function report.
    """
    await tls_key.ensure(store, clock.now())
    trust, identity, home = store.trust(), store.identity(), store.home()
    own = verify_chain(identity.chain[0], identity.chain[1:], trust.roots, clock.now())
    hello = NoPfsHello(
        version=VERSION,
        device=str(own.spiffe_id),
        home_provider=own.provider_name,
        home_hsm=_hsm_of(home.server_name),
        contract=wanted.contract,
        nonce=secrets.token_bytes(NONCE),
    )

    async def fetch(hello: NoPfsHello, offer: NoPfsOffer) -> DeviceKeys:
        if (offer.provider, offer.service) != (wanted.provider, wanted.service):
            raise NotAuthentic(
                "device.other_function",
                "another function answers there",
                expected=f"{wanted.service} of {wanted.provider}",
                got=f"{offer.service} of {offer.provider}",
            )
        kem = new_kem()
        body = schema.encode(
            DeviceKeyRequest(
                function_provider=offer.provider,
                function_hsm=offer.hsm,
                service=offer.service,
                contract=hello.contract,
                pair_epoch=offer.pair_epoch,
                device_nonce=hello.nonce,
                function_nonce=offer.nonce,
                kem_public=kem.public,
            )
        )
        shown = client_identity(identity)
        async with HttpClient(home.url, server_name=home.server_name, roots_pem=roots_pem(trust), identity=shown) as client:
            sealed = await client.send("POST", "/v1/device-keys", content=body, headers={"content-type": CBOR_TYPE})
        return schema.decode(DeviceKeys, open_sealed(kem, sealed, info=sealing_info(body)))

    return await nopfs.connect(address, hello=hello, fetch=fetch, clock=clock, deadline_s=deadline_s)


def _hsm_of(server_name: str) -> str:
    """The HSM's id out of its DNS name (wire.certificates.dns_name)."""
    hsm, _, rest = server_name.partition(f".{Role.HSM}.")
    return SpiffeId(trust_domain=rest, role=Role.HSM, segments=(hsm,)).segments[0]
