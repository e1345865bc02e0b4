"""Clients of CMP: `openssl cmp` in a device's folder, and a device that writes its messages itself, wrong ones too."""

from __future__ import annotations

import asyncio
import hashlib
import os
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from foreign import openssl

from moorline.wire import cmp, cmp_reply, der, keys
from moorline.wire.cmp_elements import single


class Client:
    """`openssl cmp` of one device, in its folder."""

    def __init__(self, folder, beta):
        self.folder, self.beta = folder, beta
        (folder / "root.pem").write_bytes(beta.roots_pem)

    async def code(self, device):
        async with self.beta.admin() as admin:
            return (await admin.post_json("/v1/enrolment-codes", {"device": device}))["code"]

    def key(self, name):
        openssl(self.folder, *f"ecparam -name prime256v1 -genkey -noout -out {name}.pem".split(), check=True)

    async def __call__(self, command, *words, ok=True):
        """Runs it; what it said on standard error."""
        server = ("-server", f"http://{self.beta.settings.listen_revocation}/.well-known/cmp", "-trusted", "root.pem")
        done = await asyncio.to_thread(
            openssl, self.folder, "cmp", "-cmd", command, *server, "-recipient", "/CN=ca-1", "-config", "", *words
        )
        said = done.stdout + done.stderr
        assert (done.returncode == 0) is ok, said
        return said

    async def initial(self, device, *more, key="key", ok=True):
        """ir with the device's code."""
        given_code = await self.code(device)
        self.key(key)
        words = ("-ref", device, "-secret", f"pass:{given_code}", "-newkey", f"{key}.pem", "-subject", "/CN=x")
        return await self("ir", *words, "-certout", "cert.pem", "-chainout", "chain.pem", *more, ok=ok)

    def certificate(self, name="cert.pem"):
        return x509.load_pem_x509_certificate((self.folder / name).read_bytes())

    async def revoked(self):
        async with self.beta.https() as client:
            found = x509.load_der_x509_crl(await client.get_bytes("/crl/ca-1.crl"))
        return {one.serial_number for one in found}


def self_signed(client, key, certificate):
    words = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=x"
    openssl(client.folder, *words.split(), "-keyout", key, "-out", certificate, check=True)


def posted(client, body):
    """What the server answers to a file of bytes."""
    url = f"http://{client.beta.settings.listen_revocation}/.well-known/cmp"
    words = ("curl", "-sS", "-H", "Content-Type: application/pkixcmp", "--data-binary", f"@{body}", "-o", "answer.der", url)
    subprocess.run(words, cwd=client.folder, check=True, timeout=30)
    return cmp.parse((client.folder / "answer.der").read_bytes())


@dataclass(frozen=True)
class Device:
    """A device that writes its messages itself, signed with the certificate that `openssl cmp` got."""

    client: Client

    @property
    def leaf(self):
        return self.client.certificate()

    async def asks(self, body, content, *, transaction=None, recipient_nonce=None, late_s=0):
        """The server's answer to a message that this device signed."""
        key = serialization.load_pem_private_key((self.client.folder / "key.pem").read_bytes(), None)
        made = cmp_reply.Reply(
            sender=cmp_reply.directory_name(self.leaf.subject),
            recipient=cmp_reply.directory_name(self.leaf.issuer),
            time=(datetime.now(UTC) - timedelta(seconds=late_s)).strftime("%Y%m%d%H%M%SZ"),
            algorithm=cmp.Algorithm(oid="1.2.840.10045.4.3.2", parameters=b""),
            reference=None,
            transaction=os.urandom(16) if transaction is None else transaction,
            sender_nonce=os.urandom(16),
            recipient_nonce=recipient_nonce,
            body=body,
            content=content,
        )
        chain = x509.load_pem_x509_certificates((self.client.folder / "chain.pem").read_bytes())
        shown = tuple(one.public_bytes(serialization.Encoding.DER) for one in (self.leaf, *chain))
        signature = key.sign(cmp_reply.protected_part(made), ec.ECDSA(hashes.SHA256()))
        (self.client.folder / "asked.der").write_bytes(cmp_reply.encode(made, signature, shown))
        return await asyncio.to_thread(posted, self.client, "asked.der")


def confirmation(certificate: bytes, *, status: int = 0) -> bytes:
    """CertConfirmContent about one certificate: 0 takes it, 2 rejects it."""
    return der.sequence(
        der.sequence(der.octets(hashlib.sha256(certificate).digest()), der.integer(-1), der.sequence(der.integer(status)))
    )


def cert_request(key: ec.EllipticCurvePrivateKey, *, proven_by: ec.EllipticCurvePrivateKey) -> bytes:
    """CertReqMessages (RFC 4211) for a key, with a signature of `proven_by` as proof of possession."""
    public = keys.public_bytes(key.public_key())
    template = der.sequence(der.tlv(0xA6, single(public, 0x30).content))
    request = der.sequence(der.integer(0), template)
    signature = proven_by.sign(request, ec.ECDSA(hashes.SHA256()))
    proof = der.tlv(0xA1, der.sequence(der.oid("1.2.840.10045.4.3.2")) + der.bits(signature))
    return der.sequence(der.sequence(request, proof))
