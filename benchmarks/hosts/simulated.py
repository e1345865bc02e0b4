"""The hosts of the fleet benchmark: each with its own attestation key, and one TLS connection that it keeps.

A host is a machine that quotes. Most have a key in this process and sign real quotes with it (`Machine` of host_poll); some have
a TPM of their own, a swtpm process, which extends, signs and answers as any TPM does. What a connection costs here is not the
verifier's, so there is as little of it as does: one protocol, which reads one answer at a time.
"""

from __future__ import annotations

import asyncio
import copy
import hashlib
import ssl
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cbor2
from cryptography.hazmat.primitives.asymmetric import ec
from host_poll import SELECTION, Machine, _entry, ak_public

from moorline.attesters.tpm import Tpm
from moorline.evidence import ima as lists
from moorline.evidence import tpm_structures as tpm
from moorline.simulators import firmware
from moorline.simulators.tpm import SimulatedTpm
from moorline.wire import host as wire
from moorline.wire import schema

ANSWER_S = 5.0
"""A challenge that is good for less than this is not answered."""
REFUSED = "host.file_not_in_reference_values"


class Line(asyncio.Protocol):
    """One kept TLS connection that asks and waits."""

    def __init__(self) -> None:
        self._got = bytearray()
        self._needed = 0
        self._answer: asyncio.Future[bytes] | None = None
        self._transport: asyncio.Transport | None = None
        self.lost = False

    @classmethod
    async def open(cls, address: str, context: ssl.SSLContext, name: str) -> Line:
        host, _, port = address.rpartition(":")
        loop = asyncio.get_running_loop()
        _, line = await loop.create_connection(
            cls, host, int(port), ssl=context, server_hostname=name, ssl_handshake_timeout=120
        )
        return line

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def connection_lost(self, _: Exception | None) -> None:
        self.lost = True  # as the verifier hangs up on who asks nothing for long
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(OSError("the connection ended"))

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def post(self, path: str, body: bytes) -> asyncio.Future[bytes]:
        assert self._transport is not None
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(
            b"POST %s HTTP/1.1\r\nhost: v\r\ncontent-length: %d\r\n\r\n" % (path.encode(), len(body)) + body
        )
        return self._answer

    def data_received(self, data: bytes) -> None:
        self._got += data
        if not self._needed:
            end = self._got.find(b"\r\n\r\n")
            if end < 0:
                return
            size = self._got.lower().split(b"content-length:", 1)[1].split(b"\r\n", 1)[0]
            self._needed = end + 4 + int(size)
        if len(self._got) < self._needed or self._answer is None:
            return
        head, _, body = bytes(self._got).partition(b"\r\n\r\n")
        self._got.clear()
        self._needed = 0
        if self._answer.done():
            return
        if head.startswith(b"HTTP/1.1 200"):
            self._answer.set_result(body)
        else:
            self._answer.set_exception(OSError(body[:200].decode("utf-8", "replace")))


class Software:
    """A machine whose key is in this process; `like` it are made by the thousand."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.ak = machine.ak
        self._delta = b""

    @classmethod
    def like(cls, template: Machine) -> Software:
        made = copy.copy(template)
        made.key = ec.generate_private_key(ec.SECP256R1())
        made.ak, made.pcrs = ak_public(made.key), dict(template.pcrs)
        return cls(made)

    def drift(self) -> None:
        """Run a file that nobody listed."""
        entry = _entry("/tmp/.x/miner", hashlib.sha256(b"miner").digest())
        template = hashlib.sha256(entry.template_data()).digest()
        self.machine.pcrs[10] = hashlib.sha256(self.machine.pcrs[10] + template).digest()
        self._delta = lists.serialize_line(entry) + b"\n"

    async def evidence(self, challenge: Any) -> bytes:
        made = self.machine.evidence(challenge)
        if self._delta:
            made = wire.HostEvidence(
                **{name: getattr(made, name) for name in made.__slots__ if name != "ima"}, ima=self._delta
            )
            self._delta = b""
        return schema.encode(made)


class Chip:
    """A machine with a swtpm process of its own, booted by the firmware simulator."""

    def __init__(self, directory: Path) -> None:
        (directory / "state").mkdir(parents=True)
        self.simulated = SimulatedTpm(directory).start()
        self.tpm = Tpm.open(self.simulated.tcti)
        firmware.boot(self.tpm, directory / "logs", firmware.GOOD)
        self.ak = self.tpm.attestation_key()
        self._log = (directory / "logs" / firmware.EVENT_LOG).read_bytes()
        self._ima = (directory / "logs" / firmware.IMA_LIST).read_bytes()

    async def evidence(self, challenge: Any) -> bytes:
        quoted = await asyncio.to_thread(self.tpm.quote, challenge.nonce, tpm.ALG_SHA256, SELECTION)
        return schema.encode(
            wire.HostEvidence(
                quoted=quoted.attest,
                signature=quoted.signature,
                bank=tpm.ALG_SHA256,
                pcrs=tuple(wire.PcrValue(index=index, digest=value) for index, value in sorted(quoted.pcrs.items())),
                event_log=None if challenge.event_log_digest is not None else self._log,
                ima_from=challenge.ima_from,
                ima=b"" if challenge.ima_from else self._ima,
                location=None,
            )
        )

    def stop(self) -> None:
        self.simulated.stop()


class Host:
    """A machine under a name, on its line. After a failure it connects and asks anew."""

    def __init__(self, name: str, machine: Software | Chip, address: str, context: ssl.SSLContext, server: str) -> None:
        self.name, self.machine = name, machine
        self._where = (address, context, server)
        self._line: Line | None = None
        self._next: Any = None
        self._good_until = 0.0

    async def poll(self) -> str | None:
        """The code of the verdict. Raises OSError."""
        try:
            return await self._poll()
        except OSError:
            if self._line is not None:
                self._line.close()
            self._line = self._next = None
            raise

    async def _poll(self) -> str | None:
        if self._line is None or self._line.lost:
            self._line = await Line.open(*self._where)
        line = self._line
        challenge, self._next = self._next, None
        if challenge is None or time.monotonic() > self._good_until:  # as the agent does
            asked = schema.encode(wire.ChallengeRequest(host=self.name))
            challenge = SimpleNamespace(**cbor2.loads(await line.post(f"/v1/hosts/{self.name}/challenge", asked)))
        body = await self.machine.evidence(challenge)
        verdict = cbor2.loads(await line.post(f"/v1/hosts/{self.name}/evidence", body))
        self._next = SimpleNamespace(**verdict["next"])
        self._good_until = time.monotonic() + self._next.good_s - ANSWER_S
        code: str | None = verdict["code"]
        return code
