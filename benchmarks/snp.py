"""SNP reports verified per second, warm, against the one P-384 verification each needs, in the same library and run.

Evidence is simulated silicon's: the arithmetic is the same as for a real chip. The kinds of work take turns, and a ratio is
the median over rounds of the ratio within a round, so that a machine that slows down slows both sides of it.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from moorline.clock import SystemClock
from moorline.evidence.snp import SIGNED_BYTES, parse_report
from moorline.policy.match import AtLeast, Exact
from moorline.policy.snp import appraise_snp, require_snp, strict_policy
from moorline.simulators import guest_image
from moorline.simulators.manufacturer import create_manufacturer, open_chip
from moorline.simulators.silicon import GuestContext, Silicon, guest_policy
from moorline.verification import snp as verification
from moorline.verification.anchors import parse_anchor_file
from moorline.verification.snp import endorsements_from_table, verify_snp

ROUNDS, REPORTS = 21, 50


def run() -> list[dict[str, object]]:
    now = SystemClock().now()
    with tempfile.TemporaryDirectory() as directory:
        started = time.perf_counter()
        maker = create_manufacturer(Path(directory), now=now)
        made = time.perf_counter() - started
        anchors = parse_anchor_file(maker.anchors_path.read_bytes())
        chip = open_chip(maker.make_chip("bench", now=now))
    guest = GuestContext(measurement=b"m" * 48, host_data=b"h" * 32, policy=guest_policy(debug=False), report_id=bytes(32))
    silicon = Silicon(chip)
    asked = [bytes([index]) * 64 for index in range(REPORTS)]
    evidence = [silicon.report(guest, report_data) for report_data in asked]
    policy = strict_policy(
        measurement=Exact(guest.measurement),
        host_data=Exact(guest.host_data),
        chip_id=Exact(chip.chip_id),
        product=Exact(chip.product),
        minimum_tcb=AtLeast(chip.tcb),
    )
    key, algorithm = chip.key.public_key(), ec.ECDSA(hashes.SHA384())
    parsed = [parse_report(item.outblob) for item in evidence]
    bare_inputs = [
        (encode_dss_signature(report.signature_r, report.signature_s), item.outblob[:SIGNED_BYTES])
        for report, item in zip(parsed, evidence, strict=True)
    ]

    def bare() -> None:
        for signature, signed in bare_inputs:
            key.verify(signature, signed, algorithm)

    def warm() -> None:
        for item, report_data in zip(evidence, asked, strict=True):
            endorsements = endorsements_from_table(item.auxblob)
            verify_snp(parse_report(item.outblob), endorsements, report_data=report_data, anchors=anchors, now=now)

    def appraised() -> None:
        for item, report_data in zip(evidence, asked, strict=True):
            endorsements = endorsements_from_table(item.auxblob)
            verified = verify_snp(
                parse_report(item.outblob), endorsements, report_data=report_data, anchors=anchors, now=now
            )
            require_snp(appraise_snp(verified, policy, simulated_allowed=True))

    def cold() -> None:
        for item, report_data in zip(evidence, asked, strict=True):
            verification._judge_chain.cache_clear()  # noqa: SLF001 - what a chip costs that was never seen
            endorsements = endorsements_from_table(item.auxblob)
            verify_snp(parse_report(item.outblob), endorsements, report_data=report_data, anchors=anchors, now=now)

    rates, ratios = _in_turns({"bare": bare, "warm": warm, "appraised": appraised, "cold": cold})
    started = time.perf_counter()
    guest_image.measure("moorline.attesters.collect")
    measured = time.perf_counter() - started
    return [
        {"what": "bare P-384 verifications", "per_s": rates["bare"], "ratio": 1.0},
        {"what": "SNP reports verified, warm (table, parse, verify)", "per_s": rates["warm"], "ratio": ratios["warm"]},
        {
            "what": "SNP reports verified and appraised, warm",
            "per_s": rates["appraised"],
            "ratio": ratios["appraised"],
        },
        {"what": "SNP reports verified, unknown chip", "per_s": rates["cold"], "ratio": ratios["cold"]},
        {"what": "measure a guest image offline, ms", "ms": measured * 1000},
        {"what": "make a simulated manufacturer (two RSA-4096 keys), ms", "ms": made * 1000},
    ]


def _in_turns(work: dict[str, object]) -> tuple[dict[str, float], dict[str, float]]:
    times: dict[str, list[float]] = {name: [] for name in work}
    for round_number in range(ROUNDS):
        for name, call in work.items():
            started = time.perf_counter()
            call()
            if round_number:  # the first fills caches
                times[name].append(time.perf_counter() - started)
    rates = {name: REPORTS / statistics.median(taken) for name, taken in times.items()}
    ratios = {
        name: statistics.median(bare / own for bare, own in zip(times["bare"], taken, strict=True))
        for name, taken in times.items()
    }
    return rates, ratios


def main() -> int:
    for row in run():
        rate = f"{row['per_s']:>10,.0f}/s" if "per_s" in row else f"{row['ms']:>10,.0f} ms"
        ratio = f"   {row['ratio']:.2f} of bare" if "ratio" in row else ""
        print(f"{row['what']:<58}{rate}{ratio}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
