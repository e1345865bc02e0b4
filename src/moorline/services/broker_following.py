"""What another process did to the keys of this HSM is done here too: within FOLLOW_S, without a restart.

Every change to a key raises a counter in the database (HsmStore.put_keys). Each broker process compares it with the number
it acts on; where they differ it reads which keys are in force and takes them: issuing CA and those that retire, HSM identity
and with it the TLS key, verifier keys, wrapping keys. The process that made the change does the same, so there is one way.

A key that cannot be taken (a token that does not have it yet, a database that is away) leaves everything as it was, is
logged, and is tried again.
"""

from __future__ import annotations

import asyncio
from typing import Final

import structlog
from cryptography import x509

from moorline.errors import MoorlineError
from moorline.hsm.keys import HSM_IDENTITY, ISSUING_CA
from moorline.hsm.rotation import in_force, retiring
from moorline.services.broker import Broker

FOLLOW_S: Final = 1.0
_LOG: Final = structlog.stdlib.get_logger("broker")


async def keep_following(broker: Broker) -> None:
    """Follow until cancelled."""
    while True:
        await asyncio.sleep(FOLLOW_S)
        try:
            if await asyncio.to_thread(follow, broker):
                _LOG.info("keys followed", changes=broker.followed.changes)
        except MoorlineError as error:
            _LOG.warning("keys not followed", code=error.code)


def follow(broker: Broker) -> bool:
    """Act on what the database says about keys; False if nothing changed. Raises what token and database say."""
    changes = broker.hsm.key_changes()  # before the rows: what changes in between is another number, and followed next time
    with broker.followed.turn:
        if changes == broker.followed.changes:
            return False
        rows = broker.hsm.key_rows()
        own = broker.identity
        active = in_force(rows, HSM_IDENTITY, x509.load_der_x509_certificate(own.chain[0]))
        if active.der != own.chain[0]:
            own.adopt(active.label, active.certificate)
            broker.tls.renew()
        held = broker.ca.issuers.held()[0]
        broker.ca.issuers.hold(in_force(rows, ISSUING_CA, held.certificate), retiring(rows, ISSUING_CA))
        broker.verifier.follow(rows)
        broker.token.refresh()
        for renew in list(broker.followed.renew.values()):
            renew()
        broker.followed.changes = changes
    return True
