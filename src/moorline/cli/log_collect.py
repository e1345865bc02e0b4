"""Collect secure logs, their checkpoints and the ledger's proof into one file, from the services that keep them.

In this order, so that the parts are of one time:
1. every service but the broker has its log signed as it stands;
2. the broker anchors its own, in which those checkpoints now are, and proves the anchor;
3. entries are read up to what the newest anchored checkpoint of each log counts.

Nothing here judges what it reads; `moor log verify` does.
"""

from __future__ import annotations

import base64
import binascii
import tomllib
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from moorline.cli import render
from moorline.errors import Malformed, Misconfigured, MoorlineError, NotAuthentic

if TYPE_CHECKING:
    from moorline.audit.export import ExportedLog
    from moorline.wire.http import ClientIdentity, HttpClient

_TIMEOUT_S: Final = 60.0
_UNIX: Final = "unix:"


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """The file, how many entries of which log are in it, and what services would not have signed, and why."""

    data: bytes
    entries: dict[str, int]
    height: int
    refused: dict[str, MoorlineError] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Anchored:
    provider: str
    hsm: str
    log: str
    ledger_id: bytes
    height: int
    checkpoints: dict[str, tuple[tuple[int, bytes], ...]]
    bundle: bytes


async def collected(sources: Sequence[str], *, identity: ClientIdentity | None, roots_pem: bytes) -> Collected:
    """The logs of these sources: `unix:PATH` or a directory for the broker, `https://ADDRESS|NAME` for the others.

    A service whose log the broker would not sign is in the file all the same, up to its last checkpoint.
    Raises Misconfigured("audit.sources"), what the services answer, and Unavailable.
    """
    from moorline.audit import export

    admin = [source for source in sources if not source.startswith("https:")]
    if len(admin) != 1 or any(source.startswith("https:") and "|" not in source for source in sources):
        raise Misconfigured(
            "audit.sources",
            "an export is from one broker, and services of its provider",
            expected="unix:ADMIN-SOCKET once, and https://ADDRESS|SERVER-NAME",
            got=" ".join(sources),
        )
    async with AsyncExitStack() as stack:
        broker = await stack.enter_async_context(_admin(admin[0]))
        services = {}
        refused = {}
        for source in sources:
            if source.startswith("https:"):
                client = await stack.enter_async_context(_service(source, identity, roots_pem))
                name, refusal = await _checkpointed(client, source)  # 1
                services[name] = client
                if refusal is not None:
                    refused[name] = refusal
        anchored = _anchored(await broker.post_json("/v1/audit/anchor", {}))  # 2
        logs = [await _read(broker, anchored, anchored.log)]  # 3
        logs += [
            await _read(client, anchored, name) for name, client in sorted(services.items()) if name in anchored.checkpoints
        ]
    data = export.write(
        ledger_id=anchored.ledger_id, provider=anchored.provider, hsm=anchored.hsm, bundle=anchored.bundle, logs=logs
    )
    return Collected(data=data, entries={one.log: len(one.entries) for one in logs}, height=anchored.height, refused=refused)


def _admin(source: str) -> HttpClient:
    from moorline.wire.http import HttpClient

    path = Path(source.removeprefix(_UNIX))
    if path.is_dir():
        settings = tomllib.loads(render.read(path / "broker.toml").decode("utf-8"))
        path = path / settings.get("admin_socket", "admin.sock")
    return HttpClient("http://broker", server_name="", roots_pem=b"", uds=str(path), timeout_s=_TIMEOUT_S)


def _service(source: str, identity: ClientIdentity | None, roots_pem: bytes) -> HttpClient:
    from moorline.wire.http import HttpClient

    if identity is None:
        raise Misconfigured(
            "audit.sources", "services give their logs to operators only", remedy="say as whom: --as operator.toml"
        )
    url, _, name = source.partition("|")
    return HttpClient(url, server_name=name, roots_pem=roots_pem, identity=identity, timeout_s=_TIMEOUT_S)


async def _checkpointed(client: HttpClient, source: str) -> tuple[str, MoorlineError | None]:
    from moorline.audit.checkpoint import domain_of

    refusal: MoorlineError | None = None
    try:
        answer = await client.post_json("/v1/audit/checkpoint", {})
    except NotAuthentic as error:
        if error.code not in ("audit.log_truncated", "audit.log_rewritten"):
            raise
        # The service's database was changed. Its log is wanted all the more: verify says which entry.
        refusal, answer = error, await client.get_json("/v1/audit/name")
    if not isinstance(answer, dict) or not isinstance(answer.get("log"), str):
        raise Malformed("audit.page_malformed", "a service's answer about its log cannot be read", got=source)
    domain_of(answer["log"])
    return answer["log"], refusal


def _anchored(answer: Any) -> _Anchored:  # noqa: ANN401 - JSON
    try:
        return _Anchored(
            provider=answer["provider"],
            hsm=answer["hsm"],
            log=answer["log"],
            ledger_id=bytes.fromhex(answer["ledger_id"]),
            height=answer["height"],
            checkpoints={
                name: tuple((int(one["size"]), base64.b64decode(one["signed"], validate=True)) for one in signed)
                for name, signed in answer["checkpoints"].items()
            },
            bundle=base64.b64decode(answer["bundle"], validate=True),
        )
    except (KeyError, TypeError, ValueError, AttributeError, binascii.Error) as error:
        raise Malformed(
            "audit.page_malformed", "the broker's answer about its log cannot be read", got=type(error).__name__
        ) from None


async def _read(client: HttpClient, anchored: _Anchored, name: str) -> ExportedLog:
    from moorline.audit.export import ExportedLog

    signed = anchored.checkpoints[name]
    entries = [data async for page in _pages(client, signed[-1][0]) for data in page]
    return ExportedLog(log=name, checkpoints=tuple(data for _, data in signed), entries=tuple(entries))


async def _pages(client: HttpClient, size: int) -> AsyncIterator[list[bytes]]:
    from moorline.services.service_audit import parse_page

    first = 0
    while first < size:
        page = await client.get_bytes("/v1/audit/export", {"first": str(first), "size": str(size)})
        entries, after = parse_page(page)
        if after <= first:
            raise Malformed("audit.page_malformed", "a page of the log leads nowhere", got=after)
        first = after
        yield entries
