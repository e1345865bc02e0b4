"""TDX and SGX quotes verified per second with pre-verified collateral, against bare P-256 and PyPI dcap-qvl.

Quotes and collateral are real ones of ../shared/vectors (skipped by name where that is absent). The peer has a virtual
environment of its own, made for this run (skipped by name where it cannot be installed), and takes turns with us. It
verifies its collateral each time: that is how its interface works, and what keeping verified statements saves.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from moorline.clock import Instant
from moorline.evidence.sgx_quote import parse_sgx_quote
from moorline.evidence.tdx_quote import parse_tdx_quote
from moorline.verification import intel_collateral, intel_pck
from moorline.verification.intel_collateral import Collateral
from moorline.verification.intel_endorsements import assemble
from moorline.verification.intel_pck import production_intel_anchors
from moorline.verification.sgx import verify_sgx
from moorline.verification.tdx import verify_tdx

VECTORS = Path(__file__).parents[1].parent / "shared" / "vectors"
CASES = (
    ("TDX", "tdx/tdx-v4-phala-uptodate", parse_tdx_quote, verify_tdx),
    ("SGX", "sgx/sgx-v3-phala-cfg-sw-hardening", parse_sgx_quote, verify_sgx),
)
PEER = "dcap-qvl==0.7.0"
ROUNDS, QUOTES = 15, 40
_PEER_PROGRAM = """
import dcap_qvl, json, sys, time
jobs = {}
for name, quote, collateral, now in json.loads(sys.stdin.readline()):
    data = dcap_qvl.QuoteCollateralV3.from_json(open(collateral).read())
    jobs[name] = (open(quote, "rb").read(), data, now)
for line in sys.stdin:
    name, count = line.split()
    quote, data, now = jobs[name]
    started = time.perf_counter()
    for _ in range(int(count)):
        dcap_qvl.verify(quote, data, now)
    print(time.perf_counter() - started, flush=True)
"""


class Peer:
    """The other library in its own process; `seconds` asks it for a turn."""

    def __init__(self, directory: Path, jobs: list[tuple[str, str, str, int]]) -> None:
        venv.create(directory, with_pip=True)
        python = directory / "bin" / "python"
        subprocess.run([python, "-m", "pip", "install", "-q", PEER], check=True, timeout=180, capture_output=True)
        self._process = subprocess.Popen(
            [python, "-c", _PEER_PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self._send(json.dumps(jobs))

    def seconds(self, name: str) -> float:
        self._send(f"{name} {QUOTES}")
        assert self._process.stdout is not None
        return float(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)

    def _send(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()


def timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    for _ in range(QUOTES):
        call()
    return time.perf_counter() - started


def bare() -> Callable[[], object]:
    key, algorithm, data = ec.generate_private_key(ec.SECP256R1()), ec.ECDSA(hashes.SHA256()), bytes(632)
    public, signature = key.public_key(), key.sign(data, algorithm)
    return lambda: (public.verify(signature, data, algorithm), public.verify(signature, data, algorithm))


def ours(case: tuple) -> tuple[Callable[[], object], Callable[[], object], tuple[str, str, str, int]]:
    family, name, parse, verify = case
    folder = VECTORS / name
    now = Instant(int(datetime.fromisoformat(json.loads((folder / "case.json").read_text())["at"]).timestamp()))
    data = (folder / "quote.bin").read_bytes()
    given = assemble([("collateral-json", (folder / "collateral.json").read_bytes())])
    anchors = production_intel_anchors()

    def warm() -> None:
        quote = parse(bytes(bytearray(data)))  # new bytes each time, as they come from outside
        expected = quote.report.report_data
        verify(quote, given, report_data=expected, collateral=Collateral.FULL, anchors=anchors, now=now)

    def cold() -> None:
        intel_pck.judge_chain.cache_clear()
        intel_pck.judge_crl.cache_clear()
        intel_collateral._judge_tcb_info.cache_clear()  # noqa: SLF001 - what a platform costs that was never seen
        intel_collateral._judge_qe_identity.cache_clear()  # noqa: SLF001
        warm()

    return warm, cold, (family, str(folder / "quote.bin"), str(folder / "collateral.json"), now)


def main() -> int:
    if not VECTORS.is_dir():
        print("skipped: ../shared/vectors is not here")
        return 0
    work = {case[0]: ours(case) for case in CASES}
    two = bare()
    calls: dict[str, Callable[[], float]] = {"two bare P-256 verifications": lambda: timed(two)}
    for family, (warm, cold, _) in work.items():
        calls[f"{family} quotes verified, collateral verified before"] = lambda call=warm: timed(call)
        calls[f"{family} quotes verified, everything new"] = lambda call=cold: timed(call)
    with tempfile.TemporaryDirectory() as directory:
        peer = None
        try:
            peer = Peer(Path(directory), [job for _, _, job in work.values()])
            for family in work:
                calls[f"{family} quotes verified by {PEER}"] = lambda name=family: peer.seconds(name)
        except (subprocess.SubprocessError, OSError) as error:
            print(f"skipped: {PEER} cannot be installed here ({type(error).__name__})")
        times: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(ROUNDS + 1):
            for name, call in calls.items():
                taken = call()
                if turn:  # the first fills caches
                    times[name].append(taken)
        if peer is not None:
            peer.close()
    report({name: QUOTES / statistics.median(taken) for name, taken in times.items()})
    return 0


def report(rates: dict[str, float]) -> None:
    base = rates["two bare P-256 verifications"]
    for name, rate in rates.items():
        theirs = rates.get(f"{name[:3]} quotes verified by {PEER}")
        against = f"   {rate / theirs:.2f} of {PEER}" if theirs is not None and "by" not in name.split() else ""
        print(f"{name:<52}{rate:>10,.0f}/s   {rate / base:.2f} of two bare verifications{against}")


if __name__ == "__main__":
    sys.exit(main())
