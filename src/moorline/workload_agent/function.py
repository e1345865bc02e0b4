"""The application in the package: one file, one class, and what it may reach.

`Artifacts/function.py` of the CSAR defines

    class Function:
        def __init__(self, context): ...
        async def handle(self, request: bytes, caller: str) -> bytes: ...

Only a package whose digest the launch is bound to is ever loaded. It runs in this process, inside the enclave, without
network: `context` is all it gets.
"""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from types import ModuleType
from typing import Final, Protocol

from moorline.errors import Malformed, Refused
from moorline.workload_agent.storage import SealedStorage

FUNCTION_FILE: Final = "Artifacts/function.py"
MAX_FUNCTION_BYTES: Final = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What a function is given: who it is, its settings, its sealed storage."""

    service: str
    instance: str
    settings: dict[str, str]
    storage: SealedStorage


class Function(Protocol):
    """What the agent needs of the application."""

    async def handle(self, request: bytes, caller: str) -> bytes:
        """The answer to a request of the authorised peer `caller` (SPIFFE ID). A MoorlineError is told to the caller."""
        ...


def load_function(package: bytes, context: Context) -> Function:
    """The application of a CSAR that was verified against the launch.

    Raises Malformed("workload.package_unreadable") and Refused("workload.function_unloadable").
    """
    source = _source(package)
    module = ModuleType("moorline_function")
    try:
        exec(compile(source, FUNCTION_FILE, "exec"), module.__dict__)  # noqa: S102 - this is what an agent is for
        function = module.__dict__["Function"](context)
    except Exception as error:  # the application's own code: anything may come out of it
        raise Refused(
            "workload.function_unloadable",
            "the application in the package does not start",
            got=f"{type(error).__name__}: {error}",
        ) from error
    if not callable(getattr(function, "handle", None)):
        raise Refused("workload.function_unloadable", "the application has no handle(request, caller)")
    loaded: Function = function
    return loaded


def _source(package: bytes) -> bytes:
    try:
        with zipfile.ZipFile(io.BytesIO(package)) as archive, archive.open(FUNCTION_FILE) as entry:
            source = entry.read(MAX_FUNCTION_BYTES + 1)
    except Exception as error:  # zipfile raises BadZipFile, KeyError, zlib.error and more on odd bytes
        raise Malformed(
            "workload.package_unreadable",
            "the package holds no readable application",
            expected=FUNCTION_FILE,
            got=type(error).__name__,
        ) from None
    if len(source) > MAX_FUNCTION_BYTES:
        raise Malformed("workload.package_unreadable", "the application is too large", expected=MAX_FUNCTION_BYTES)
    return source
