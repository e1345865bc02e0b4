"""`--keep`: what a person needs to talk to a system that stays up, and to stop it."""

from __future__ import annotations

import sys
from pathlib import Path

from moorline.cli.demo.federating import RECORD
from moorline.cli.demo.world import CONTRACT, ORCHESTRATOR, SERVICE, World
from moorline.cli.vnf import OperatorSettings
from moorline.nfv import Role
from moorline.services import settings


def how_to_talk(world: World) -> list[str]:
    """Commands that work while the system is up, as far as the story got; also written to `talk.txt`."""
    where = world.stage.directory
    moor = _moor()
    _write_stop(world, where / "stop")
    trust = f"--trust {world.trust_file} --genesis {world.consortium.directory / 'genesis.cbor'}"
    lines = [f"{moor} ledger show provider/alpha provider/beta {trust}"]
    if "orchestrator_address" in world.facts:
        lines.append(f"{moor} vnf list --as {operator_file(world)}")
    if "function" in world.facts:
        lines.append(
            f"{moor} device connect get --dir {where / 'beta' / 'devices' / 'device-1'} --provider alpha "
            f"--service {SERVICE} --contract {CONTRACT} --name {RECORD} --address {world.facts['function']['address']}"
        )
    if "alpha" in world.providers and world.alpha.broker is not None:
        lines.append(f"curl --unix-socket {world.alpha.admin_socket} http://broker/v1/alarms")
    lines.append(f"sh {where / 'stop'}    # stops everything and leaves nothing behind")
    (where / "talk.txt").write_text("\n".join(lines) + "\n", "utf-8")
    return lines


def operator_file(world: World) -> Path:
    """`operator.toml` of alpha's operator, for `moor vnf` and `moor log`."""
    operator = world.stage.directory / "alpha" / "operator"
    configured = OperatorSettings(
        orchestrator_url=f"https://{world.facts['orchestrator_address']}",
        orchestrator_name=world.alpha.name_of(Role.ORCHESTRATOR, ORCHESTRATOR),
        roots=world.roots_file,
        certificate_chain=operator / "chain.pem",
        private_key=operator / "key.pem",
    )
    settings.write(configured, operator / "operator.toml")
    return operator / "operator.toml"


def _write_stop(world: World, path: Path) -> None:
    tpms = [one.tpm.pid for one in world.facts.get("hosts", {}).values() if one.tpm is not None]
    running = [process.pid for process in world.stage.processes.values() if process.running()]
    pids = " ".join(str(pid) for pid in (*running, *tpms) if pid is not None)
    path.write_text(
        f"kill {pids} 2>/dev/null\n"
        f"for pid in {pids}; do while kill -0 $pid 2>/dev/null; do sleep 0.1; done; done\n"
        f"rm -rf '{world.stage.directory}'\n",
        "utf-8",
    )


def _moor() -> str:
    """The command as this user can type it: beside the interpreter that runs now."""
    beside = Path(sys.executable).parent / "moor"
    return str(beside) if beside.exists() else "moor"
