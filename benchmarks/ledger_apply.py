"""apply() alone against the bare signature verifications it needs, in the same run; then at 10^3 and at 10^6 entries."""

import gc
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from moorline.clock import Instant, Validity
from moorline.ledger import ceremony, state, transactions
from moorline.ledger import transactions as tx
from moorline.ledger.draft import BlockContext
from moorline.ledger.genesis import Parameters
from moorline.ledger.records import RevocationKind, RevocationRecord, encode, revocation_key
from moorline.ledger.transactions import Sender, SenderKind
from moorline.nfv import SpiffeId
from moorline.wire import certificates, cose, keys
from moorline.wire.certificates import Issuer

NOW = Instant(1_790_000_000)
NAMES = ("authority-1", "authority-2", "authority-3", "authority-4")
COUNT = 300
ROUNDS = 5
LARGE = int(os.environ.get("MOOR_BENCH_ENTRIES", "1000000"))
PLATFORM = tx.RegisterPlatform(
    id="h", chip_id=b"c" * 64, product="Milan", ek_digest=b"e" * 32, location="EU/DE", tag_digest=b"t" * 32, simulated=False
)


class Ledger:
    """A consortium with one provider."""

    def __init__(self, folder: Path) -> None:
        made = ceremony.genesis_ceremony(
            folder,
            names=NAMES,
            consortium_domain="consortium.test",
            simulated_allowed=False,
            parameters=Parameters(max_age_s=30),
            addresses=dict.fromkeys(NAMES, "127.0.0.1:1"),
            now=NOW,
        )
        self.signers = {name: ceremony.load_authority(folder / "authorities" / name).signer() for name in NAMES}
        self.state, self.nonce = state.initial(made.genesis), 0
        key = ec.generate_private_key(ec.SECP256R1())
        ca = ceremony.load_authority(folder / "authorities" / NAMES[0]).ca
        made_by = ceremony.issue_provider(ca, key.public_key(), name="alpha", trust_domain="alpha.test", now=NOW)
        self.issuer = Issuer(certificate=made_by, key=key)
        self.signer = keys.KeySigner(key)
        action = tx.AdmitProvider(name="alpha", trust_domain="alpha.test", certificate=made_by.public_bytes(Encoding.DER))
        payload = self.payload(transactions.propose(action), SenderKind.AUTHORITY, NAMES[0])
        approve = self.payload(tx.Approve(proposal=transactions.proposal_id(payload)), SenderKind.AUTHORITY, NAMES[1])
        self.apply([transactions.sign(payload, self.signers[NAMES[0]]), transactions.sign(approve, self.signers[NAMES[1]])])
        self.apply([self.signed(tx.RegisterService(name="s", use_case="4.7", packages=(), profiles=("tls",), callers=()))])

    def payload(self, body, kind=SenderKind.PROVIDER, name="alpha"):
        self.nonce += 1
        return transactions.make(
            body,
            sender=Sender(kind=kind, name=name),
            ledger_id=self.state.ledger_id,
            nonce=self.nonce.to_bytes(32, "big"),
            valid_until=100,
        )

    def signed(self, body) -> bytes:
        return transactions.sign(self.payload(body), self.signer)

    def apply(self, batch) -> None:
        done = state.execute(self.state, batch, time_ms=self.state.time_ms + 1000)
        assert all(isinstance(one, state.Applied) for one in done.outcomes), done.outcomes
        self.state = done.state

    def block(self) -> BlockContext:
        return BlockContext(height=self.state.height + 1, time_ms=self.state.time_ms + 1000, authorities=NAMES)

    def hsm(self, number):
        key = ec.generate_private_key(ec.SECP256R1())
        name = f"hsm-{number}"
        made = certificates.hsm_certificate(
            key.public_key(),
            spiffe_id=SpiffeId.parse(f"spiffe://alpha.test/hsm/{name}"),
            address="https://h:1",
            issuer=self.issuer,
            validity=Validity(not_before=NOW, not_after=Instant(NOW + 86400)),
            serial=7,
        )
        return tx.RegisterHsm(
            id=name,
            certificate=made.public_bytes(Encoding.DER),
            address="h:1",
            est_url="https://h:1/est",
            kem_public=b"k" * 65,
            signing_public=keys.public_bytes(key.public_key()),
            bundle_sequence=1,
        )


TERMS = 'permit(principal, action, resource) when { principal.provider == "beta" && context.hour >= 6 };'


def kinds(ledger):
    """Kind, how many signatures one of it needs verified, and how to make number i."""
    return [
        ("Revoke", 1, lambda i: tx.Revoke(kind=RevocationKind.DEVICE, id=f"d-{i}")),
        ("AnchorLog", 1, lambda i: tx.AnchorLog(log=f"l-{i}", size=i, root=bytes(32))),
        ("RegisterPlatform", 1, lambda i: replace(PLATFORM, id=f"h-{i}", chip_id=i.to_bytes(64, "big"))),
        (
            "OfferAccess",
            1,
            lambda i: tx.OfferAccess(
                contract=f"c-{i}",
                service="s",
                grantee="alpha",
                conditions=TERMS.replace("beta", f"beta-{i}"),
                profiles=("tls",),
            ),
        ),
        ("RegisterHsm", 2, ledger.hsm),
    ]


def bare(data):
    """One verification, everything prepared: what cryptography alone takes for this signature."""
    sign1 = cose.parse(transactions.PURPOSE, data)
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

    half = len(sign1.signature) // 2
    signature = encode_dss_signature(
        int.from_bytes(sign1.signature[:half], "big"), int.from_bytes(sign1.signature[half:], "big")
    )
    message = cose._to_be_signed(  # noqa: SLF001 - what is signed, without the way there
        sign1.purpose, sign1.protected, sign1.payload
    )
    return signature, message, ec.ECDSA(hashes.SHA256())


def timed(work) -> float:
    """CPU time: what else runs on the machine does not count."""
    started = time.process_time()
    work()
    return time.process_time() - started


def compare(ledger, kind, verifications, make) -> tuple[float, float]:
    """Seconds a transaction of bare verification and of apply(), the least of several rounds taken in turns."""
    # New ones for each round: nothing that was read, judged or verified before comes in again.
    rounds = [[ledger.signed(make(at * COUNT + number)) for number in range(COUNT)] for at in range(ROUNDS)]
    prepared = [bare(data) for data in rounds[0]]
    public, block = ledger.signer.public_key(), ledger.block()

    def verify() -> None:
        for signature, message, algorithm in prepared:
            for _ in range(verifications):
                public.verify(signature, message, algorithm)

    def apply(batch: list[bytes]) -> None:
        for data in batch:
            outcome = state.apply(ledger.state, data, ledger_id=ledger.state.ledger_id, block=block)
            assert isinstance(outcome, state.Applied), (kind, outcome)

    pairs = [(timed(verify), timed(lambda batch=batch: apply(batch))) for batch in rounds]
    return min(one for one, _ in pairs) / COUNT, min(other for _, other in pairs) / COUNT


def filled(ledger, entries) -> state.State:
    """The ledger's state with so many revocations more."""
    found = dict(ledger.state.records)
    for number in range(entries):
        record = RevocationRecord(kind=RevocationKind.CERTIFICATE, registrant="beta", id=f"{number:x}", time_ms=1)
        found[revocation_key(record.kind, "beta", record.id)] = encode(record)
    return state.restored(
        ledger_id=ledger.state.ledger_id, height=ledger.state.height, time_ms=ledger.state.time_ms, records=found, nonces={}
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        ledger = Ledger(Path(name) / "c")
    bares = applies = 0.0
    for kind, verifications, make in kinds(ledger):
        least, whole = compare(ledger, kind, verifications, make)
        bares, applies = bares + least, applies + whole
        print(f"{kind:<18} bare {least * 1e6:>6.1f} us   apply {whole * 1e6:>6.1f} us   {least / whole:.2f}")
    print(
        f"{'all of them':<18} bare {bares * 1e6:>6.1f} us   apply {applies * 1e6:>6.1f} us   {bares / applies:.2f}   (target 0.6)"
    )
    for entries in (1000, LARGE):
        ledger.state = filled(ledger, entries)
        gc.collect()
        gc.freeze()
        batches = [
            [ledger.signed(tx.Revoke(kind=RevocationKind.DEVICE, id=f"e-{entries}-{n}-{i}")) for i in range(100)]
            for n in range(8)
        ]
        times = [timed(lambda batch=batch: ledger.apply(batch)) for batch in batches]
        print(f"block of 100 at {entries:>9} entries: {min(times) * 10:>6.3f} ms a transaction, state and tree with it")


if __name__ == "__main__":
    main()
