"""docs/howto/enrol-devices.md, typed as its reader would type it, against a broker of a real consortium."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import pytest_asyncio

sys.path.insert(0, str(Path(__file__).parent))
from consortium import Consortium, free_addresses

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "enrol-devices.md"
BLOCKS = re.findall(r"^```(sh|text)\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
pytestmark = [pytest.mark.story, pytest.mark.asyncio(loop_scope="module")]
END = "---done---"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def beta(tmp_path_factory):
    consortium = await Consortium.found(tmp_path_factory.mktemp("howto"))
    try:
        (listen,) = free_addresses(1)
        yield await consortium.admit(
            "beta", listen_revocation=listen, revocation_url=f"http://{listen}", revocation_poll_s=1
        )
    finally:
        await consortium.close()


def typed(folder, environment):
    """Everything on the page, block by block; what came out of each block of commands, with what the page promises."""
    shell = subprocess.Popen(
        # A hosts file of its own stands in for the DNS the page takes for granted.
        ["bwrap", "--dev-bind", "/", "/", "--ro-bind", str(folder / "hosts"), "/etc/hosts", "bash", "-eu", "-o", "pipefail"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
        env=environment,
    )
    script = "".join(f"{block}\necho '{END}'\n" for kind, block in BLOCKS if kind == "sh")
    output, _ = shell.communicate(script, timeout=100)
    assert shell.returncode == 0, output
    return output.split(f"{END}\n")


def words(line):
    return " ".join(line.split())


async def test_every_block_of_the_page_does_what_the_page_says(beta, tmp_path):
    host, _, port = beta.broker.said["https"].rpartition(":")
    (tmp_path / "hosts").write_text(f"{host} {beta.server_name}\n")
    (tmp_path / "roots.pem").write_bytes(beta.roots_pem)
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "moor"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m moorline.cli "$@"\n')
    command.chmod(0o755)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("MOOR")},
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "BROKER": str(beta.directory),
        "EST": f"{beta.server_name}:{port}",
        "CMP": beta.settings.listen_revocation,
    }
    outputs = await asyncio.to_thread(typed, tmp_path, environment)
    number = -1
    for kind, block in BLOCKS:
        if kind == "sh":
            number += 1
            continue
        lines = [words(line) for line in outputs[number].splitlines()]
        for promised in block.splitlines():
            pattern = re.escape(words(promised)).replace("…", ".*")
            assert any(re.fullmatch(pattern, line) for line in lines), f"{promised!r} is not in:\n{outputs[number]}"
