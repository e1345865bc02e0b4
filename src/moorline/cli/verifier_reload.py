"""`moor verifier reload`: have a running verifier read its reference values again, and hear whether it took them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any

import typer

from moorline.cli import operator_identity, render
from moorline.errors import Malformed


def reload(
    at: Annotated[str, typer.Option("--at", help="The verifier: https://ADDRESS:PORT|SERVER-NAME.")],
    operator: Annotated[Path, typer.Option("--as", envvar="MOOR_OPERATOR", help="operator.toml: as whom to ask.")],
    *,
    as_json: render.AsJson = False,
) -> None:
    """Read the reference values again. Sets that are refused (exit code 1) change nothing: those before stay in force."""
    url, name = operator_identity.verifier_at(at)
    identity, roots_pem = operator_identity.read(operator)

    async def asked() -> object:
        from moorline.wire.http import HttpClient

        async with HttpClient(url, server_name=name, roots_pem=roots_pem, identity=identity) as client:
            return await client.post_json("/v1/references/reload", {})

    answer: Any = asyncio.run(asked())
    try:
        found = {"digest": str(answer["digest"]), **{str(one["name"]): int(one["serial"]) for one in answer["sets"]}}
    except (KeyError, TypeError, ValueError):
        raise Malformed("cli.verifier_answer", "the verifier's answer cannot be read") from None
    render.facts(found, as_json=as_json)
