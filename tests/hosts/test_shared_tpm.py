"""A TPM without a resource manager serves one client at a time: the agent attests while the firmware goes on measuring."""

import threading

from moorline.attesters.tpm import Tpm
from moorline.errors import Unavailable
from moorline.evidence.tpm_structures import ALG_SHA256
from moorline.simulators import firmware

RUNS = 12


def test_quotes_and_measurements_side_by_side(running, tmp_path):
    """Verifies that: neither client locks the other out, and every file that ran is in PCR 10 afterwards."""
    tcti = running[0].tcti
    agent, machine = Tpm.open(tcti), Tpm.open(tcti)
    firmware.boot(machine, tmp_path, firmware.GOOD)
    before = agent.read_pcrs(ALG_SHA256, (10,))
    problems: list[Exception] = []
    ran = threading.Event()

    def run_files():
        try:
            for number in range(RUNS):
                firmware.execute(machine, tmp_path, f"/usr/bin/tool-{number}", b"SIMULATED tool")
        except Exception as error:
            problems.append(error)
        ran.set()

    running_files = threading.Thread(target=run_files)
    running_files.start()
    while not ran.is_set():
        try:
            agent.quote(b"n" * 32, ALG_SHA256, tuple(range(11)))
        except Unavailable as error:
            assert error.code == "tpm.pcrs_in_motion"  # said so, and asked again
    running_files.join()
    assert problems == []
    quoted = agent.quote(b"n" * 32, ALG_SHA256, (10,))
    assert quoted.pcrs != before
    assert len((tmp_path / firmware.IMA_LIST).read_text().splitlines()) == 2 + len(firmware.GOOD.files) + RUNS
