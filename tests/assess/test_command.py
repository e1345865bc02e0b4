"""`moor host assess` as people run it: on this machine for real, as root and not, and wrongly.

verifies that: the report comes without set-up; exit codes are 0, 1 with --require, 2 and 64 for wrong use.
"""

import json
import os
import subprocess
import sys
import time

import machines
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from moorline.clock import Instant
from moorline.policy import ear
from moorline.policy.sec009 import report
from moorline.rats import AR4SI_CLAIMS, Assurance, AttestationResult, CapabilityLevel, EvidenceRoot, Tier
from moorline.wire import keys

EXTRAS = (
    "pkcs11",
    "tpm2_pytss",
    "fastapi",
    "uvicorn",
    "httpx",
    "OpenSSL",
    "sqlalchemy",
    "alembic",
    "cedarpy",
    "structlog",
    "yaml",
)
BASE = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {EXTRAS!r}:
            raise ModuleNotFoundError(name=name)
sys.meta_path.insert(0, Absent())
from moorline.cli import run
sys.exit(run(sys.argv[1:]))
"""


def moor(*words, **how):
    return subprocess.run(
        [sys.executable, "-c", BASE, "host", "assess", *map(str, words)], capture_output=True, text=True, check=False, **how
    )


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    return machines.write(tmp_path_factory.mktemp("server"), machines.server())


def test_this_machine_for_real_with_the_base_install_only():
    done = moor("--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = report.parse_report(done.stdout.encode())
    assert found["privileged"] is (os.geteuid() == 0)
    assert found["host"] == os.uname().nodename
    assert not [one for one in found["capabilities"] if one["assurance"] in ("measured", "hw_attested")]


@pytest.mark.skipif(os.geteuid() != 0, reason="takes root to become somebody else")
def test_this_machine_as_somebody_without_rights():
    try:
        done = moor("--json", user=65534, group=65534, extra_groups=[])
    except PermissionError:
        pytest.skip("this checkout is where nobody else may look")
    assert (done.returncode, done.stderr) == (0, "")
    found = report.parse_report(done.stdout.encode())
    assert found["privileged"] is False
    mine = report.parse_report(moor("--json").stdout.encode())
    met = {one["id"] for one in found["capabilities"] if one["status"] == "met"}
    assert met <= {one["id"] for one in mine["capabilities"] if one["status"] == "met"}


def test_the_terminal_report_says_it_all(server):
    done = moor("--root", server, "-v")
    assert done.returncode == 0
    for words in (
        "SEC009 assessment of server-1",
        "Approach: 7.2.2.1",
        "4.5 Lawful Interception: not yet",
        "Roadmap",
        "/sys/",
    ):
        assert words in done.stdout


def test_the_terminal_report_begins_with_what_matters_and_ends_with_what_to_do_next(tmp_path):
    """verifies that: who reads the first lines knows how many, for which use cases, and what to do first."""
    done = moor("--root", tmp_path)
    first = "\n".join(done.stdout.splitlines()[:6])
    found = report.parse_report(moor("--root", tmp_path, "--json").stdout.encode())
    counts = {status: sum(one["status"] == status for one in found["capabilities"]) for status in ("met", "not_met")}
    assert f"{len(found['capabilities'])} capabilities: {counts['met']} met, " in first
    assert f"{counts['not_met']} not met" in first
    assert "May host none of 7 use cases." in first
    assert "First, for 7 of them: " in first
    assert "moor host assess diff" in done.stdout.splitlines()[-2]
    assert "moor host probe" in done.stdout.splitlines()[-1]


def test_a_report_that_cannot_be_written_says_what_to_do(tmp_path):
    done = moor("--root", tmp_path, "--html", tmp_path / "nowhere" / "x.html")
    assert done.returncode == 2
    assert "next: name a file" in done.stderr


def test_hostile_text_does_not_reach_the_terminal(tmp_path):
    done = moor("--root", machines.hostile(tmp_path), "-v")
    assert done.returncode == 0
    assert "\x1b" not in done.stdout
    assert "\x07" not in done.stdout


def test_forms_go_to_files_or_to_standard_output(server, tmp_path):
    done = moor("--root", server, "--html", tmp_path / "a.html", "--sarif", tmp_path / "a.sarif", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["host"] == "server-1"
    assert json.loads((tmp_path / "a.sarif").read_text())["version"] == "2.1.0"
    assert (tmp_path / "a.html").read_text().startswith("<!doctype html>")
    assert json.loads(moor("--root", server, "--sarif", "-").stdout)["version"] == "2.1.0"
    assert moor("--root", server, "--html", "-").stdout.startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--require", "4.7"], 1, "4.7 may not be hosted"),
        (["--require", "4.8"], 64, "a use case is one of"),
        (["--root", "/nowhere"], 2, "assess.root"),
        (["--json", "--html", "-"], 2, "assess.outputs"),
        (["--noise", "x"], 2, "assess.noise"),
        (["--verifier-key", "x"], 2, "assess.result"),
        (["--html", "/nowhere/x.html"], 2, "assess.write"),
        (["--wrong"], 64, "No such option"),
        (["diff", "/nowhere", "/nowhere"], 2, "cli.file"),
    ],
)
def test_exit_codes(server, words, code, says):
    done = moor(*([] if "--root" in words else ["--root", server]), *words)
    assert done.returncode == code, done.stderr
    assert says in (done.stdout if "--json" in words else done.stderr)


def test_a_difference_between_two_reports(server, tmp_path):
    laptop = machines.write(tmp_path / "laptop", machines.laptop())
    for name, root in (("server", server), ("laptop", laptop)):
        (tmp_path / f"{name}.json").write_text(moor("--root", root, "--json").stdout)
    assert moor("diff", tmp_path / "server.json", tmp_path / "server.json").stdout == "nothing has changed\n"
    worse = moor("diff", tmp_path / "server.json", tmp_path / "laptop.json")
    assert worse.returncode == 1
    assert "- capability kernel.lockdown: met (asserted): confidentiality -> not_met: none" in worse.stdout
    better = moor("diff", tmp_path / "laptop.json", tmp_path / "server.json", "--json")
    assert better.returncode == 0
    assert json.loads(better.stdout)["worse"] == 0


def result_about(subject, key, *, tier=Tier.AFFIRMING, at=None):
    now = Instant(int(time.time()) if at is None else at)
    names = ("boot.measured", "boot.kernel.identity", "ima.measurement", "integrity.runtime", "location.geo")
    told = AttestationResult(
        subject=subject,
        verifier="verifier",
        issued=now,
        expires=Instant(now + 60),
        root=EvidenceRoot.HARDWARE,
        simulated_allowed=False,
        vector={**dict.fromkeys(AR4SI_CLAIMS, Tier.NONE), "executables": tier},
        findings=(),
        policy_digest=bytes(32),
        nonce=bytes(32),
        capabilities=tuple(
            CapabilityLevel(capability=name, level=Assurance.MEASURED if name != "location.geo" else Assurance.ASSERTED)
            for name in names
        ),
    )
    return ear.encode(told, keys.KeySigner(key), audience="alpha")


def test_a_verifiers_result_lifts_the_report_and_nothing_else_does(server, tmp_path):
    key, other = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    pem = tmp_path / "verifier.pem"
    pem.write_bytes(
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    (tmp_path / "key.txt").write_text("no key")

    def asked(token, audience="alpha", pem=pem):
        (tmp_path / "result.jwt").write_text(token)
        words = ("--result", tmp_path / "result.jwt", "--verifier-key", pem, "--audience", audience)
        return moor("--root", server, "--require", "4.7", *words)

    assert asked(result_about("host/server-1", key)).returncode == 0
    for code, done in {
        "assess.other_host": asked(result_about("host/server-2", key)),
        "assess.not_affirming": asked(result_about("host/server-1", key, tier=Tier.CONTRAINDICATED)),
        "signature.invalid": asked(result_about("host/server-1", other)),
        "ear.expired": asked(result_about("host/server-1", key, at=1_700_000_000)),
        "ear.audience": asked(result_about("host/server-1", key), audience="beta"),
        "assess.key": asked(result_about("host/server-1", key), pem=tmp_path / "key.txt"),
    }.items():
        assert done.returncode in (1, 2), code
        assert code in done.stderr
        assert done.stdout == ""
