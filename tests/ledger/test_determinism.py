"""The same transactions give the same state in any process, whatever its hash seed, locale or time zone."""

import os
import subprocess
import sys

from moorline.ledger import blocks, state, transactions
from moorline.ledger.transactions import SenderKind
from moorline.wire import cbor, keys

from .conftest import hsm_body
from .test_registration import PLATFORM, SERVICE

EXECUTE = """
import sys
from moorline.ledger import blocks, genesis
from moorline.wire import cbor
found, batches = cbor.decode(sys.stdin.buffer.read(), max_bytes=1 << 22)
head = blocks.genesis_head(genesis.parse(found))
for time_ms, batch in batches:
    block, head, outcomes = blocks.make(head, batch, time_ms=time_ms)
print(head.state.root.hex(), head.frontier.root().hex(), head.digest.hex())
"""


def test_every_process_comes_to_the_same_roots(consortium):
    """verifies that: hash seed, locale and time zone leave no trace in state root, log root and header."""
    batches = []
    apply_block = consortium.block

    def recorded(*batch):
        outcomes = apply_block(*batch)
        batches.append([consortium.state.time_ms, list(batch)])
        return outcomes

    consortium.block = recorded
    alpha = consortium.admitted("alpha", "alpha.test")
    beta = consortium.admitted("beta", "beta.test")
    signed = [
        transactions.sign(consortium.payload(SenderKind.PROVIDER, provider.name, body), keys.KeySigner(provider.ca.key))
        for provider in (alpha, beta)
        for body in (hsm_body(provider), SERVICE, PLATFORM)
    ]
    consortium.block(*signed, b"garbage", signed[0])

    head = blocks.genesis_head(consortium.made.genesis)
    for time_ms, batch in batches:
        _, head, _ = blocks.make(head, batch, time_ms=time_ms)
    expected = f"{head.state.root.hex()} {head.frontier.root().hex()} {head.digest.hex()}\n"
    assert head.state.root == consortium.state.root == state.restored(
        ledger_id=head.state.ledger_id, height=1, time_ms=1, records=dict(sorted(head.state.records.items())), nonces={}
    ).root  # fmt: skip

    given = cbor.encode([consortium.made.genesis.encode(), batches])
    for seed, extra in (("0", {}), ("1", {"TZ": "Asia/Tokyo"}), ("4242", {"LC_ALL": "tr_TR.UTF-8", "LANG": "tr_TR.UTF-8"})):
        done = subprocess.run(
            [sys.executable, "-c", EXECUTE],
            input=given,
            capture_output=True,
            check=False,
            env={**os.environ, "PYTHONHASHSEED": seed, **extra},
        )
        assert done.stdout.decode() == expected, done.stderr.decode()
