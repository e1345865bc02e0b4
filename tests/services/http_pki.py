"""A certificate authority of these tests, and a server's name under it."""

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from moorline.clock import Instant, SystemClock, Validity
from moorline.nfv import SpiffeId
from moorline.wire import certificates as profile
from moorline.wire.http import ClientIdentity

NOW = SystemClock().now()
LIFE = Validity(not_before=Instant(NOW - 60), not_after=Instant(NOW + 3000))


class Pki:
    def __init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.root = profile.root_certificate(self.key, name="root", validity=LIFE, serial=1)
        self.roots_pem = self.root.public_bytes(serialization.Encoding.PEM)

    def identity(self, uri: str) -> tuple[bytes, bytes]:
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = profile.leaf_certificate(
            key.public_key(),
            spiffe_id=SpiffeId.parse(uri),
            issuer=profile.Issuer(certificate=self.root, key=self.key),
            validity=LIFE,
            serial=2,
        )
        pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        return certificate.public_bytes(serialization.Encoding.PEM), pem

    def client(self, uri: str) -> ClientIdentity:
        chain, key = self.identity(uri)
        return ClientIdentity(certificate_chain_pem=chain, private_key_pem=key)


PKI = Pki()
SERVER = "spiffe://alpha.test/verifier/v1"
NAME = "v1.verifier.alpha.test"
