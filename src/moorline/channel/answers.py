"""What a function answers a device, over either channel: its answer, or the problem that kept it from one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from moorline.channel.messages import encode_problem
from moorline.errors import MoorlineError, Unavailable
from moorline.wire.device import Request, Response

ANSWER_DEADLINE_S: Final = 30.0
P = TypeVar("P")


async def respond(peer: P, request: Request, answer: Callable[[P, bytes], Awaitable[bytes]]) -> Response:
    """The response to `request` of `peer`; what `answer` raises of typed errors is told to the peer."""
    try:
        async with asyncio.timeout(ANSWER_DEADLINE_S):
            body = await answer(peer, request.body)
    except MoorlineError as error:
        return Response(id=request.id, body=b"", problem=encode_problem(error))
    except TimeoutError:
        late = Unavailable("device.answer_late", "the function did not answer in time", retry_after_s=5)
        return Response(id=request.id, body=b"", problem=encode_problem(late))
    return Response(id=request.id, body=body, problem=None)
