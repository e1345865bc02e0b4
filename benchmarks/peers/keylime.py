"""Keylime as a peer: its own verification functions in its own process and virtual environment (.dev/peers), warm.

Only what stands in for its verifier's core is called; its database, web server and agent are not started. Its `gpg` binding,
which is no wheel and is used for signing allow-lists only, is replaced by an empty module.
"""

from __future__ import annotations

import json
import subprocess
import venv
from pathlib import Path

VERSION = "keylime==7.14.0"
_NEEDS = ("jsonschema", "cryptography", "sqlalchemy", "packaging", "pyyaml", "lark", "tornado", "requests", "pyasn1")
_MORE = ("pyasn1-modules", "psutil")
_HOME = Path(__file__).parents[2] / ".dev" / "peers" / VERSION.replace("==", "-")
_PROGRAM = """
import json, logging, sys, time, types
sys.modules["gpg"] = types.ModuleType("gpg")
logging.disable(logging.CRITICAL)
from keylime.common.algorithms import Hash
from keylime.ima import ima
from keylime.tpm import tpm_util

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

def load_policy(job):
    before = resident()
    policy = ima.deserialize_runtime_policy(open(job["policy"]).read())
    return policy, resident() - before

def run_ima(job, policy):
    lines = open(job["list"], errors="surrogateescape").read().split("\\n")
    started = time.perf_counter()
    _, failure = ima.process_measurement_list(None, lines, policy, pcrval=job["pcr"], hash_alg=Hash.SHA256)
    taken = time.perf_counter() - started
    assert not failure, failure.events
    return taken

def run_quote(job):
    blobs = [bytes.fromhex(job[name]) for name in ("signature", "quote", "pcrs")]
    key, nonce = job["key"].encode(), job["nonce"]
    started = time.process_time()
    for _ in range(job["count"]):
        found = tpm_util.checkquote(key, nonce, blobs[0], blobs[1], blobs[2], "sha256")
        ima.process_measurement_list(None, [""], None, pcrval=None, hash_alg=Hash.SHA256)
    assert found
    return time.process_time() - started

policy = None
for line in sys.stdin:
    job = json.loads(line)
    if job["do"] == "policy":
        policy, answer = load_policy(job)
    elif job["do"] == "ima":
        answer = run_ima(job, policy)
    else:
        answer = run_quote(job)
    print(json.dumps(answer), flush=True)
"""


class Keylime:
    """The peer's process. Raises OSError or subprocess.SubprocessError where it cannot be installed or started."""

    def __init__(self) -> None:
        python = _HOME / "bin" / "python"
        if not (_HOME / "complete").is_file():
            venv.create(_HOME, with_pip=True)
            wanted = [VERSION, *_NEEDS, *_MORE]
            subprocess.run([python, "-m", "pip", "install", "-q", *wanted], check=True, timeout=300, capture_output=True)
            (_HOME / "complete").touch()
        self._process = subprocess.Popen(
            [python, "-c", _PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            bufsize=1,
        )

    def ask(self, **job: object) -> float:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        answer = self._process.stdout.readline()
        if not answer:
            raise subprocess.SubprocessError("keylime ended")
        return float(json.loads(answer))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)
