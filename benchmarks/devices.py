"""What devices cost a broker: enrolments against the TLS handshakes they need, CRL and OCSP, keys of the no-PFS profile.

Everything in one process, in turns, over a real SoftHSM token and SQLite. An EST enrolment over HTTPS needs one TLS handshake, so the
handshake alone, in memory with the same certificates, is the physical limit here. A broker process over HTTPS is measured against
step-ca at the end (enrol_over_tls.py).
"""

import tempfile
import time
from pathlib import Path

import enrol_over_tls
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509 import ocsp
from OpenSSL import SSL

from moorline.clock import Instant, Validity
from moorline.hsm import revocation
from moorline.hsm.ceremony import initialise
from moorline.hsm.exchange import Party
from moorline.hsm.issuing import key_digest, serial_number
from moorline.hsm.keys import ISSUING_CA, TokenEcKey
from moorline.hsm.pair import Ends, PairKeys
from moorline.hsm.revocation import CertificateStatus, RevokedCertificate
from moorline.hsm.token import open_token
from moorline.nfv import Role, SpiffeId
from moorline.storage.broker_certificates import Issued
from moorline.storage.broker_enrolments import Applicant, EnrolmentStore
from moorline.storage.broker_pairs import Claim, PairStore
from moorline.storage.broker_revocations import RevocationStore
from moorline.storage.broker_store import BrokerStore
from moorline.wire import certificates, est, keys
from moorline.wire.certificates import Issuer
from moorline.wire.nopfs import Direction, KeyContext

SECONDS = 2.0
LISTED = 1000


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


def handshake(key, certificate):
    """A TLS 1.3 handshake in memory, server authenticated; both ends' work."""
    context = SSL.Context(SSL.TLS_METHOD)
    context.set_min_proto_version(SSL.TLS1_3_VERSION)
    context.use_certificate(certificate)
    context.use_privatekey(key)
    client_context = SSL.Context(SSL.TLS_METHOD)

    def once() -> None:
        server, client = SSL.Connection(context, None), SSL.Connection(client_context, None)
        server.set_accept_state()
        client.set_connect_state()
        while True:
            waiting = 0
            for one, other in ((client, server), (server, client)):
                try:
                    one.do_handshake()
                except SSL.WantReadError:
                    waiting += 1
                try:
                    other.bio_write(one.bio_read(65536))
                except SSL.WantReadError:
                    continue
            if not waiting:
                return

    return once


def request() -> bytes:
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "d")])
    key = ec.generate_private_key(ec.SECP256R1())
    return (
        x509.CertificateSigningRequestBuilder()
        .subject_name(name)
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.DER)
    )


def enrolments(ca, token, store):
    """From the CSR's DER to the recorded certificate in CMS, each device with a code of its own."""
    made = EnrolmentStore(store, RevocationStore(store), quota=16)
    now, number, der = Instant(int(time.time())), 0, request()

    def once() -> None:
        nonlocal number
        number += 1
        device = f"d-{number}"
        csr = est.parse_csr(der)
        digest = key_digest(keys.public_bytes(csr.public))
        made.set_code(device, code_digest=b"c" * 32, not_after=Instant(now + 600), at=now)
        name = SpiffeId(trust_domain="alpha.test", role=Role.DEVICE, segments=(device,))
        leaf = certificates.leaf_certificate(
            csr.public,
            spiffe_id=name,
            issuer=ca,
            serial=serial_number(token.random(19)),
            validity=Validity(not_before=now, not_after=Instant(now + 3000)),
        )
        data = leaf.public_bytes(serialization.Encoding.DER)
        issued = Issued(
            serial=f"{leaf.serial_number:x}",
            spiffe_id=str(name),
            key_digest=digest,
            not_after=Instant(now + 3000),
            der=data,
        )
        made.enrol(Applicant(device=device, code_digest=b"c" * 32), key_digest=digest, issued=issued, at=now)
        est.encoded(est.certs_only((data,)))

    return once


def pair(token, folder):
    """Two HSMs' pair keys, agreed; the labels of one token serve both."""
    sides = []
    for name in ("alpha", "beta"):
        store = BrokerStore.open(f"sqlite:///{folder / f'{name}.db'}")
        key = ec.generate_private_key(ec.SECP256R1())
        pairs = PairStore(store)
        sides.append(
            (Party(provider=name, hsm="hsm-1"), key, PairKeys(token, pairs, lambda key=key: keys.KeySigner(key)), pairs)
        )

    def agree() -> None:
        (one, one_key, mine, _), (two, two_key, theirs, _) = sides
        at = Instant(0)
        here = Ends(ledger_id=b"l" * 32, own=one, peer=two, peer_key=two_key.public_key())
        there = Ends(ledger_id=b"l" * 32, own=two, peer=one, peer_key=one_key.public_key())
        row, offer = mine.offer(here, theirs=theirs.newest_epoch(there), at=at)
        reply = theirs.answer(there, offer, at=at)
        row, confirm = mine.agree(here, row, reply)
        theirs.confirm(there, confirm, at=at)
        mine.activate(here, row, peer_signed=reply.statement, at=at)

    return sides, agree


def no_pfs(sides):
    """What one connection without forward secrecy asks of both HSMs: four MACs in the token and a durable claim."""
    (one, _, mine, claims), (two, _, theirs, _) = sides
    number = 0

    def once() -> None:
        nonlocal number
        number += 1
        epoch = claims.newest("beta", "hsm-1").epoch
        context = KeyContext(
            ledger_id=b"l" * 32,
            device_provider="beta",
            device_hsm="hsm-1",
            function_provider="alpha",
            function_hsm="hsm-1",
            pair_epoch=epoch,
            device="spiffe://beta.test/device/d",
            service="records",
            device_nonce=b"d" * 32,
            function_nonce=number.to_bytes(32, "big"),
        )
        claims.claim(
            Claim(
                key_id=context.key_id(),
                instance="i",
                generation=1,
                device=context.device,
                contract="c",
                first=0,
                count=9,
                at=Instant(0),
            )
        )
        for keys_of, peer in ((mine, two), (theirs, one)):
            for direction in Direction:
                keys_of.mac(peer, epoch, context.message(direction))

    return once


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = initialise(folder / "token", label="bench")
        with open_token(made.location) as token:
            now = Instant(int(time.time()))
            validity = Validity(not_before=now, not_after=Instant(now + 3000))
            root = certificates.root_certificate(TokenEcKey(token, ISSUING_CA), name="ca-1", validity=validity, serial=1)
            ca = Issuer(certificate=root, key=TokenEcKey(token, ISSUING_CA))
            tls_key = ec.generate_private_key(ec.SECP256R1())
            hsm = SpiffeId(trust_domain="alpha.test", role=Role.HSM, segments=("hsm-1",))
            shown = certificates.leaf_certificate(
                tls_key.public_key(), spiffe_id=hsm, issuer=ca, validity=validity, serial=2
            )
            store = BrokerStore.open(f"sqlite:///{folder / 'broker.db'}")
            listed = tuple(
                RevokedCertificate(serial=n + 1, at=now, reason=x509.ReasonFlags.superseded) for n in range(LISTED)
            )
            asked = ocsp.OCSPRequestBuilder().add_certificate(shown, root, hashes.SHA1()).build()
            der = asked.public_bytes(serialization.Encoding.DER)
            sides, agree = pair(token, folder)
            agree()
            bare, enrolled, crls, answers, keys_made, signature = rates(
                handshake(tls_key, shown),
                enrolments(ca, token, store),
                lambda: revocation.crl(ca, listed, number=1, validity=validity, url="http://x.test/c.crl"),
                lambda: revocation.ocsp_answer(
                    ca, revocation.parse_ocsp(der), CertificateStatus(issued=True, revoked=None), validity=validity
                ),
                no_pfs(sides),
                lambda: token.ecdsa(ISSUING_CA, b"d" * 32),
            )
            (agreed,) = rates(agree)
            store.close()
    both = 1 / (1 / bare + 1 / enrolled)
    print(f"bare TLS 1.3 handshakes, both ends, in memory        {bare:10.0f} /s")
    print(f"EST enrolments, CSR to recorded certificate          {enrolled:10.0f} /s   (two durable transactions each)")
    print(
        f"handshake and enrolment together                     {both:10.0f} /s   {both / bare:5.2f} of the bare handshakes"
    )
    print(f"signatures in the token                              {signature:10.0f} /s")
    print(
        f"OCSP answers                                         {answers:10.0f} /s   {answers / signature:5.2f} of the signatures"
    )
    print(f"CRLs with {LISTED} entries                             {crls:10.0f} /s")
    print(
        f"no-PFS connections, both HSMs (4 MACs, one claim)    {keys_made:10.0f} /s   {keys_made / bare:5.2f} of the bare handshakes"
    )
    print(f"pair keys agreed, both ends in one token             {agreed:10.0f} /s")
    enrol_over_tls.main()


if __name__ == "__main__":
    main()
