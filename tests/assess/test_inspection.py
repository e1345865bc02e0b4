"""Memory inspection: the host really reads another process, and the door lets through what two people approved, once.

verifies that: the positive control finds its own value and nothing else; every way around the two approvals is refused
before anything is read; every look is in the log before it happens, and a changed log stops further looks.
"""

import dataclasses
import hashlib
import json
import os
import re
import secrets
import subprocess
import sys

import machines
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from moorline.attesters.probes import memory as probe
from moorline.attesters.probes.tree import Tree
from moorline.clock import Instant
from moorline.errors import Malformed, MoorlineError, NotAuthentic, Refused, Unavailable
from moorline.host_agent import memory
from moorline.policy import inspection
from moorline.wire import keys, schema

NOW = 1_795_000_000
PLANTED = """
import ctypes, sys
held = ctypes.create_string_buffer(sys.stdin.buffer.read(32))
print(hex(ctypes.addressof(held)), flush=True)
sys.stdin.buffer.read(1)
"""


class SetClock:
    def __init__(self, at=NOW):
        self.at = at

    def now(self):
        return Instant(self.at)


def signer():
    return keys.KeySigner(ec.generate_private_key(ec.SECP256R1()))


class Desk:
    """A guest that is a process with a known value, two approvers and more, and a broker over a log."""

    def __init__(self, folder):
        self.folder = folder
        self.secret = secrets.token_bytes(32)
        self.guest = subprocess.Popen([sys.executable, "-c", PLANTED], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.guest.stdin.write(self.secret)
        self.guest.stdin.flush()
        self.address = int(self.guest.stdout.readline(), 16)
        self.people = {name: signer() for name in ("ahn", "berg", "cruz")}
        self.clock = SetClock()
        self.log = folder / "state" / "inspection.log"

    @property
    def broker(self):
        public = {name: one.public_key() for name, one in self.people.items()}
        return memory.InspectionBroker(host="server-1", approvers=public, log=self.log, clock=self.clock)

    def request(self, **changes):
        asked = {
            "host": "server-1",
            "function": "vnf/records",
            "process": self.guest.pid,
            "started": memory.started(self.guest.pid),
            "inspector": "inspector",
            "reason": "incident 7",
            "not_before": NOW,
            "not_after": NOW + 3600,
            "looks": 2,
            "most_bytes": 64,
            "nonce": bytes(32),
        } | changes
        return schema.encode(inspection.InspectionRequest(**asked))

    def approved(self, request, *names):
        return [inspection.approve(request, name, self.people[name]) for name in names]

    def look(self, request, approvals, *, size=32):
        return self.broker.look(request, approvals, start=self.address, size=size)


@pytest.fixture
def desk(tmp_path):
    made = Desk(tmp_path)
    yield made
    made.guest.kill()
    made.guest.stdin.close()
    made.guest.stdout.close()
    made.guest.wait()


def events(desk):
    return [one.event for one in desk.broker.entries()]


def test_the_control_finds_what_it_planted():
    """As root, and as whoever runs the tests where the kernel lets a parent read its child."""
    found = memory.control()
    if os.geteuid() == 0:
        assert found.found >= 1, found.why
    assert found.user == os.geteuid()
    assert bool(found.found) is (found.why == "")


def test_the_control_finds_nothing_that_was_not_planted(monkeypatch):
    """The bad twin: the child holds another value than the one that is looked for."""
    other = memory._CHILD.replace("held = sys.stdin.buffer.read(48)", "sys.stdin.buffer.read(48); held = b''")
    overwritten = other.replace("print(", "import gc; gc.collect(); print(")
    monkeypatch.setattr(memory, "_memory", lambda pid, most: iter([b"x" * 1000]))
    monkeypatch.setattr(memory, "_CHILD", overwritten)
    found = memory.control()
    assert (found.found, found.why) == (0, "it was not in the memory that was read")


@pytest.mark.skipif(os.geteuid() != 0, reason="takes root to become somebody else")
def test_somebody_else_is_told_that_the_way_is_closed(desk):
    """A user without rights over a process of root: the door's own reading is refused too."""
    code = (
        "import os,sys; os.setgid(65534); os.setuid(65534)\n"
        "try: os.open(f'/proc/{sys.argv[1]}/mem', os.O_RDONLY)\n"
        "except PermissionError: print('closed')"
    )
    done = subprocess.run([sys.executable, "-c", code, str(desk.guest.pid)], capture_output=True, text=True, check=False)
    assert done.stdout == "closed\n"


def test_every_way_is_read_from_its_source(tmp_path):
    def ways(files):
        return {way.name: way.open for way in probe.reach(Tree(machines.write(tmp_path / secrets.token_hex(4), files)))}

    closed, wide = ways(machines.server()), ways(machines.laptop())
    assert closed["/proc/PID/mem and ptrace"] is False
    assert wide["/proc/PID/mem and ptrace"] is True
    assert (closed["/dev/mem"], wide["/dev/mem"]) == (False, True)
    assert (closed["/proc/kcore"], wide["/proc/kcore"]) == (False, True)
    assert (closed["kdump"], wide["kdump"]) == (False, None)
    assert (closed["swap"], wide["swap"]) == (False, True)
    files = machines.server() | {
        "/sys/kernel/kexec_crash_loaded": "1\n",
        "/sys/kernel/mm/ksm/run": "1\n",
        "/proc/41/cmdline": "/usr/bin/qemu-system-x86_64\0-qmp\0unix:/run/vm.sock\0",
        "/proc/41/attr/current": "system_u:system_r:svirt_t:s0:c1,c2\n",
    }
    seen = ways(files)
    assert (seen["kdump"], seen["same pages merged (KSM)"], seen["QEMU monitor"]) == (True, True, True)


def test_two_people_approve_and_the_log_says_so(desk):
    request = desk.request()
    read = desk.look(request, desk.approved(request, "ahn", "berg"))
    assert read == desk.secret
    look, looked = desk.broker.entries()
    assert (look.event, looked.event) == ("inspection.look", "inspection.looked")
    assert look.details["approvers"] == "ahn, berg"
    assert (look.subject, look.details["function"], look.details["reason"]) == ("inspector", "vnf/records", "incident 7")
    assert looked.details["digest"] == hashlib.sha256(desk.secret).hexdigest()
    assert desk.secret.hex() not in repr(desk.broker.entries())


WRONG = {
    "inspection.approvals": lambda desk: (desk.request(), ["ahn"], {}),
    "inspection.own_approval": lambda desk: (desk.request(inspector="berg"), ["ahn", "berg"], {}),
    "inspection.other_host": lambda desk: (desk.request(host="server-2"), ["ahn", "berg"], {}),
    "inspection.not_in_force": lambda desk: (desk.request(not_before=NOW - 7200, not_after=NOW - 1), ["ahn", "berg"], {}),
    "inspection.window": lambda desk: (desk.request(not_after=NOW + 86400), ["ahn", "berg"], {}),
    "inspection.request": lambda desk: (desk.request(reason=" "), ["ahn", "berg"], {}),
    "inspection.too_much": lambda desk: (desk.request(most_bytes=8), ["ahn", "berg"], {}),
    "inspection.other_process": lambda desk: (desk.request(started=1), ["ahn", "berg"], {}),
    "inspection.process": lambda desk: (desk.request(process=2**22 + 7), ["ahn", "berg"], {}),
}


@pytest.mark.parametrize("code", sorted(WRONG))
def test_one_wrong_thing_refuses_before_anything_is_read(desk, code, monkeypatch):
    request, names, _ = WRONG[code](desk)
    monkeypatch.setattr(memory, "_exactly", lambda *_: pytest.fail("memory was read"))
    with pytest.raises(MoorlineError) as refused:
        desk.look(request, desk.approved(request, *names))
    assert refused.value.code == code
    assert events(desk) == []


def test_approvals_that_are_none(desk, monkeypatch):
    monkeypatch.setattr(memory, "_exactly", lambda *_: pytest.fail("memory was read"))
    request, other = desk.request(), desk.request(reason="another")
    good = desk.approved(request, "ahn")
    stranger = inspection.approve(request, "berg", signer())
    in_anothers_name = inspection.approve(request, "cruz", desk.people["berg"])
    for approvals, code in (
        ([], "inspection.approvals"),
        ([*good, *good], "inspection.approvals"),
        ([*good, stranger], "inspection.approver_unknown"),
        ([*good, in_anothers_name], "inspection.approver_unknown"),
        ([*good, *desk.approved(other, "berg")], "inspection.other_request"),
    ):
        with pytest.raises((Refused, NotAuthentic)) as refused:
            desk.look(request, approvals)
        assert refused.value.code == code
    changed = bytearray(desk.approved(request, "berg")[0])
    changed[-1] ^= 1
    with pytest.raises(NotAuthentic):
        desk.look(request, [*good, bytes(changed)])
    with pytest.raises(Malformed):
        desk.look(request, [*good, b"no approval"])


def test_two_names_for_one_key_are_one_person(desk, monkeypatch):
    monkeypatch.setattr(memory, "_exactly", lambda *_: pytest.fail("memory was read"))
    desk.people["cruz"] = desk.people["ahn"]
    request = desk.request()
    approvals = [inspection.approve(request, name, desk.people["ahn"]) for name in ("ahn", "cruz")]
    with pytest.raises(MoorlineError) as refused:
        desk.look(request, approvals)
    assert refused.value.code == "inspection.approvals"


def test_looks_are_counted_in_the_log_and_a_restart_gives_none_back(desk):
    request = desk.request(looks=2)
    approvals = desk.approved(request, "ahn", "cruz")
    for _ in range(2):
        assert desk.look(request, approvals) == desk.secret  # each through a broker of its own
    with pytest.raises(Refused) as refused:
        desk.look(request, approvals)
    assert refused.value.code == "inspection.used_up"


def test_a_look_that_fails_is_in_the_log_and_is_used(desk):
    request = desk.request(looks=1)
    approvals = desk.approved(request, "ahn", "berg")
    with pytest.raises(Unavailable):
        desk.broker.look(request, approvals, start=1, size=8)
    assert events(desk) == ["inspection.look", "inspection.failed"]
    with pytest.raises(Refused):
        desk.look(request, approvals)


def test_a_changed_log_stops_further_looks(desk):
    request = desk.request()
    approvals = desk.approved(request, "ahn", "berg")
    desk.look(request, approvals)
    whole = desk.log.read_bytes()
    for changed in (whole[:-1], whole[4 + int.from_bytes(whole[:4], "big") :], whole.replace(b"incident 7", b"incident 8")):
        desk.log.write_bytes(changed)
        with pytest.raises((Malformed, NotAuthentic)):
            desk.look(request, approvals)
        with pytest.raises((Malformed, NotAuthentic)):
            desk.broker.entries()
    desk.log.write_bytes(whole)
    desk.look(request, approvals)
    assert desk.log.stat().st_mode & 0o777 == 0o600


def test_every_field_of_a_request_is_under_the_approval(desk):
    request = inspection.parse_request(desk.request())
    digests = {inspection.request_digest(schema.encode(request))}
    for field in dataclasses.fields(request):
        value = getattr(request, field.name)
        other = value + "x" if isinstance(value, str) else value + 1 if isinstance(value, int) else b"\x01" * 32
        digests.add(inspection.request_digest(schema.encode(dataclasses.replace(request, **{field.name: other}))))
    assert len(digests) == len(dataclasses.fields(request)) + 1


# ---------------------------------------------------------------- command line


def moor(*words):
    return subprocess.run(
        [sys.executable, "-m", "moorline.cli", "host", "inspect", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_by_hand_from_request_to_log(desk, tmp_path):
    text = 'host = "server-1"\nlog = "inspection.log"\n'
    for name in ("ahn", "berg"):
        key = ec.generate_private_key(ec.SECP256R1())
        private = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        (tmp_path / f"{name}.key").write_bytes(key.private_bytes(serialization.Encoding.PEM, *private))
        public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        (tmp_path / f"{name}.pem").write_bytes(public)
        text += f'[[approver]]\nname = "{name}"\nkey = "{name}.pem"\n'
    config, request = tmp_path / "inspection.toml", tmp_path / "request"
    config.write_text(text)
    asked = moor(
        "request", "--process", desk.guest.pid, "--function", "vnf/records", "--inspector", "chris",
        "--reason", "incident 7", "--config", config, "-o", request,
    )  # fmt: skip
    assert asked.returncode == 0, asked.stderr
    for name in ("ahn", "berg"):
        done = moor("approve", request, "--as", name, "--key", tmp_path / f"{name}.key", "-o", tmp_path / f"{name}.ok")
        assert "incident 7" in done.stdout
    words = ("--start", hex(desk.address), "--size", 32, "--config", config)
    refused = moor("look", request, tmp_path / "ahn.ok", *words, "-o", tmp_path / "no")
    assert (refused.returncode, (tmp_path / "no").exists()) == (1, False)
    assert "inspection.approvals" in refused.stderr
    done = moor("look", request, tmp_path / "ahn.ok", tmp_path / "berg.ok", *words, "-o", tmp_path / "read")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "read").read_bytes() == desk.secret
    again = moor("look", request, tmp_path / "ahn.ok", tmp_path / "berg.ok", *words, "-o", tmp_path / "twice")
    assert "inspection.used_up" in again.stderr
    rows = json.loads(moor("log", "--config", config, "--json").stdout)["entries"]
    assert [row["event"] for row in rows] == ["inspection.look", "inspection.looked"]
    assert rows[0]["approvers"] == "ahn, berg"
    config.write_text(re.sub(r"\[\[approver\]\]\nname = \"berg\"\nkey = \"berg.pem\"\n", "", text))
    assert "inspection.approvers" in moor("log", "--config", config).stderr


def test_the_control_by_hand():
    done = moor("control", "--json")
    told = json.loads(done.stdout)
    assert done.returncode == (0 if told["found"] else 2)
    assert told["user"] == ("root" if os.geteuid() == 0 else str(os.geteuid()))
    assert set(told["ways"].values()) <= {"open", "closed", "cannot be told"}
