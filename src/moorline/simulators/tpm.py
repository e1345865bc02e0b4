"""Simulated TPMs: one swtpm process a host, certified by a SIMULATED maker whose root is of kind `test`.

The maker is a root and an issuing CA made here, so every name says what it is; `swtpm_setup` and `swtpm_localca` (Debian
swtpm-tools) manufacture a TPM and write its endorsement certificate into NV, as a maker does. Nothing in a certificate is
looked at to tell simulated from real: it is simulated because its anchor is in the simulated set.
"""

from __future__ import annotations

import os
import select
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

from moorline.attesters.tpm import EK_CHAIN_INDEX
from moorline.clock import Instant, to_datetime
from moorline.errors import Misconfigured, Unavailable
from moorline.evidence.tpm_structures import ALG_SHA256

_KEY_BITS: Final = 2048
_LIFE_S: Final = 10 * 365 * 86400
_SETUP_DEADLINE_S: Final = 60
_SOCKET_PATH_MAX: Final = 107
_START_DEADLINE_S: Final = 20
_STOP_DEADLINE_S: Final = 5
_PRIVATE: Final = 0o700
_NV_CHUNK: Final = 512
_CHAIN_ATTRIBUTES: Final = 1 << 1 | 1 << 17 | 1 << 18 | 1 << 25  # OWNERWRITE, OWNERREAD, AUTHREAD, NO_DA


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedTpmManufacturer:
    """A maker of simulated TPMs in `directory`: `root.der` is its anchor, the rest swtpm_localca uses."""

    directory: Path

    @classmethod
    def create(cls, directory: Path, *, now: Instant) -> Self:
        """Make root and issuing CA. `directory` is created, for this user only."""
        directory = directory.absolute()  # swtpm_localca runs elsewhere
        directory.mkdir(mode=_PRIVATE, parents=True, exist_ok=True)
        root_key, issuer_key = (rsa.generate_private_key(public_exponent=65537, key_size=_KEY_BITS) for _ in range(2))
        root = _ca("SIMULATED TPM root", root_key, None, now)
        issuer = _ca("SIMULATED TPM issuing CA", issuer_key, (root, root_key), now)
        made = cls(directory=directory)
        made.root_path.write_bytes(root.public_bytes(serialization.Encoding.DER))
        (directory / "issuer.der").write_bytes(issuer.public_bytes(serialization.Encoding.DER))
        pem = serialization.Encoding.PEM
        (directory / "issuercert.pem").write_bytes(issuer.public_bytes(pem))
        (directory / "swtpm-localca-rootca-cert.pem").write_bytes(root.public_bytes(pem))
        key = issuer_key.private_bytes(pem, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption())
        with os.fdopen(os.open(directory / "signkey.pem", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(key)
        _write_configuration(directory)
        return made

    @classmethod
    def open(cls, directory: Path) -> Self:
        """A maker made before. Raises Misconfigured("simulator.no_manufacturer") if there is none in `directory`."""
        if not (directory / "root.der").exists():
            raise Misconfigured("simulator.no_manufacturer", "no simulated TPM maker lives here", got=directory)
        return cls(directory=directory)

    @property
    def root_path(self) -> Path:
        """The anchor, DER."""
        return self.directory / "root.der"

    @property
    def root_der(self) -> bytes:
        """The anchor's certificate."""
        return self.root_path.read_bytes()

    @property
    def intermediates(self) -> tuple[bytes, ...]:
        """The issuing CA, as makers publish theirs beside the root."""
        return ((self.directory / "issuer.der").read_bytes(),)


class SimulatedTpm:
    """One TPM's state in `directory`, and its process while it runs. A TPM that starts again boots: PCRs are reset."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.socket = directory / "tpm.sock"
        self._process: subprocess.Popen[bytes] | None = None

    @classmethod
    def manufacture(cls, directory: Path, maker: SimulatedTpmManufacturer) -> Self:
        """A new TPM with an RSA-2048 endorsement key and certificate in NV, and a SHA-256 bank. About a second."""
        directory.mkdir(mode=_PRIVATE, parents=True, exist_ok=True)
        state = directory / "state"
        state.mkdir(mode=_PRIVATE)
        command = [
            _program("swtpm_setup"),
            *("--tpm2", "--tpmstate", str(state), "--config", str(maker.directory / "swtpm_setup.conf")),
            *("--create-ek-cert", "--pcr-banks", "sha256", "--lock-nvram", "--overwrite", "--vmid", directory.name),
            *("--logfile", str(directory / "setup.log")),
        ]
        done = subprocess.run(command, capture_output=True, timeout=_SETUP_DEADLINE_S, check=False)
        if done.returncode:
            raise Unavailable(
                "simulator.tpm_not_made",
                "swtpm_setup failed",
                got=(done.stdout + done.stderr)[-300:].decode("utf-8", "replace"),
                remedy=f"read {directory / 'setup.log'}",
            )
        with cls(directory) as made:
            _store_issuer(made.tcti, maker.intermediates[0])
        return made

    @property
    def tcti(self) -> str:
        """How `attesters.tpm.Tpm.open` reaches it."""
        return f"swtpm:path={self.socket}"

    @property
    def pid(self) -> int | None:
        """The process, while it runs."""
        return None if self._process is None else self._process.pid

    def start(self) -> Self:
        """Start the process (a boot). It returns when swtpm listens, which it says by writing its process id into a FIFO."""
        if self._process is not None:
            return self
        if len(f"{self.socket}.ctrl".encode()) > _SOCKET_PATH_MAX:
            raise Misconfigured(
                "simulator.path_too_long",
                "the path of the TPM's socket is too long for a unix socket",
                expected=f"<= {_SOCKET_PATH_MAX} bytes",
                got=f"{self.socket}.ctrl",
                remedy="choose a shorter directory",
            )
        for left in (self.socket, Path(f"{self.socket}.ctrl")):
            left.unlink(missing_ok=True)
        announcement = self.directory / "ready"
        announcement.unlink(missing_ok=True)
        os.mkfifo(announcement, 0o600)
        command = [
            _program("swtpm"),
            *("socket", "--tpm2", "--tpmstate", f"dir={self.directory / 'state'}"),
            *("--server", f"type=unixio,path={self.socket}", "--ctrl", f"type=unixio,path={self.socket}.ctrl"),
            *("--flags", "not-need-init,startup-clear", "--pid", f"file={announcement}"),
            *("--log", f"file={self.directory / 'swtpm.log'}"),
        ]
        reader = os.open(announcement, os.O_RDONLY | os.O_NONBLOCK)
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            ended = os.pidfd_open(self._process.pid)
            try:
                ready, _, _ = select.select([reader, ended], [], [], _START_DEADLINE_S)
            finally:
                os.close(ended)
        finally:
            os.close(reader)
        if reader in ready and ended not in ready:
            return self
        self.stop()
        raise Unavailable("simulator.tpm_not_started", "swtpm did not start", remedy=f"read {self.directory}/swtpm.log")

    def wait(self) -> None:
        """Return when the process has ended, whoever ended it."""
        if self._process is not None:
            self._process.wait()

    def stop(self) -> None:
        """End the process; harmless if it does not run."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(_STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


def _store_issuer(tcti: str, der: bytes) -> None:
    """The issuing CA goes into NV behind the endorsement certificate, as makers with on-die intermediates do it."""
    from tpm2_pytss import ESAPI, ESYS_TR
    from tpm2_pytss.constants import TPM2_SU
    from tpm2_pytss.types import TPM2B_NV_PUBLIC, TPMS_NV_PUBLIC

    with ESAPI(tcti) as esys:
        public = TPMS_NV_PUBLIC(nvIndex=EK_CHAIN_INDEX, nameAlg=ALG_SHA256, attributes=_CHAIN_ATTRIBUTES, dataSize=len(der))
        index = esys.nv_define_space(b"", TPM2B_NV_PUBLIC(nvPublic=public))
        for offset in range(0, len(der), _NV_CHUNK):
            esys.nv_write(index, der[offset : offset + _NV_CHUNK], offset, auth_handle=ESYS_TR.OWNER)
        esys.shutdown(TPM2_SU.CLEAR)


def _program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise Misconfigured("simulator.no_swtpm", f"{name} is not installed", remedy="apt-get install swtpm swtpm-tools")
    return found


def _write_configuration(directory: Path) -> None:
    """swtpm_setup runs a certificate tool with these; relative paths would be relative to its own working directory."""
    (directory / "swtpm-localca.conf").write_text(
        f"statedir = {directory}\nsigningkey = {directory}/signkey.pem\nissuercert = {directory}/issuercert.pem\n"
        f"certserial = {directory}/certserial\n"
    )
    (directory / "swtpm-localca.options").write_text(
        "--platform-manufacturer SIMULATED\n--platform-version 1\n--platform-model SIMULATED\n"
    )
    (directory / "swtpm_setup.conf").write_text(
        f"create_certs_tool = {_program('swtpm_localca')}\n"
        f"create_certs_tool_config = {directory}/swtpm-localca.conf\n"
        f"create_certs_tool_options = {directory}/swtpm-localca.options\n"
    )


def _ca(
    name: str,
    key: rsa.RSAPrivateKey,
    issuer: tuple[x509.Certificate, rsa.RSAPrivateKey] | None,
    now: Instant,
) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    above, signer = (subject, key) if issuer is None else (issuer[0].subject, issuer[1])
    usage = x509.KeyUsage(
        digital_signature=False,
        key_cert_sign=True,
        crl_sign=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(above)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(to_datetime(Instant(now - 60)))
        .not_valid_after(to_datetime(Instant(now + _LIFE_S)))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None if issuer is None else 0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .sign(signer, hashes.SHA256())
    )
