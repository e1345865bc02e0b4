"""IMA entries verified a second: against an allow-list of 100,000 files, and with a signature on every file.

The reference set is loaded once and shared by all hosts, as a verifier does. "First host" are lines that this process sees for
the first time; a list is replayed to the very last entry each time. Keylime 7.14 takes turns in the same run on the same list
with the same policy (skipped by name where it cannot be installed). Signatures are compared with bare verifications of the
same signatures by the same library.
"""

from __future__ import annotations

import gc
import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from peers.keylime import VERSION, Keylime

from moorline.clock import Instant, Validity
from moorline.evidence import ima as lists
from moorline.evidence.tpm_structures import ALG_SHA256
from moorline.policy import host
from moorline.policy.reference_values import Reference
from moorline.verification import ima, ima_signature

REFERENCE, ENTRIES, SIGNED, ROUNDS = 100_000, 20_000, 300, 9
BATCHES = 10


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def files() -> dict[bytes, frozenset[bytes]]:
    return {
        f"/usr/lib/x86_64-linux-gnu/package-{index % 997}/lib{index}.so.6".encode(): frozenset(
            {hashlib.sha256(index.to_bytes(4, "big")).digest()}
        )
        for index in range(REFERENCE)
    }


def entry(path: bytes, digest: bytes, template: str = "ima-ng", extra: bytes = b"") -> lists.ImaEntry:
    shape = lists.ImaEntry(10, b"", template, "sha256", digest, path, extra)
    measured = hashlib.sha1(shape.template_data()).digest()
    return lists.ImaEntry(10, measured, template, "sha256", digest, path, extra)


def text_of(entries: list[lists.ImaEntry]) -> bytes:
    return b"".join(lists.serialize_line(one) + b"\n" for one in entries)


class Host:
    """One host's list in pieces, as polls bring it: each goes on where the one before ended."""

    def __init__(self, entries: list[lists.ImaEntry]) -> None:
        size = len(entries) // BATCHES
        pieces = [entries[start : start + size] for start in range(0, len(entries), size)]
        self.pieces = []
        running = bytes(32)
        for piece in pieces:
            for one in piece:
                running = hashlib.sha256(running + hashlib.sha256(one.template_data()).digest()).digest()
            self.pieces.append((text_of(piece), running))
        self.count = len(entries)

    def appraise(self, reference: Reference, allowed: ima.AllowedLines | None) -> float:
        started = time.perf_counter()
        state, standing = ima.initial(ALG_SHA256), host.NO_FILES
        for data, quoted in self.pieces:
            read = ima.verify_ima(state, data, bank=ALG_SHA256, quoted=quoted, allowed=allowed)
            state = read.state
            standing = host.appraise_files(standing, read.entries, reference=reference, aggregate=b"", allowed=read.allowed)
        taken = time.perf_counter() - started
        assert (standing.entries, standing.unlisted) == (self.count, 0)
        return taken


def allow_listed(directory: Path) -> None:
    known = files()
    gc.collect()
    before, started = resident(), time.perf_counter()
    allowed = ima.AllowedLines.load(known, bank=ALG_SHA256, templates=("ima-ng",))
    loading, memory = time.perf_counter() - started, resident() - before
    reference = Reference(
        bank=ALG_SHA256,
        components={},
        files=known,
        valid=Validity(not_before=Instant(0), not_after=Instant(1)),
        digest=bytes(32),
    )
    chosen = list(known.items())[:: REFERENCE // ENTRIES][:ENTRIES]
    whole = [entry(path, next(iter(digests))) for path, digests in chosen]
    one = Host(whole)
    (directory / "list").write_bytes(text_of(whole))
    policy = {"digests": {path.decode(): [one.hex() for one in digests] for path, digests in known.items()}}
    peer = keylime(directory, policy)
    times: dict[str, list[float]] = {"shared": [], "long": [], "peer": [], "bare": []}
    first = one.appraise(reference, allowed)
    for _ in range(ROUNDS):
        times["shared"].append(one.appraise(reference, allowed))
        ima.forget_lines()  # the long way is what a line costs that no one knows
        times["long"].append(one.appraise(reference, None))
        times["bare"].append(bare_replay(whole))
        if peer is not None and len(times["peer"]) < 3:
            times["peer"].append(peer.ask(do="ima", list=str(directory / "list"), pcr=one.pieces[-1][1].hex()))
    theirs = ENTRIES / statistics.median(times["peer"]) if times["peer"] else None
    row("allow-listed, first host", ENTRIES / first, theirs)
    row("allow-listed, incremental, 10 polls", ENTRIES / statistics.median(times["shared"]), theirs)
    row("every line new, the long way", ENTRIES / statistics.median(times["long"]), theirs)
    row("bare SHA-256 extends, the physical limit", ENTRIES / statistics.median(times["bare"]), theirs)
    print(f"{'reference set of 100,000 files loaded in':<46}{loading * 1000:>10,.0f} ms   {memory / 2**20:.0f} MiB, shared")
    if theirs is not None and peer is not None:
        row(f"{VERSION}, whole list", theirs, None)
        peer.close()


def keylime(directory: Path, policy: dict) -> Keylime | None:
    document = {
        "meta": {"version": 1, "generator": 0},
        "release": 0,
        "excludes": [],
        "keyrings": {},
        "ima-buf": {},
        "ima": {"ignored_keyrings": [], "log_hash_alg": "sha1", "dm_policy": None},
        "verification-keys": "",
        **policy,
    }
    (directory / "policy").write_text(json.dumps(document))
    try:
        peer = Keylime()
        memory = peer.ask(do="policy", policy=str(directory / "policy"))
    except (OSError, subprocess.SubprocessError) as error:
        print(f"skipped: {VERSION} cannot be run here ({type(error).__name__})")
        return None
    print(f"{VERSION + ', its policy of the same files':<46}{'':>10}      {memory / 2**20:.0f} MiB")
    return peer


def bare_replay(entries: list[lists.ImaEntry]) -> float:
    extensions = [one.template_hash + bytes(12) for one in entries]
    started, running, hashed = time.perf_counter(), bytes(32), hashlib.sha256
    for extension in extensions:
        running = hashed(running + extension).digest()
    return time.perf_counter() - started


def signed() -> None:
    for name, key in (
        ("ECDSA P-256", ec.generate_private_key(ec.SECP256R1())),
        ("RSA-2048", rsa.generate_private_key(public_exponent=65537, key_size=2048)),
        ("RSA-4096", rsa.generate_private_key(public_exponent=65537, key_size=4096)),
    ):
        trusted = ima_signature.load_key(
            key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        )
        made = []
        for index in range(SIGNED):
            digest = hashlib.sha256(index.to_bytes(4, "little")).digest()
            signature = (
                key.sign(digest, ec.ECDSA(Prehashed(hashes.SHA256())))
                if isinstance(key, ec.EllipticCurvePrivateKey)
                else key.sign(digest, padding.PKCS1v15(), Prehashed(hashes.SHA256()))
            )
            head = b"\x03\x02\x04" + trusted.identifier + len(signature).to_bytes(2, "big")
            made.append((digest, signature, entry(b"/usr/bin/file-%d" % index, digest, "ima-sig", head + signature)))
        data = text_of([one for _, _, one in made])
        quoted = ima.replay([one for _, _, one in made], ALG_SHA256)
        times: dict[str, list[float]] = {"bare": [], "ours": []}
        for _ in range(ROUNDS):
            times["bare"].append(bare_verify(trusted, made))
            times["ours"].append(whole_verify(trusted, data, quoted))
        bare, ours = (SIGNED / statistics.median(times[one]) for one in ("bare", "ours"))
        print(f"{'signed entries, ' + name:<46}{ours:>10,.0f}/s   {ours / bare:.2f} of bare verification ({bare:,.0f}/s)")


def bare_verify(trusted: ima_signature.FileKey, made: list) -> float:
    public, started = trusted.key, time.perf_counter()
    for digest, signature, _ in made:
        if isinstance(public, ec.EllipticCurvePublicKey):
            public.verify(signature, digest, ec.ECDSA(Prehashed(hashes.SHA256())))
        else:
            public.verify(signature, digest, padding.PKCS1v15(), Prehashed(hashes.SHA256()))
    return time.perf_counter() - started


def whole_verify(trusted: ima_signature.FileKey, data: bytes, quoted: bytes) -> float:
    ima.forget_lines()  # every line is new
    started = time.perf_counter()
    read = ima.verify_ima(ima.initial(ALG_SHA256), data, bank=ALG_SHA256, quoted=quoted)
    keys = [trusted]
    for one in read.entries:
        assert ima_signature.is_signed(one, keys)
    return time.perf_counter() - started


def row(name: str, rate: float, peer: float | None) -> None:
    against = "" if peer is None else f"   {rate / peer:.1f} x {VERSION}"
    print(f"{name:<46}{rate:>10,.0f}/s{against}")


def main() -> int:
    with tempfile.TemporaryDirectory() as directory:
        allow_listed(Path(directory))
    signed()
    return 0


if __name__ == "__main__":
    sys.exit(main())
