"""Certificates signed in the token per second, against the same under a software key; then pool entries and launches."""

import hashlib
import tempfile
import time
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from moorline.clock import Instant, Validity
from moorline.hsm.ceremony import initialise
from moorline.hsm.issuers import Looks
from moorline.hsm.issuing import IssuingCa, serial_number
from moorline.hsm.keys import ISSUING_CA, TokenEcKey
from moorline.hsm.pool import KeyPool, Watermarks
from moorline.hsm.token import open_token
from moorline.nfv import Role, SpiffeId
from moorline.storage.broker_certificates import Issued
from moorline.storage.broker_launches import Launch
from moorline.storage.broker_store import BrokerStore
from moorline.wire import certificates, keys
from moorline.wire.certificates import Issuer

SECONDS = 2.0
NOW = Instant(1_800_000_000)
VALIDITY = Validity(not_before=NOW, not_after=Instant(NOW + 3000))
PUBLIC = ec.generate_private_key(ec.SECP256R1()).public_key()
PUBLIC_DER = keys.public_bytes(PUBLIC)
DEVICE = SpiffeId(trust_domain="alpha.test", role=Role.DEVICE, segments=("d-1",))


def rates(*works) -> list[float]:
    """Calls per second of each, in turns of a tenth of a second, so that a busy machine is busy for all of them."""
    done, spent = [0] * len(works), [0.0] * len(works)
    for work in works:
        work()
    while sum(spent) < SECONDS * len(works):
        for index, work in enumerate(works):
            started = time.perf_counter()
            while (passed := time.perf_counter() - started) < 0.1:
                work()
                done[index] += 1
            spent[index] += passed
    return [count / time_s for count, time_s in zip(done, spent, strict=True)]


def issuer(key) -> Issuer:
    root = certificates.root_certificate(key, name="root", validity=VALIDITY, serial=1)
    return Issuer(certificate=root, key=key)


def built(ca: Issuer, random) -> x509.Certificate:
    """By the library's builder."""
    return certificates.leaf_certificate(
        PUBLIC, spiffe_id=DEVICE, issuer=ca, validity=VALIDITY, serial=serial_number(random(19))
    )


def issuing(token, certificate: x509.Certificate) -> IssuingCa:
    """As a broker holds it."""
    looks = Looks(last_s=1 << 40, every_s=1)
    made = IssuingCa(token, certificate=certificate, above=(), trust_domain="alpha.test", life_s=3000, looks=looks)
    made.issuers.looked(frozenset(), at=Instant(0))
    return made


def launch(number: int) -> Launch:
    digest = hashlib.sha256(number.to_bytes(8, "big")).digest()
    return Launch(
        launcher=b"L" * 32,
        epoch=1,
        sequence=number,
        kem_digest=digest,
        signing_digest=digest,
        session="benchmark",
        service="records",
        profile="tls",
        tenant="t",
        instance=f"i-{number}",
        generation=1,
        host="h1",
    )


def launches_per_second(folder: Path, token, ca: IssuingCa) -> float:
    """Consume, unwrap the key, sign, confirm: two durable transactions each, as the broker does for a function."""
    store = BrokerStore.open(f"sqlite:///{folder / 'broker.db'}")
    store.admit_launcher(launcher=b"L" * 32, ticket=b"t", measurement=b"m", chip=b"c", session="l", at=NOW)
    store.open_epoch(epoch=1, opened=NOW, not_after=Instant(NOW + 100), grace_s=0, wrapped=b"")
    store.grant_lease(launcher=b"L" * 32, epoch=1, count=1 << 40, not_after=Instant(NOW + 100), counter=1, at=NOW)
    pool = KeyPool(token, store, Watermarks(low=1, high=4000))
    pool.refill("records", "tls")
    number = 0

    def one() -> None:
        nonlocal number
        wanted = launch(number)
        taken = store.consume(wanted, advance=lambda _c: None, not_after=NOW, at=NOW)
        pool.open(taken, "records", "tls")
        name = SpiffeId(trust_domain="alpha.test", role=Role.SERVICE, segments=("records", wanted.instance))
        leaf = ca.issue(taken.public, name, NOW)
        issued = Issued(serial=f"{leaf.serial:x}", spiffe_id=str(name), key_digest=b"", not_after=NOW, der=leaf.der)
        store.confirm(wanted, issued, at=NOW)
        number += 1

    (found,) = rates(one)
    store.close()
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = initialise(folder / "token", label="bench")
        with open_token(made.location) as token:
            in_token, in_software = issuer(TokenEcKey(token, ISSUING_CA)), issuer(ec.generate_private_key(ec.SECP256R1()))
            ca = issuing(token, in_token.certificate)
            pool = KeyPool(token, None, Watermarks(low=1, high=1))
            software, signed, issued, raw, made_keys = rates(
                lambda: built(in_software, token.random),
                lambda: built(in_token, token.random),
                lambda: ca.issue(PUBLIC_DER, DEVICE, NOW),
                lambda: token.ecdsa(ISSUING_CA, bytes(32)),
                lambda: pool.make("records", "tls"),
            )
            print(f"X.509 P-256, software key   {software:>9.0f} /s   1.00")
            print(f"X.509 P-256, key in token   {signed:>9.0f} /s   {signed / software:.2f}")
            print(f"X.509 issued by the broker  {issued:>9.0f} /s   {issued / software:.2f}   key in token (target 5,000/s)")
            print(f"bare ECDSA in the token     {raw:>9.0f} /s   {raw / software:.2f}")
            print(f"pool entries made, wrapped  {made_keys:>9.0f} /s")
            print(f"launch consumed, confirmed  {launches_per_second(folder, token, ca):>9.0f} /s   (target 1,000/s)")


if __name__ == "__main__":
    main()
