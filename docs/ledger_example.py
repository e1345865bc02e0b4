"""Make the ledger of docs/spec/examples/ledger.json anew, and put what differs into the pages that show it.

Run it when a format of the ledger changed; tests/ledger/test_spec.py then says whether pages, bytes and code agree.
Keys are made for the occasion and thrown away.
"""

from __future__ import annotations

import json
import re
import secrets
import sys
import tempfile
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from moorline.clock import Instant
from moorline.ledger import blocks, ceremony, checkpoint, partial_tree, places, proof, state, transactions
from moorline.ledger.genesis import Parameters
from moorline.ledger.transactions import Sender, SenderKind
from moorline.wire import keys, schema

SPEC = Path(__file__).parent / "spec"
FILE = SPEC / "examples" / "ledger.json"
NOW = Instant(1_790_000_000)
NAMES = ("authority-1", "authority-2", "authority-3", "authority-4")
FIRMWARE = bytes.fromhex("907e4126ae0ad9c862798e0a7574e139687b2a500ec207b9c773222e161bf672")
KEYS = ("provider/beta", "provider/alpha", "reference-values/alpha/firmware")


def example() -> dict[str, Any]:
    """A ledger of two blocks, with everything the pages show of it, in hex."""
    with tempfile.TemporaryDirectory() as name:
        made = ceremony.genesis_ceremony(
            Path(name) / "c",
            names=NAMES,
            consortium_domain="consortium.test",
            simulated_allowed=True,
            parameters=Parameters(max_age_s=30),
            addresses={name: f"127.0.0.1:{7101 + index}" for index, name in enumerate(NAMES)},
            now=NOW,
        )
        folders = {one: ceremony.load_authority(Path(name) / "c" / "authorities" / one) for one in NAMES}
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = ceremony.issue_provider(
        folders["authority-1"].ca, key.public_key(), name="alpha", trust_domain="alpha.test", now=NOW
    )
    head = blocks.genesis_head(made.genesis)

    def signed(
        kind: SenderKind, sender: str, body: transactions.Body, signer: keys.Signer
    ) -> tuple[transactions.Payload, bytes]:
        payload = transactions.make(
            body,
            sender=Sender(kind=kind, name=sender),
            ledger_id=made.genesis.ledger_id,
            nonce=secrets.token_bytes(32),
            valid_until=100,
        )
        return payload, transactions.sign(payload, signer)

    action = transactions.AdmitProvider(name="alpha", trust_domain="alpha.test", certificate=_der(certificate))
    payload, proposed = signed(
        SenderKind.AUTHORITY, "authority-1", transactions.propose(action), folders["authority-1"].signer()
    )
    approve = transactions.Approve(proposal=transactions.proposal_id(payload))
    _, approved = signed(SenderKind.AUTHORITY, "authority-2", approve, folders["authority-2"].signer())
    body = transactions.RegisterReferenceValues(id="firmware", kind="tpm", digest=FIRMWARE)
    _, registered = signed(SenderKind.PROVIDER, "alpha", body, keys.KeySigner(key))
    committed, receipt = [], b""
    for height, batch in enumerate([[proposed, approved], [registered]], start=1):
        block, head, outcomes = blocks.make(head, batch, time_ms=(NOW + height) * 1000)
        assert all(isinstance(one, state.Applied) for one in outcomes), outcomes
        note = checkpoint.Note(
            checkpoint=head.checkpoint(),
            signatures=(
                checkpoint.sign_note(head.checkpoint(), name=NAMES[0], key=folders[NAMES[0]].checkpoint),
                *(
                    checkpoint.cosign(head.checkpoint(), name=one, key=folders[one].checkpoint, now=Instant(NOW + height))
                    for one in NAMES[:3]
                ),
            ),
        ).encode()
        committed.append({"block": blocks.encode(block).hex(), "note": note.decode()})
        ids = [transactions.parse(data).id for data in block.transactions]
        receipt = schema.encode(blocks.receipts(head.log_proof, block, note=note, transaction_ids=ids)[0])
    bundle = proof.make_bundle(note=note, changes=(), tree=head.state.tree, value_of=head.state.get, keys=KEYS)
    return {
        "genesis": made.genesis.encode().hex(),
        "ledger_id": made.genesis.ledger_id.hex(),
        "trust": made.genesis.trust().encode().hex(),
        "transaction": registered.hex(),
        "transaction_id": transactions.parse(registered).id.hex(),
        "blocks": committed,
        "receipt": receipt.hex(),
        "keys": list(KEYS),
        "bundle": bundle.hex(),
        "tree_proof": head.state.tree.prove(KEYS).hex(),
        "state_root": head.state.root.hex(),
    }


def tokens(found: dict[str, Any]) -> list[str]:
    """What the pages show of an example, in a fixed order; the first eight hex digits stand for the longer ones."""
    transaction = transactions.parse(bytes.fromhex(found["transaction"]))
    note = found["blocks"][-1]["note"].splitlines()
    block = blocks.parse(bytes.fromhex(found["blocks"][-1]["block"]))
    bundle = proof.parse_bundle(bytes.fromhex(found["bundle"]))
    header = block.header
    leaf = leaf_at(bytes.fromhex(found["tree_proof"]), places.key_digest("provider/beta"))
    assert isinstance(transaction.body, transactions.RegisterReferenceValues)
    return [
        found["ledger_id"],
        found["transaction_id"],
        found["state_root"],
        transaction.payload.nonce.hex(),
        transaction.sign1.key_id.hex()[:8],
        transaction.sign1.signature.hex()[:8],
        *note,
        *(one.hex()[:8] for one in (header.previous, header.state_root, header.authorities, header.transactions_root)),
        *(one.value.hex()[:8] for one in bundle.records if one.value),
        bundle.tree.hex()[:8],
        leaf.hex()[:8],
        f"{len(bytes.fromhex(found['bundle']))} bytes",
    ]


def leaf_at(data: bytes, digest: bytes) -> bytes:
    """The key digest of the leaf where `digest` would be; empty if there is none."""
    node = partial_tree.PartialTree.parse(data)._root  # noqa: SLF001 - this draws the inside
    depth = 0
    while hasattr(node, "left"):
        node = node.right if digest[depth >> 3] >> (7 - (depth & 7)) & 1 else node.left
        depth += 1
    return getattr(node, "key", b"")


def drawn(data: bytes, depth: int = 2) -> tuple[list[str], bytes]:
    """A tree proof, one node a line."""
    size = {0: 1, 1: 65, 2: 1, 3: 33}[data[0]]
    parts = [data[:1].hex(), *(data[at : at + 4].hex() + "…" for at in range(1, size, 32))]
    lines, rest = ["  " * depth + " ".join(parts)], data[size:]
    for _ in range(2 if data[0] == 2 else 0):
        below, rest = drawn(rest, depth + 1)
        lines += below
    return lines, rest


def _der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.DER)


def main() -> int:
    """Write example and pages."""
    old = json.loads(FILE.read_text("utf-8"))
    while True:
        new = example()
        lines, _ = drawn(bytes.fromhex(new["tree_proof"]))
        values = {places.key_digest(key) for key in KEYS}
        leaf = leaf_at(bytes.fromhex(new["tree_proof"]), places.key_digest(KEYS[0]))
        if len(lines) <= 22 and leaf and leaf not in values:
            break
    replaced = [*zip(tokens(old), tokens(new), strict=True)]
    for page in ("ledger-checkpoint.md", "ledger-proof-bundle.md", "ledger-state.md", "ledger-transactions.md"):
        text = (SPEC / page).read_text("utf-8")
        for before, after in replaced:
            text = text.replace(before, after) if before else text
        if page == "ledger-proof-bundle.md":
            text = re.sub(r"    02\n(?: {6,}0[0-3].*\n)+", "\n".join(lines) + "\n", text)
        (SPEC / page).write_text(text, "utf-8")
    FILE.write_text(json.dumps(new, indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
