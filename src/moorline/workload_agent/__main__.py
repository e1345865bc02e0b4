"""Entry of the measured guest: `python -I -m moorline.workload_agent` in /run/moor.

Exit code 0 after SIGTERM, 1 when something refused, 2 when it could not be decided; why stands in status.jsonl: `refused`
before it was active, `halted` after.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from pathlib import Path

from moorline.attesters.reports import ReportSource, report_source
from moorline.errors import EXIT_REFUSED, EXIT_YES, MoorlineError
from moorline.secrecy import keep_secrets
from moorline.wire import guest
from moorline.workload_agent.agent import StatusFile, run


def main(directory: Path) -> int:
    """Run the function in `directory`; the process's exit code."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    status = StatusFile(directory / guest.STATUS_FILE)
    try:
        asyncio.run(_until_stopped(directory, status))
    except MoorlineError as error:
        # By now nobody is served and the keys are forgotten.
        status.say("halted" if status.active else "refused", problem=error.as_problem())
        return EXIT_REFUSED
    except Exception as error:
        logging.exception("crashed")  # noqa: LOG015 - the process's top loop
        status.say("crashed", error=type(error).__name__)
        return EXIT_REFUSED
    status.say("stopped")
    return EXIT_YES


async def _until_stopped(directory: Path, status: StatusFile) -> None:
    task = asyncio.ensure_future(run(directory, _reports, status))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        await task
    except asyncio.CancelledError:
        return


def _reports() -> ReportSource:
    return report_source(os.environ)


if __name__ == "__main__":
    keep_secrets()
    sys.exit(main(Path(guest.SHARED_DIRECTORY)))
