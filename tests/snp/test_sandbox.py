"""The sandbox, with real bubblewrap on this host: what is inside, what is not, and that limits hold."""

# ruff: noqa: ASYNC110, ASYNC240 - a test waits for another process by looking, at files that are small and local

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moorline.errors import Misconfigured, Unavailable
from moorline.host_agent import sandbox
from moorline.host_agent.sandbox import Bind, LimitKind, Limits, Sandbox

pytestmark = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")

WIDE = Limits(memory_mib=256, pids=64)
PYTHON = os.path.realpath(sys.executable)


def _box(code: str, *binds: Bind, root: Path = Path("/")) -> Sandbox:
    return Sandbox(root=root, arguments=(PYTHON, "-I", "-S", "-c", code), environment={"MARK": "inside"}, binds=binds)


async def _run(code: str, limits: Limits = WIDE, *binds: Bind, tmp_path: Path) -> tuple[int, str]:
    log = tmp_path / "output"
    with log.open("wb") as output:
        running = await sandbox.start(_box(code, *binds), limits, name="test", output=output)
    return await running.wait(), log.read_text()


async def test_inside_there_is_no_network_no_other_process_and_no_privilege(tmp_path):
    code = """
import json, os, socket
facts = {}
facts["interfaces"] = [name for _, name in socket.if_nameindex()]
facts["pids"] = sorted(int(name) for name in os.listdir("/proc") if name.isdigit())
status = dict(line.split(":", 1) for line in open("/proc/self/status").read().splitlines() if ":" in line)
facts["no_new_privs"] = status["NoNewPrivs"].strip()
facts["capabilities"] = [int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")]
facts["environment"] = sorted(os.environ)
facts["host"] = socket.gethostname()
facts["session"] = os.getsid(0) != 0
try:
    open("/etc/moorline-was-here", "w")
    facts["root"] = "writable"
except OSError as error:
    facts["root"] = error.strerror
try:
    open("/proc/sys/kernel/hostname", "w")
    facts["sysctl"] = "writable"
except OSError as error:
    facts["sysctl"] = error.strerror
try:
    socket.create_connection(("127.0.0.1", 9), 1)
except OSError as error:
    facts["loopback"] = type(error).__name__
open("/tmp/mine", "w").write("ok")
facts["tmp"] = os.listdir("/tmp")
print(json.dumps(facts))
"""
    exit_code, output = await _run(code, tmp_path=tmp_path)
    assert exit_code == 0, output
    facts = json.loads(output)
    assert facts["interfaces"] == ["lo"]
    assert len(facts["pids"]) <= 2
    assert os.getpid() not in facts["pids"] or os.getpid() < 3
    assert facts["no_new_privs"] == "1"
    assert facts["capabilities"] == [0] * 5
    assert set(facts["environment"]) <= {"MARK", "PWD", "LC_CTYPE"}
    assert facts["host"] == "guest"
    assert facts["root"] == "Read-only file system"
    assert facts["sysctl"] == "Read-only file system", "core_pattern would be a way out"
    assert facts["tmp"] == ["mine"]
    assert not Path("/etc/moorline-was-here").exists()


async def test_the_host_loopback_cannot_be_reached(tmp_path):
    """Verifies that: a server that listens on the host's 127.0.0.1 is not there inside."""
    server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    code = f"""
import socket
try:
    socket.create_connection(("127.0.0.1", {port}), 2)
    print("reached")
except OSError as error:
    print("refused")
"""
    async with server:
        assert await _run(code, tmp_path=tmp_path) == (0, "refused\n")


async def test_only_what_is_shared_writable_can_be_written(tmp_path):
    shared, readable = tmp_path / "shared", tmp_path / "readable"
    for directory in (shared, readable):
        directory.mkdir()
    code = """
open("/run/shared/file", "w").write("x")
try:
    open("/run/readable/file", "w")
except OSError as error:
    print(error.strerror)
"""
    root = tmp_path / "root"
    for name in ("usr", "lib", "lib64", "bin", "run/shared", "run/readable", "proc", "dev", "tmp"):
        (root / name).mkdir(parents=True)
    binds = [Bind(source=Path("/", name).resolve(), target=f"/{name}") for name in ("usr", "lib", "lib64")]
    binds += [
        Bind(source=shared, target="/run/shared", writable=True),
        Bind(source=readable, target="/run/readable"),
    ]
    log = tmp_path / "output"
    with log.open("wb") as output:
        running = await sandbox.start(_box(code, *binds, root=root), WIDE, name="shared", output=output)
    assert (await running.wait(), log.read_text()) == (0, "Read-only file system\n")
    assert (shared / "file").read_text() == "x"


async def test_memory_is_limited_for_everything_inside(tmp_path):
    code = "x = bytearray(300 << 20)\nprint(len(x))"
    exit_code, output = await _run(code, Limits(memory_mib=128, pids=16), tmp_path=tmp_path)
    assert exit_code != 0
    assert str(300 << 20) not in output
    exit_code, output = await _run(code, Limits(memory_mib=512, pids=16), tmp_path=tmp_path)
    assert (exit_code, output) == (0, f"{300 << 20}\n"), "the control: the same with more memory"


async def test_processes_are_limited(tmp_path):
    code = """
import os, time
made = 0
try:
    for _ in range(40):
        if os.fork() == 0:
            time.sleep(30)
            os._exit(0)
        made += 1
except OSError:
    pass
print(made)
"""
    if sandbox.detect_limits() is LimitKind.RLIMITS and os.geteuid() == 0:
        pytest.skip("resource limits do not bind the number of root's processes")
    _, output = await _run(code, Limits(memory_mib=512, pids=12), tmp_path=tmp_path)
    assert 0 < int(output) < 12
    _, output = await _run(code, Limits(memory_mib=512, pids=100), tmp_path=tmp_path)
    assert int(output) == 40


def _groups() -> set[Path]:
    return {path for path in Path("/sys/fs/cgroup").glob("**/moorline-*") if f"-{os.getpid()}-" in path.name}


async def test_control_groups_are_gone_afterwards(tmp_path):
    code = "print(open('/proc/self/cgroup').read())"
    with (tmp_path / "output").open("wb") as output:
        running = await sandbox.start(_box(code), WIDE, name="groups", output=output)
    if running.limits is not LimitKind.RLIMITS:
        assert running._groups
        assert all(group.exists() for group in running._groups)
    await running.wait()
    assert not any(group.exists() for group in running._groups)
    assert not _groups()


def _gone(pid: int) -> bool:
    """No such process, or a dead one that nobody collected yet (its parent, bubblewrap, went with it)."""
    try:
        return Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True


async def _until_printed(path: Path, text: str) -> None:
    async with asyncio.timeout(20):
        while text not in path.read_text():
            await asyncio.sleep(0.01)


async def test_what_does_not_want_to_end_is_ended_after_its_grace(tmp_path):
    log = tmp_path / "output"
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    with log.open("wb") as output:
        running = await sandbox.start(_box(code), WIDE, name="stubborn", output=output)
    await _until_printed(log, "up")
    await running.terminate(0.2)
    assert await running.wait() == 137


async def test_a_sandbox_that_has_just_started_can_be_asked_to_end(tmp_path):
    with (tmp_path / "output").open("wb") as output:
        running = await sandbox.start(_box("import time; time.sleep(60)"), WIDE, name="early", output=output)
    await running.terminate(20)
    assert await running.wait() == 143


@pytest.mark.parametrize(("how", "code"), [("terminate", 143), ("kill", 137)])
async def test_a_sandbox_can_be_ended(tmp_path, how, code):
    log = tmp_path / "output"
    with log.open("wb") as output:
        running = await sandbox.start(
            _box("import time; print('up', flush=True); time.sleep(60)"), WIDE, name=how, output=output
        )
    await _until_printed(log, "up")
    if how == "terminate":
        await running.terminate(20)
    else:
        running.kill()
    assert await running.wait() == code
    assert _gone(running.init_pid)


async def test_a_program_that_is_not_there_ends_the_sandbox(tmp_path):
    box = Sandbox(root=Path("/"), arguments=("/nonexistent",), environment={})
    with (tmp_path / "output").open("wb") as output:
        running = await sandbox.start(box, WIDE, name="missing", output=output)
        assert await running.wait() == 1


@pytest.mark.parametrize(
    ("giving", "expected"),
    [
        (("", "user.slice", "user.slice/me.scope"), "user.slice/me.scope"),
        (("", "user.slice"), "user.slice"),
        (("",), ""),
        ((), None),
    ],
)
def test_version_2_groups_are_made_in_the_nearest_group_that_gives_controllers(monkeypatch, tmp_path, giving, expected):
    """Verifies that: detection reads what the host offers. The tree is of plain files: few test machines have v2."""
    root, own = tmp_path / "cgroup", "user.slice/me.scope"
    (root / own).mkdir(parents=True)
    (root / "cgroup.controllers").write_text("cpu memory pids")
    for path in ("", "user.slice", own):
        (root / path / "cgroup.subtree_control").write_text("cpu memory pids" if path in giving else "cpu")
    monkeypatch.setattr(sandbox, "_CGROUP_ROOT", root)
    monkeypatch.setattr(sandbox, "_own_groups", lambda: {"": f"/{own}"})
    assert sandbox._parents(LimitKind.CGROUP_V2) == ([] if expected is None else [root / expected])
    if expected is None:
        with pytest.raises(OSError, match="no cgroup-v2"):
            sandbox._make_groups(LimitKind.CGROUP_V2, "moorline-1-x", WIDE)
        return
    (group,) = sandbox._make_groups(LimitKind.CGROUP_V2, "moorline-1-x", Limits(memory_mib=2, pids=9))
    assert group.parent == root / expected
    limits = {name: (group / name).read_text() for name in ("memory.max", "memory.swap.max", "pids.max")}
    assert limits == {"memory.max": str(2 << 20), "memory.swap.max": "0", "pids.max": "9"}


_UNPRIVILEGED = """
import asyncio, subprocess, sys
from pathlib import Path
from moorline.host_agent import sandbox
from moorline.host_agent.sandbox import Limits, Sandbox

async def main(code):
    box = Sandbox(root=Path("/"), arguments=(sys.argv[1], "-I", "-S", "-c", code), environment={})
    running = await sandbox.start(box, Limits(memory_mib=128, pids=4096), name="nobody", output=1)
    print(running.limits, await running.wait(), flush=True)

asyncio.run(main("import os; print(os.getuid(), len(os.listdir('/sys')) >= 0, flush=True)"))
asyncio.run(main("bytearray(300 << 20)"))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="this is already what an unprivileged user does")
def test_it_works_without_privilege_and_says_what_limits_it(tmp_path):
    """Verifies that: an ordinary user gets the same walls, with resource limits where control groups are not theirs."""
    if not sandbox.detect_user_namespace():
        pytest.skip("no user namespaces on this host")
    done = subprocess.run(
        [sys.executable, "-c", _UNPRIVILEGED, PYTHON],
        check=False,
        capture_output=True,
        text=True,
        user=65534,
        group=65534,
        extra_groups=[],
    )
    lines = done.stdout.splitlines()
    assert lines[0] == "65534 True", done.stderr
    assert lines[1].split()[1] == "0"
    kind, code = lines[-1].split()
    assert kind in set(LimitKind)
    assert code != "0", "300 MiB do not fit"


def test_groups_of_dead_makers_are_removed():
    kind = sandbox.detect_limits()
    if kind is LimitKind.RLIMITS:
        pytest.skip("no control groups on this host")
    dead = 2**22 + 7  # above the largest pid there can be
    groups = sandbox._make_groups(kind, f"moorline-{dead}-left", WIDE)
    mine = sandbox._make_groups(kind, f"moorline-{os.getpid()}-mine", WIDE)
    try:
        assert sandbox.remove_stale_groups() >= len(groups)
        assert not any(group.exists() for group in groups)
        assert all(group.exists() for group in mine)
    finally:
        for group in mine:
            group.rmdir()


async def test_a_root_that_is_not_there_is_no_sandbox_and_leaves_nothing(tmp_path):
    """Verifies that: bubblewrap that fails is a typed error or an exit code, and no control group stays."""
    box = Sandbox(root=tmp_path / "absent", arguments=("/bin/true",), environment={})
    with (tmp_path / "output").open("wb") as output:
        try:
            running = await sandbox.start(box, WIDE, name="absent", output=output)
        except Unavailable as error:
            code = error.code
        else:
            code = await running.wait()
    assert code in (1, "sandbox.not_started")
    assert not _groups()


def test_without_bubblewrap_there_is_no_sandbox(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(Misconfigured) as refusal:
        sandbox.sandbox_command(_box(""), info_fd=3, block_fd=4, user_namespace=False)
    assert refusal.value.code == "sandbox.no_bubblewrap"
