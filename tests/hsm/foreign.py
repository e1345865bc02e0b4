"""What stories with foreign clients share."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509


def openssl(folder, *words, check=False):
    """Debian's openssl, in a folder."""
    return subprocess.run(["openssl", *words], cwd=folder, capture_output=True, text=True, check=check, timeout=60)


STRONGSWAN = """libstrongswan {
  x509 {
    enforce_critical = no
  }
}
libtls {
  version_max = 1.3
}
pki {
  load = random nonce x509 constraints pubkey pkcs1 pkcs7 pkcs8 pem openssl curl

}
"""


@dataclass(frozen=True)
class Strongswan:
    """Debian's `pki` for one EST server. It dials names only, so it gets a hosts file of its own."""

    folder: Path
    address: str
    name: str
    cacert: str

    async def __call__(self, command, *words, ok=True):
        _, _, port = self.address.rpartition(":")
        return await self.offline(command, "--url", f"https://{self.name}:{port}", "--cacert", self.cacert, *words, ok=ok)

    async def offline(self, *words, ok=True):
        """Any `pki` command."""
        (self.folder / "hosts").write_text(f"{self.address.rpartition(':')[0]} {self.name}\n")
        (self.folder / "strongswan.conf").write_text(STRONGSWAN)
        process = await asyncio.create_subprocess_exec(
            *("bwrap", "--dev-bind", "/", "/", "--ro-bind", str(self.folder / "hosts"), "/etc/hosts", "pki", *words),
            cwd=self.folder,
            env={**os.environ, "STRONGSWAN_CONF": str(self.folder / "strongswan.conf")},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await asyncio.wait_for(process.communicate(), 60)
        assert (process.returncode == 0) is ok, err.decode()
        return out, err.decode()


def issue(folder, name, subject, *, ca=None, extensions=""):
    """A key and a certificate, made by openssl: `name`.key.pem and `name`.pem, under `ca` or self-signed."""
    openssl(folder, *f"ecparam -name prime256v1 -genkey -noout -out {name}.key.pem".split(), check=True)
    (folder / f"{name}.ext").write_text(extensions)
    openssl(folder, "req", "-new", "-key", f"{name}.key.pem", "-subj", subject, "-out", f"{name}.csr.pem", check=True)
    signer = (
        ("-signkey", f"{name}.key.pem") if ca is None else ("-CA", f"{ca}.pem", "-CAkey", f"{ca}.key.pem", "-CAcreateserial")
    )
    words = ("x509", "-req", "-in", f"{name}.csr.pem", "-days", "30", "-extfile", f"{name}.ext", "-out", f"{name}.pem")
    openssl(folder, *words, *signer, check=True)


def csr(folder, name, subject):
    """A P-256 key and a request in base64: `name`.key.pem and `name`.b64."""
    openssl(folder, *f"ecparam -name prime256v1 -genkey -noout -out {name}.key.pem".split(), check=True)
    words = ("req", "-new", "-key", f"{name}.key.pem", "-subj", subject, "-outform", "DER", "-out", f"{name}.der")
    openssl(folder, *words, check=True)
    (folder / f"{name}.b64").write_bytes(base64.encodebytes((folder / f"{name}.der").read_bytes()))


@dataclass(frozen=True)
class Answer:
    """What curl got."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def code(self):
        return json.loads(self.body)["code"]

    def certificates(self, folder):
        """Of a certs-only answer, as openssl reads it."""
        assert self.status == 200, self.body
        (folder / "p7.der").write_bytes(base64.b64decode(self.body))
        words = "pkcs7 -inform DER -in p7.der -print_certs -out p7.pem"
        openssl(folder, *words.split(), check=True)
        return x509.load_pem_x509_certificates((folder / "p7.pem").read_bytes())


@dataclass(frozen=True)
class Curl:
    """curl for one EST server: dials its address, checks its name."""

    folder: Path
    address: str
    name: str
    cacert: str

    def __call__(self, path, *more):
        host, _, port = self.address.rpartition(":")
        words = (
            *("curl", "-sS", "--cacert", self.cacert, "--connect-to", f"{self.name}:{port}:{host}:{port}"),
            *("-D", "headers.txt", "-o", "body.bin", "-w", "%{http_code}", *more),
            f"https://{self.name}:{port}/.well-known/est/{path}",
        )
        (self.folder / "body.bin").write_bytes(b"")
        done = subprocess.run(words, cwd=self.folder, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stderr
        lines = (line.partition(":") for line in (self.folder / "headers.txt").read_text().splitlines()[1:] if line)
        headers = {name.lower(): value.strip() for name, _, value in lines}
        return Answer(int(done.stdout), headers, (self.folder / "body.bin").read_bytes())

    def post(self, path, name, *more):
        """A request body of `csr`."""
        return self(path, "-H", "Content-Type: application/pkcs10", "--data-binary", f"@{name}.b64", *more)
