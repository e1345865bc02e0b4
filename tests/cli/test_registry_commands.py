"""Every command about the registry runs for real somewhere, with real authorities: on a page that is executed, or in a test.

verifies that: no command of the nouns ledger, provider, authority and contract is there that nobody ever ran. A new one has
to be put on a walkthrough's page, or into the table below, whose tests are looked into. And each one says what is wrong use.
"""

import re
from pathlib import Path

import pytest
import typer

from moorline import cli
from moorline.cli import authority, contract, ledger, provider

ROOT = Path(__file__).parents[2]
PAGES = ("docs/walkthrough.md", "docs/walkthrough-consortium.md")
NOUNS = {"ledger": ledger, "provider": provider, "authority": authority, "contract": contract}
IN_TESTS = {
    ("ledger", "up"): "tests/cometbft/test_up.py",
    ("ledger", "show"): "tests/cometbft/test_up.py",
    ("ledger", "promote"): "tests/ledger_failures/cluster.py",
    ("ledger", "repair"): "tests/ledger_failures/test_disks.py",
    ("ledger", "evidence", "list"): "tests/ledger_failures/test_byzantine.py",
    ("ledger", "evidence", "export"): "tests/ledger_failures/test_byzantine.py",
    ("ledger", "evidence", "verify"): "tests/ledger_failures/test_byzantine.py",
    ("authority", "check"): "tests/cli/test_running.py",
}


def leaves(command, path):
    """All commands below a noun, by their words."""
    if not hasattr(command, "commands"):
        return [path]
    return [leaf for name, one in command.commands.items() for leaf in leaves(one, (*path, name))]


COMMANDS = [leaf for noun, module in NOUNS.items() for leaf in leaves(typer.main.get_command(module.app), (noun,))]


def typed():
    """What the readers of the executed pages type, line by line, comments and continued lines taken care of."""
    blocks = [
        block
        for page in PAGES
        for block in re.findall(r"^```sh\n(.*?)^```$", (ROOT / page).read_text("utf-8"), re.MULTILINE | re.DOTALL)
    ]
    return "\n".join(blocks).replace("\\\n", " ")


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_command_runs_for_real_somewhere(command):
    if re.search(rf"\bmoor {re.escape(' '.join(command))}(\s|$)", typed(), re.MULTILINE):
        return
    assert command in IN_TESTS, "run it on a page that is executed, or name the test that runs it"
    words = ", ".join(f'"{word}"' for word in command)
    assert words in (ROOT / IN_TESTS[command]).read_text("utf-8").replace("\n", " ")


def test_the_table_names_commands_that_are_there():
    assert set(IN_TESTS) <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_command_says_what_is_wrong_use(command, capsys):
    """verifies that: an unknown option is exit code 64, and the answer names it."""
    assert cli.run([*command, "--no-such-option"]) == 64
    assert "--no-such-option" in capsys.readouterr().err
