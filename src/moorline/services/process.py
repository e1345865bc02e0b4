"""How every service process lives: one line when ready, structured logs, a clean stop on SIGTERM or SIGINT.

`run` is the process's top loop and the only place that catches what nobody expected: it logs the error and exits
with the code of the error's kind. The ready line goes to standard output as JSON; everything else goes to standard error.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import resource
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import Final

import structlog

from moorline.errors import EXIT_UNDECIDED, EXIT_YES, MoorlineError
from moorline.storage import steps

_STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
_DESCRIPTORS: Final = 65536
_COLLECT_AFTER: Final = (10_000, 10, 10)
"""Objects made and not ended before the young are looked at for cycles; Python's own is 700. All are looked at after a
million: connections that ended are in cycles, of 15 KiB each."""


def configure_logs(service: str) -> structlog.stdlib.BoundLogger:
    """Structured logs as JSON lines on standard error, each with the service's name."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
    )
    logger: structlog.stdlib.BoundLogger = structlog.get_logger().bind(service=service)
    return logger


def announce_ready(service: str, **addresses: str) -> None:
    """The one line that says the service can be used, and where."""
    print(json.dumps({"ready": True, "service": service, **addresses}), flush=True)  # noqa: T201 - this is the interface


def run(service: str, main: Callable[[structlog.stdlib.BoundLogger], Awaitable[None]]) -> int:
    """Run `main` until it ends or a stop signal cancels it; the process's exit code."""
    log = configure_logs(service)

    async def supervised() -> int:
        steps.check_environment()
        _allow_many_connections()
        loop = asyncio.get_running_loop()
        task = asyncio.ensure_future(main(log))
        for number in _STOP_SIGNALS:
            loop.add_signal_handler(number, task.cancel)
        try:
            await task
        except asyncio.CancelledError:
            log.info("stopped")
        return EXIT_YES

    try:
        return asyncio.run(supervised())
    except MoorlineError as error:
        log.error("refused to run", **error.as_problem())  # noqa: TRY400 - a typed refusal needs no traceback
        return error.exit_code
    except Exception as error:
        log.exception("crashed", error=type(error).__name__)
        return EXIT_UNDECIDED


def _allow_many_connections() -> None:
    """As many descriptors as the system grants: a peer that opens connections and says nothing must not use them up."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, _DESCRIPTORS) if most > 0 else _DESCRIPTORS, most))


def collect_seldom() -> None:
    """Let a process that holds tens of thousands of connections look for cycles of dead objects less often.

    A look at everything takes half a second then, in which nobody is answered; by Python's own measure there is one every
    few seconds, because the requests under way are many. What the process was made of is not looked at again.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_COLLECT_AFTER)


async def serve_all(*services: Awaitable[None]) -> None:
    """Run several servers of one process; the first that ends, ends all."""
    tasks = [asyncio.ensure_future(service) for service in services]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks, return_exceptions=True)
