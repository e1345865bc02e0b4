"""One poll of a host that stands: a fresh quote, nothing new in its logs. CPU time of the verifier, and memory for each host.

Three rows of ours: the pure core (quote, clock, logs as held, policy, result to be signed), the whole attestation authority with
its SQLite store (challenge and appraisal: nonce given, nonce taken, progress and result; each transaction is written through to disk), and a bare P-256
verification. Keylime's own quote check and an empty measurement list take turns in the same run (skipped by name where it
cannot be installed): no policy, boot state, result or database of its own is in that figure, so it is less work than our core.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import secrets
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from peers.keylime import VERSION, Keylime

from moorline.clock import Clock, Instant
from moorline.evidence import eventlog as log
from moorline.evidence import ima as lists
from moorline.evidence import tpm_structures as tpm
from moorline.evidence.tpm_quote import ClockInfo, Quote, serialize_quote
from moorline.ledger.records import PlatformRecord, Status
from moorline.policy import ear, host, reference_values
from moorline.policy.host_alike import AlikeHosts
from moorline.rats import EvidenceRoot
from moorline.services.attestation_authority import AttestationAuthority
from moorline.services.host_appraisal import Terms
from moorline.services.verifier_parts import Parts, Sign
from moorline.simulators import firmware
from moorline.storage.verifier_rounds import EnrolledHost
from moorline.storage.verifier_store import VerifierStore
from moorline.verification import ima, tpm_quote
from moorline.verification.eventlog import replay, verify_boot
from moorline.verification.tpm_revocation import Revocation
from moorline.wire import host as wire
from moorline.wire import keys

NOW, LEASE = Instant(1_790_000_000), 60
SELECTION = tuple(range(11))
POLLS, ROUNDS, HOSTS = 200, 7, 300
TERMS = Terms(lease_s=LEASE, challenge_s=30, pcrs=SELECTION, not_required={"location": "not asked in this benchmark"})


class SetClock:
    def now(self) -> Instant:
        return NOW


def ak_public(key: ec.EllipticCurvePrivateKey) -> bytes:
    """TPMT_PUBLIC of an attestation key whose private half is in this process."""
    numbers = key.public_key().public_numbers()
    parameters = tpm.EccParameters(
        symmetric=(tpm.ALG_NULL, 0, 0),
        scheme=tpm.ALG_ECDSA,
        scheme_hash=tpm.ALG_SHA256,
        scheme_count=0,
        curve=tpm.CURVE_P256,
        kdf=tpm.ALG_NULL,
        kdf_hash=0,
        x=numbers.x.to_bytes(32, "big"),
        y=numbers.y.to_bytes(32, "big"),
    )
    return tpm.serialize_public(
        tpm.Public(name_algorithm=tpm.ALG_SHA256, attributes=0x50472, policy=b"", parameters=parameters, encoded=b"")
    )


class Machine:
    """A host with a signing TPM in software, its boot log and its IMA list."""

    def __init__(self, *, extra: tuple[str, bytes] | None = None, key: ec.EllipticCurvePrivateKey | None = None) -> None:
        self.key = key or ec.generate_private_key(ec.SECP256R1())
        self.ak = ak_public(self.key)
        self.log = firmware.serialize_log(firmware.boot_events(firmware.GOOD))
        values = replay(log.parse_event_log(self.log), tpm.ALG_SHA256)
        self.pcrs = {index: values.get(index, bytes(32)) for index in range(10)}
        aggregate = ima.boot_aggregate(self.pcrs)
        entries = [_entry("boot_aggregate", aggregate)]
        files = (*firmware.GOOD.files, *(() if extra is None else (extra,)))
        entries += [_entry(path, hashlib.sha256(content).digest()) for path, content in files]
        self.ima = b"".join(lists.serialize_line(one) + b"\n" for one in entries)
        self.pcrs[10] = ima.replay(entries, tpm.ALG_SHA256)
        self.clock = 1000

    def quote(self, nonce: bytes) -> tuple[bytes, bytes]:
        self.clock += 1
        digest = tpm.digest(tpm.ALG_SHA256, b"".join(self.pcrs[index] for index in SELECTION))
        clock = ClockInfo(self.clock, 1, 0, safe=True)
        chosen = (tpm.select(tpm.ALG_SHA256, SELECTION),)
        message = serialize_quote(Quote(b"\x00\x0b" + bytes(32), nonce, clock, 7, chosen, digest))
        raw = keys.KeySigner(self.key).sign(message)
        return message, tpm.serialize_signature(tpm.Signature(tpm.ALG_ECDSA, tpm.ALG_SHA256, raw[:32], raw[32:]))

    def evidence(self, challenge: wire.HostChallenge) -> wire.HostEvidence:
        message, signature = self.quote(challenge.nonce)
        held = challenge.event_log_digest is not None
        return wire.HostEvidence(
            quoted=message,
            signature=signature,
            bank=tpm.ALG_SHA256,
            pcrs=tuple(wire.PcrValue(index=index, digest=digest) for index, digest in sorted(self.pcrs.items())),
            event_log=None if held else self.log,
            ima_from=challenge.ima_from,
            ima=b"" if challenge.ima_from else self.ima,
            location=None,
        )


def _entry(path: str, digest: bytes) -> lists.ImaEntry:
    shape = lists.ImaEntry(10, b"", "ima-ng", "sha256", digest, path.encode(), b"")
    measured = hashlib.sha1(shape.template_data()).digest()
    return lists.ImaEntry(10, measured, "ima-ng", "sha256", digest, path.encode(), b"")


class Core:
    """What of a poll needs neither store nor network: every step of the authority, on what it holds of a standing host."""

    def __init__(self, machine: Machine, reference: reference_values.Reference) -> None:
        self.machine, self.reference = machine, reference
        self.alike = AlikeHosts(host.strict_policy(self.reference, not_required=TERMS.not_required), self.reference)
        self.writer = ear.Writer("alpha.test")
        self.key = tpm_quote.attestation_key(machine.ak, EvidenceRoot.TEST)
        boot_pcrs = {index: machine.pcrs[index] for index in range(10)}
        parsed = log.parse_event_log(machine.log)
        self.boot = verify_boot(parsed, bank=tpm.ALG_SHA256, quoted=boot_pcrs, pcrs=boot_pcrs)
        self.digest = hashlib.sha256(machine.log).digest()
        read = ima.verify_ima(ima.initial(tpm.ALG_SHA256), machine.ima, bank=tpm.ALG_SHA256, quoted=machine.pcrs[10])
        self.state = read.state
        aggregate = ima.boot_aggregate(machine.pcrs)
        self.files = host.appraise_files(host.NO_FILES, read.entries, reference=self.reference, aggregate=aggregate)
        self.before = ClockInfo(1, 1, 0, safe=True)

    def poll(self, message: bytes, signature: bytes, nonce: bytes) -> bytes:
        quote = tpm_quote.verify_quote(
            message,
            signature,
            self.machine.pcrs,
            key=self.key,
            qualifying=nonce,
            bank=tpm.ALG_SHA256,
            selection=SELECTION,
        )
        tpm_quote.verify_progress(self.before, quote.value.clock)
        self.before = quote.value.clock
        quoted = quote.value.pcrs
        read = ima.verify_ima(self.state, b"", bank=tpm.ALG_SHA256, quoted=quoted[10])
        facts = host.HostFacts(
            host="h1",
            ek_digest=bytes(32),
            chip_id=bytes(64),
            quote=quote,
            boot=self.boot,
            boot_digest=self.digest,
            files=host.appraise_files(
                self.files, read.entries, reference=self.reference, aggregate=ima.boot_aggregate(quoted)
            ),
            location=None,
        )
        appraisal = host.Appraisal(
            verifier="spiffe://alpha.test/verifier/v1",
            issued=NOW,
            expires=Instant(NOW + LEASE),
            nonce=nonce,
            simulated_allowed=True,
        )
        result = self.alike.appraise(facts, appraisal)
        assert result.first_refusal() is None, result.first_refusal()
        return self.writer.signing_input(result)


def reference_of() -> reference_values.Reference:
    """What the machines of this benchmark are allowed to boot and run."""
    return firmware_values(NOW)


def firmware_values(now: Instant) -> reference_values.Reference:
    """The same, valid now."""
    values = firmware.reference_values(
        firmware.GOOD, name="good", not_before=Instant(now - 1000), not_after=Instant(now + 10**6)
    )
    return reference_values.merge([values])


async def platforms(names: tuple[str, ...]) -> dict[str, PlatformRecord]:
    """A platform record for any host, of the endorsement key `enrol` gives it."""
    return {name: _platform(name, hashlib.sha256(name.encode()).digest()) for name in names}


def _platform(name: str, ek_digest: bytes) -> PlatformRecord:
    return PlatformRecord(
        provider="alpha",
        id=name,
        status=Status.ACTIVE,
        chip_id=bytes(64),
        product="Milan",
        ek_digest=ek_digest,
        location="EU/DE",
        tag_digest=bytes(32),
        simulated=True,
    )


def authority(directory: Path, reference: reference_values.Reference) -> tuple[AttestationAuthority, VerifierStore]:
    async def sign(messages: tuple[bytes, ...]) -> tuple[bytes, ...]:  # the broker's key signs: not the verifier's CPU
        return (bytes(64),) * len(messages)

    store = VerifierStore.open(directory / "verifier.db")
    return authority_with(store, reference, sign=sign, clock=SetClock()), store


def authority_with(
    store: VerifierStore, reference: reference_values.Reference, *, sign: Sign, clock: Clock
) -> AttestationAuthority:
    return AttestationAuthority(
        Parts(
            verifier="spiffe://alpha.test/verifier/v1",
            audience="alpha.test",
            terms=TERMS,
            anchors=(),
            simulated_allowed=True,
            reference=reference,
            signers=(),
            revocation=lambda: Revocation(crls=(), not_required={EvidenceRoot.TEST: "nobody enrols in this benchmark"}),
            platforms=platforms,
            sign=sign,
            store=store,
            clock=clock,
            random=secrets.token_bytes,
        )
    )


def enrol(store: VerifierStore, name: str, machine: Machine) -> None:
    digest = hashlib.sha256(name.encode()).digest()
    store.enrol(EnrolledHost(host=name, ek_digest=digest, ak_public=machine.ak, root=EvidenceRoot.TEST, enrolled=NOW))


async def whole(served: AttestationAuthority, machine: Machine, name: str) -> tuple[float, float]:
    """CPU and wall seconds that the authority spent on one poll; the making of the quote is not its work."""
    cpu, wall = time.process_time(), time.perf_counter()
    challenge = served.challenge(name)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    evidence = machine.evidence(challenge)
    again, later = time.process_time(), time.perf_counter()
    verdict = await served.appraise(name, evidence)
    assert verdict.code is None, verdict.code
    return cpu + time.process_time() - again, wall + time.perf_counter() - later


def memory(served: AttestationAuthority, store: VerifierStore, machine: Machine, directory: Path) -> None:
    gc.collect()
    disk = _size(directory)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for index in range(HOSTS):
        enrol(store, f"idle{index}", machine)
        asyncio.run(whole(served, machine, f"idle{index}"))
    gc.collect()
    grown, written = tracemalloc.get_traced_memory()[0] - before, _size(directory) - disk
    tracemalloc.stop()
    print(
        f"{f'memory per idle host, of {HOSTS}':<52}{grown / HOSTS / 1024:>8.1f} KiB of live objects, on disk {written / HOSTS / 1024:.1f} KiB"
    )


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir() if not path.name.endswith(("-wal", "-shm")))


def pcr_blob(machine: Machine) -> bytes:
    """PCR values as tpm2-tools writes them from memory (TPML_PCR_SELECTION, then TPML_DIGEST of eight each)."""
    chosen = sum(1 << index for index in SELECTION)
    made = struct.pack("<IHB3sH", 1, tpm.ALG_SHA256, 3, chosen.to_bytes(3, "little"), 0) + bytes(8 * 15)
    values = [machine.pcrs[index] for index in SELECTION]
    groups = [values[start : start + 8] for start in range(0, len(values), 8)]
    made += struct.pack("<I", len(groups))
    for group in groups:
        made += struct.pack("<I", len(group))
        for value in [*group, *[b""] * (8 - len(group))]:
            made += struct.pack("<H", len(value)) + value.ljust(64, b"\x00")
    return made


def peer_of(machine: Machine) -> tuple[Keylime, Callable[[], float]] | None:
    nonce = "0123456789abcdef0123"
    message, signature = machine.quote(nonce.encode())
    pem = machine.key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    job = {
        "do": "quote",
        "quote": message.hex(),
        "signature": signature.hex(),
        "pcrs": pcr_blob(machine).hex(),
        "key": pem.decode(),
        "nonce": nonce,
        "count": POLLS,
    }
    try:
        peer = Keylime()
        peer.ask(**job)
    except (OSError, subprocess.SubprocessError) as error:
        print(f"skipped: {VERSION} cannot be run here ({type(error).__name__})")
        return None
    return peer, lambda: peer.ask(**job)


def cpu_seconds(call: Callable[[], object]) -> float:
    started = time.process_time()
    for _ in range(POLLS):
        call()
    return time.process_time() - started


async def polls(served: AttestationAuthority, machine: Machine) -> tuple[float, float]:
    spent = [await whole(served, machine, "h1") for _ in range(POLLS)]
    return sum(one[0] for one in spent), sum(one[1] for one in spent)


def main() -> int:
    machine = Machine()
    reference = reference_of()
    core = Core(machine, reference)
    message, signature = machine.quote(bytes(range(32)))
    der, scheme = machine.key.sign(message, ec.ECDSA(hashes.SHA256())), ec.ECDSA(hashes.SHA256())
    public = machine.key.public_key()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        served, store = authority(directory, reference)
        enrol(store, "h1", machine)
        asyncio.run(whole(served, machine, "h1"))
        peer = peer_of(machine)
        times: dict[str, list[float]] = {"bare": [], "core": [], "store": [], "wall": [], "peer": []}
        for _ in range(ROUNDS):
            times["bare"].append(cpu_seconds(lambda: public.verify(der, message, scheme)))
            times["core"].append(cpu_seconds(lambda: core.poll(message, signature, bytes(range(32)))))
            cpu, wall = asyncio.run(polls(served, machine))
            times["store"].append(cpu)
            times["wall"].append(wall)
            if peer is not None:
                times["peer"].append(peer[1]())
        each = {one: statistics.median(taken) / POLLS * 1000 for one, taken in times.items() if taken}
        report(each)
        if peer is not None:
            peer[0].close()
        memory(served, store, machine, directory)
    return 0


def report(each: dict[str, float]) -> None:
    names = {
        "bare": "bare P-256 verification",
        "core": "standing poll, pure core, CPU (target <= 0.5)",
        "store": "standing poll, authority with SQLite, CPU",
        "wall": "standing poll, authority with SQLite, wall",
        "peer": f"{VERSION} quote check and empty list, CPU",
    }
    for one, spent in each.items():
        against = f"   {spent / each['peer']:.2f} of {VERSION}" if "peer" in each and one != "peer" else ""
        print(f"{names[one]:<52}{spent:>8.3f} ms   {spent / each['bare']:.1f} x bare{against}")


if __name__ == "__main__":
    sys.exit(main())
