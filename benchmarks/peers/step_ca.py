"""step-ca as a peer: its own program, built from its module into .dev/peers, one JWK provisioner, a key file, its own database.

It is asked what an EST client asks of ours: a certificate for a CSR, by a token that works once, over HTTPS (`POST /1.0/sign`).
Its `step` command line is not needed: root, intermediate and settings are written here.
"""

from __future__ import annotations

import base64
import json
import os
import secrets
import shutil
import socket
import ssl
import subprocess
import time
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from moorline.clock import Instant, Validity
from moorline.wire import certificates, keys
from moorline.wire.certificates import Issuer

VERSION = "v0.30.2"
_MODULE = "github.com/smallstep/certificates/cmd/step-ca"
_HOME = Path(__file__).parents[2] / ".dev" / "peers" / f"step-ca-{VERSION.removeprefix('v')}"
_BUILD_S = 900
_START_S = 20
_PEM = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


class StepCa:
    """The peer's process. Raises OSError or subprocess.SubprocessError where it cannot be built or started."""

    def __init__(self, folder: Path) -> None:
        program = built()
        self.provisioner = keys.KeySigner(ec.generate_private_key(ec.SECP256R1()))
        with socket.socket() as chosen:
            chosen.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{chosen.getsockname()[1]}"
        self.roots_pem = _certify(folder)
        (folder / "ca.json").write_text(json.dumps(self._settings(folder)), "utf-8")
        with (folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [program, str(folder / "ca.json")], stdout=log, stderr=log, env={**os.environ, "STEPPATH": str(folder)}
            )
        self.pid = self._process.pid
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    def _settings(self, folder: Path) -> dict[str, object]:
        provisioner = {"type": "JWK", "name": "bench", "key": self._jwk(), "encryptedKey": ""}
        return {
            "root": str(folder / "root.pem"),
            "crt": str(folder / "between.pem"),
            "key": str(folder / "between.key"),
            "address": self.address,
            "dnsNames": ["localhost"],
            "logger": {"format": "text"},
            "db": {"type": "badgerv2", "dataSource": str(folder / "db")},
            "authority": {"provisioners": [provisioner]},
        }

    def _jwk(self) -> dict[str, str]:
        public = self.provisioner.public_key()
        assert isinstance(public, ec.EllipticCurvePublicKey)
        at = public.public_numbers()
        point = {"x": _base64url(at.x.to_bytes(32, "big")), "y": _base64url(at.y.to_bytes(32, "big"))}
        return {"use": "sig", "kty": "EC", "kid": "bench", "crv": "P-256", "alg": "ES256", **point}

    def body(self, name: str, csr: x509.CertificateSigningRequest) -> bytes:
        """A request with a token of its own, that works once."""
        now = int(time.time())
        claims = {
            "iss": "bench",
            "aud": f"https://localhost:{self.address.rpartition(':')[2]}/1.0/sign",
            "sub": name,
            "sans": [name],
            "jti": secrets.token_hex(16),
            "iat": now,
            "nbf": now - 5,
            "exp": now + 290,
        }
        head = {"alg": "ES256", "kid": "bench", "typ": "JWT"}
        signed = ".".join(_base64url(json.dumps(part).encode()) for part in (head, claims))
        token = f"{signed}.{_base64url(self.provisioner.sign(signed.encode()))}"
        return json.dumps({"csr": csr.public_bytes(serialization.Encoding.PEM).decode(), "ott": token}).encode()

    def _wait(self) -> None:
        context = ssl.create_default_context(cadata=self.roots_pem.decode("ascii"))
        host, _, port = self.address.rpartition(":")
        until = time.monotonic() + _START_S
        while True:
            try:
                with (
                    socket.create_connection((host, int(port))) as raw,
                    context.wrap_socket(raw, server_hostname="localhost"),
                ):
                    return
            except OSError:
                if time.monotonic() > until or self._process.poll() is not None:
                    raise
                time.sleep(0.05)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(10)


def built() -> str:
    """The program's path; built once."""
    program = _HOME / "step-ca"
    if not program.is_file():
        go = shutil.which("go") or "/usr/local/go/bin/go"
        asked = {**os.environ, "GOBIN": str(_HOME), "GOFLAGS": "-mod=mod", "CGO_ENABLED": "0"}
        _HOME.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            [go, "install", f"{_MODULE}@{VERSION}"], check=True, timeout=_BUILD_S, capture_output=True, cwd="/", env=asked
        )
    return str(program)


def _certify(folder: Path) -> bytes:
    now = Instant(int(time.time()))
    validity = Validity(not_before=Instant(now - 60), not_after=Instant(now + 86400))
    root_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    root = certificates.root_certificate(root_key, name="bench root", validity=validity, serial=1)
    between = certificates.issuing_ca_certificate(
        key.public_key(), name="bench", issuer=Issuer(certificate=root, key=root_key), validity=validity, serial=2
    )
    roots_pem = root.public_bytes(serialization.Encoding.PEM)
    (folder / "root.pem").write_bytes(roots_pem)
    (folder / "between.pem").write_bytes(between.public_bytes(serialization.Encoding.PEM))
    (folder / "between.key").write_bytes(key.private_bytes(*_PEM))
    return roots_pem


def csr(name: str) -> x509.CertificateSigningRequest:
    """What its token allows: this common name, and this name alone."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(
        x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    )
    names = x509.SubjectAlternativeName([x509.DNSName(name)])
    return builder.add_extension(names, critical=False).sign(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256())


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")
