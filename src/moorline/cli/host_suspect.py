"""`moor host suspect`: make a host show at once what it is."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from moorline.cli import operator_identity, render
from moorline.errors import Malformed
from moorline.rats import Tier

_TIMEOUT_S: Final = 40.0


def suspect(
    name: Annotated[str, typer.Argument(help="The host's id.")],
    reason: Annotated[str, typer.Option("--reason", help="What you saw, for the record.")],
    at: Annotated[str, typer.Option("--at", help="The verifier: https://ADDRESS:PORT|SERVER-NAME.")],
    operator: Annotated[Path, typer.Option("--as", envvar="MOOR_OPERATOR", help="operator.toml: as whom to ask.")],
    *,
    wait: Annotated[int, typer.Option(min=0, max=20, help="Seconds to wait for its answer.")] = 15,
    as_json: render.AsJson = False,
) -> None:
    """Have a host attest now, and show how it stands (exit code 1: not). One that does not answer loses its verdict."""
    url, server_name = operator_identity.verifier_at(at)
    identity, roots_pem = operator_identity.read(operator)

    async def asked() -> object:
        from moorline.wire.http import HttpClient

        async with HttpClient(
            url, server_name=server_name, roots_pem=roots_pem, identity=identity, timeout_s=_TIMEOUT_S
        ) as client:
            body = {"reason": "suspicion", "says": reason, "wait_s": wait}
            return await client.post_json(f"/v1/hosts/{name}/ask", body)

    answer = asyncio.run(asked())
    if not isinstance(answer, dict):
        raise Malformed("cli.verifier_answer", "the verifier's answer cannot be read")
    found: dict[str, Any] = {"host": name, "ask": answer.get("ask")}
    if wait:
        found |= {name: answer.get(name) for name in ("status", "code", "age_s", "expires")}
    render.facts(found, as_json=as_json, then=None if wait else "moor verifier events shows what becomes of it")
    if wait and found["status"] != Tier.AFFIRMING.word:
        raise typer.Exit(1)
