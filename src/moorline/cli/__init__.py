"""The command `moor`: one file per noun, loaded only when its noun is used.

Exit codes: 0 yes, 1 refused, 2 could not decide, 64 usage. Errors end with what to do next; with `--json` they are one JSON
object on standard output.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Annotated, Any, Final

import typer
from typer.core import TyperGroup

from moorline import __version__
from moorline.errors import EXIT_UNDECIDED, EXIT_USAGE, EXIT_YES, Malformed, MoorlineError, Unavailable
from moorline.secrecy import keep_secrets

NOUNS: Final = {
    "demo": "Tell the whole story on this machine: two providers, one function, one device, and an attacker who fails",
    "init": "Write commented settings for a service, and make what belongs to it",
    "authority": "Run a ledger node, certify and admit providers",
    "provider": "Admit, suspend and show providers; register what belongs to one",
    "ledger": "Read and prove what the consortium agreed on",
    "hsm": "Set up an HSM, issue identities, look after launches and peers",
    "enrolment": "Say which devices may enrol, and how",
    "crl": "Make and read certificate revocation lists",
    "broker": "Run a provider's HSM broker",
    "verifier": "Run an attestation authority",
    "orchestrator": "Run the orchestrator (MANO)",
    "launcher": "Run the launcher enclave",
    "host": "Run the agent of a host",
    "package": "Build, verify and measure function packages (SOL004)",
    "vnf": "Create and watch functions",
    "contract": "What one provider lets devices of another do",
    "log": "Export, verify and read secure logs",
    "evidence": "Inspect and appraise evidence, offline",
    "refs": "Make reference values from packages or a golden host, and carry them through updates",
    "collateral": "Keep what vendors say about hardware: fetch, list, carry, forecast",
    "device": "Enrol a device and talk to a function",
    "simulate": "Simulated processors, under roots that say SIMULATED",
    "simulate-tpm": "Simulated TPMs and boots, under roots that say SIMULATED",
}


_UsageError: Final[type[Exception]] = typer.BadParameter.__mro__[2]
"""What typer raises for any wrong use; it is the base of its public BadParameter and has no public name itself."""


_LISTING: Final = "moorline.cli.listing"
_WHOLE: Final = "give what this command reads (--help), whole and unchanged, or have it sent again"
"""What to do about bytes that are not what they should be, where whoever read them knew nothing better."""


class Nouns(TyperGroup):
    """The nouns, each imported when it is asked for: `moor --help` loads none of them."""

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ANN401 - typer's context type is private
        """All nouns, in the order of NOUNS. Whoever lists them wants their words, not their modules."""
        ctx.meta[_LISTING] = True
        return list(NOUNS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ANN401 - typer's command type is private
        """The command group of one noun, or None."""
        if cmd_name not in NOUNS:
            return None
        if ctx.meta.get(_LISTING):
            return typer.main.get_command(_placeholder(cmd_name))
        command = typer.main.get_command(importlib.import_module(f"moorline.cli.{cmd_name.replace('-', '_')}").app)
        command.name, command.help = cmd_name, NOUNS[cmd_name]
        return command


def _placeholder(noun: str) -> typer.Typer:
    app = typer.Typer(name=noun, help=NOUNS[noun])

    @app.callback()
    def described() -> None:
        """Stand for a noun that is not loaded, in the list of nouns."""

    described.__doc__ = NOUNS[noun]
    return app


app = typer.Typer(
    cls=Nouns, no_args_is_help=True, add_completion=False, context_settings={"help_option_names": ["-h", "--help"]}
)


def _show_version(wanted: bool) -> None:  # noqa: FBT001 - typer's callback protocol
    if wanted:
        typer.echo(f"moor {__version__}")
        raise typer.Exit


@app.callback()
def moor(
    *,
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Run sensitive network functions on hosts whose administrators you do not trust."""
    del version


def main() -> None:
    """Entry point of `moor`: runs a command and turns errors into words and exit codes.

    Services start here too. Each of them, and many a command, holds a key, a PIN or a code.
    """
    try:
        keep_secrets()
    except MoorlineError as error:
        _say(error, as_json="--json" in sys.argv)
        sys.exit(error.exit_code)
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command line; the exit code."""
    try:
        result = typer.main.get_command(app).main(arguments, prog_name="moor", standalone_mode=False)
    except typer.Exit as stop:
        return stop.exit_code
    except typer.Abort:
        typer.echo("stopped", err=True)
        return EXIT_UNDECIDED
    except _UsageError as error:
        error.show()  # type: ignore[attr-defined]
        return EXIT_USAGE
    except (MoorlineError, OSError) as error:
        said = error if isinstance(error, MoorlineError) else _of_machine(error)
        _say(said, as_json="--json" in arguments)
        return said.exit_code
    except ModuleNotFoundError as error:
        typer.echo(f"this command needs {error.name}; next: pip install 'moorline[all]'", err=True)
        return EXIT_UNDECIDED
    return result if isinstance(result, int) else EXIT_YES


def _of_machine(error: OSError) -> MoorlineError:
    """What the machine refused: a folder that cannot be made, a disk that is full, a descriptor too many."""
    where = f"{error.filename}: " if error.filename is not None else ""
    return Unavailable(
        "cli.machine",
        "this machine did not do it",
        got=f"{where}{error.strerror or type(error).__name__}",
        remedy="check the path, who may write there, and the space that is left; then repeat the command",
    )


def _say(error: MoorlineError, *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"error": error.as_problem()}))
        return
    typer.echo(f"{error.says} [{error.code}]", err=True)
    for name, label in (("expected", "expected"), ("got", "got"), ("remedy", "next")):
        value = getattr(error, name)
        if value is None and name == "remedy" and isinstance(error, Malformed):
            value = _WHOLE
        if value is not None:
            typer.echo(f"  {label}: {value}", err=True)
