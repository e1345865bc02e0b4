"""A verifier's process for test_stopping: the service's application over the settings it is given, which asks no ledger."""

import sys
from pathlib import Path

from test_service import by_chain_alone

from moorline.clock import SystemClock
from moorline.ledger.light_client import LedgerTrust
from moorline.nfv import SpiffeId
from moorline.services import (
    http,
    process,
    settings,
    verifier,
    verifier_anchors,
    verifier_asking,
    verifier_results,
    verifier_routes,
    verifier_settings,
)
from moorline.services.verifier_asking import Asking
from moorline.storage.verifier_store import VerifierStore


async def main(_):
    configured = settings.load(verifier_settings.VerifierSettings, Path(sys.argv[1]))
    anchors = verifier_anchors.read_anchors(configured, LedgerTrust.parse(configured.ledger_trust.read_bytes()))
    name = SpiffeId.parse("spiffe://alpha.test/verifier/v1")
    store, clock, signer = VerifierStore.open(configured.database), SystemClock(), verifier.local_signer(configured.ear_key)
    authority = verifier.compose(configured, anchors, name, store, None, signer, clock)
    app = verifier_routes.application(authority, anchors, trust_domain="alpha.test", clock=clock, guard=by_chain_alone)
    asking = Asking(store, verifier_asking.Terms(answer_s=30, pull_every_s=None), clock)
    verifier_results.add_asking(app, authority, asking, trust_domain="alpha.test", clock=clock)
    await http.serve(
        app,
        listen=configured.listen,
        identity=http.TlsIdentity(
            chain_pem=configured.identity_chain.read_bytes(), key_pem=configured.identity_key.read_bytes()
        ),
        client_roots_pem=configured.consortium_roots.read_bytes(),
        ready=lambda address: process.announce_ready("verifier", address=address),
    )


if __name__ == "__main__":
    sys.exit(process.run("verifier", main))
