"""The tenants of the broker's HSM: their doors are open while the broker runs, and its people look after them."""

from __future__ import annotations

from dataclasses import dataclass

import structlog

from moorline.errors import Misconfigured
from moorline.hsm.tenants import VirtualHsm
from moorline.hsm.token import LocalToken
from moorline.hsm.token.owner import Owner
from moorline.services.broker import Broker


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenTenants:
    """A virtual HSM and the process's doors."""

    virtual: VirtualHsm
    owner: Owner

    def close(self) -> None:
        """Shut the doors; tenants stay what they are."""
        self.virtual.close()
        self.owner.close()


def open_tenants(broker: Broker) -> OpenTenants | None:
    """Finish what a dead process left and open the doors of active tenants; None where the settings have none."""
    if broker.settings.tenants is None:
        return None
    token = broker.token.inner
    if not isinstance(token, LocalToken):
        raise Misconfigured(
            "tenant.token_elsewhere",
            "tenants are served by the process that has the token open",
            remedy="leave token_owner out of the broker that serves tenants, or tenants out of this one",
        )
    owner = Owner()
    virtual = VirtualHsm(
        token.location, broker.settings.tenants, broker.hsm, owner, broker.clock, lambda: broker.identity.signer
    )
    for name, error in virtual.recover():
        structlog.get_logger().error(
            "tenant_not_served", tenant=name, code=error.code, says=error.says, got=error.got, remedy=error.remedy
        )
    return OpenTenants(virtual=virtual, owner=owner)


def require(tenants: OpenTenants | None) -> VirtualHsm:
    """Raises Misconfigured("tenant.none")."""
    if tenants is None:
        raise Misconfigured(
            "tenant.none", "this HSM serves no tenants", remedy="set tenants in broker.toml to a directory, and start again"
        )
    return tenants.virtual
