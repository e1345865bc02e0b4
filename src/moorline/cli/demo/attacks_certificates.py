"""Attacks by a provider of the consortium that turned rogue: beta certifies what it should not.

The function under attack serves beta's devices under contract. Control: a device certified by the same CA, inside beta's own
trust domain, once that CA is on the ledger.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from moorline.channel.tls import TlsIdentity
from moorline.cli.demo import federating
from moorline.cli.demo.attack_tools import Outcome, once, refused_with
from moorline.cli.demo.world import World, der, now
from moorline.clock import Instant, Validity
from moorline.device.store import DeviceStore
from moorline.ledger import standing
from moorline.ledger import transactions as tx
from moorline.nfv import Role, SpiffeId
from moorline.wire import certificates
from moorline.wire.certificates import Issuer

CA: Final = "ca-rogue"
_DEVICE: Final = "intruder"
_LIFE_S: Final = 1800


@dataclass(frozen=True, slots=True, kw_only=True)
class _Raid:
    """What the function said to a device of a CA nobody registered, and to the same once it was registered."""

    issuer: Issuer
    unregistered: str | None
    registered: str | None


async def issuing_ca_not_registered(world: World) -> Outcome:
    """A CA that beta certified and did not put on the ledger certifies a device of beta."""
    raid = await _raid(world)
    return Outcome(
        code=raid.unregistered,
        control=raid.registered is None,
        says="the same certificate is let in once its CA is on the ledger",
    )


async def certificate_outside_name_constraint(world: World) -> Outcome:
    """The same CA, registered now, certifies a device of alpha."""
    raid = await _raid(world)
    code = await _let_in(world, raid.issuer, "alpha.test")
    await world.beta.submitter.send(tx.RevokeIssuingCa(id=CA))
    return Outcome(
        code=code, control=raid.registered is None, says="the same CA's certificate for a device of beta itself is let in"
    )


async def _raid(world: World) -> _Raid:
    async def act() -> _Raid:
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = certificates.issuing_ca_certificate(
            key.public_key(), name=CA, issuer=world.beta.issuer, validity=_life(), serial=secrets.randbits(120)
        )
        issuer = Issuer(certificate=certificate, key=key)
        await federating.enrol(
            world, _DEVICE
        )  # beta's HSM speaks for certificates that it made: the rogue has one of those too
        unregistered = await _let_in(world, issuer, world.beta.trust_domain)
        await world.beta.submitter.send(tx.RegisterIssuingCa(id=CA, certificate=der(certificate)))
        registered = await _let_in(world, issuer, world.beta.trust_domain)
        return _Raid(issuer=issuer, unregistered=unregistered, registered=registered)

    return await once(world, "rogue CA", act)


async def _let_in(world: World, issuer: Issuer, trust_domain: str) -> str | None:
    """The code with which alpha's function refuses a device certified by `issuer`; None if it stored and read a record."""
    key = ec.generate_private_key(ec.SECP256R1())
    leaf = certificates.leaf_certificate(
        key.public_key(),
        spiffe_id=SpiffeId(trust_domain=trust_domain, role=Role.DEVICE, segments=(_DEVICE,)),
        issuer=issuer,
        validity=_life(),
        serial=secrets.randbits(120),
    )
    chain: tuple[x509.Certificate, ...] = (leaf, issuer.certificate, world.beta.certificate, world.beta.authority)
    wanted = standing.device_keys(provider="beta", issuing_ca=CA, device=_DEVICE, serial=leaf.serial_number)

    async def bundle() -> bytes:
        return await world.ledger.prove(wanted)

    shown = TlsIdentity(key=key, chain=tuple(map(der, chain)))
    enrolled = DeviceStore(directory=federating.device_directory(world, _DEVICE)).identity()
    return await refused_with(federating.visit(world, shown, bundle, at_home=enrolled))


def _life() -> Validity:
    return Validity(not_before=Instant(now() - 60), not_after=Instant(now() + _LIFE_S))
