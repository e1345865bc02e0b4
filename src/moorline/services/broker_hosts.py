"""The attestation authority as the broker asks it: what it says about a host now, and which key it enrolled for it.

An Attestation Result counts by its signature, made with the verifier key in this provider's own token, and not by the
connection it came over.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

from moorline.clock import Clock, Instant
from moorline.errors import Malformed, NotAuthentic, Refused
from moorline.policy.ear import parse_verified
from moorline.rats import AttestationResult, Tier
from moorline.storage.verifier_events import GAINED, LOST, VerdictEvent
from moorline.wire.http import ClientIdentity, HttpClient
from moorline.wire.keys import PublicKey

_ANSWER_S: Final = 10.0
_CODE_CHARS: Final = 128
_ASK_AHEAD: Final = 0.75
"""How old, of `reuse_s`, a standing result may be before it is asked for again while it is still used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """The result that stands for a host, or why none does (a code)."""

    result: AttestationResult | None
    problem: str | None
    digest: bytes | None = None
    """SHA-256 of the token that the result came in."""

    @property
    def expires(self) -> int:
        """When the result ends; 0 without one."""
        return 0 if self.result is None else self.result.expires

    def refusal(self, host: str) -> str | None:
        """Why this does not let anything go on on `host`, as a code; None if it does."""
        if self.result is None:
            return self.problem or "result.none"
        if self.result.subject != f"host/{host}":
            return "result.other_subject"
        first = self.result.first_refusal()
        if first is not None:
            return first.code
        return None if self.result.status is Tier.AFFIRMING else "result.not_affirming"

    @property
    def said(self) -> bool:
        """Whether the authority said something about the host at all; an answer that cannot be read says nothing."""
        return self.result is not None or (self.problem or "").startswith(("result.", "ear.expired"))


@dataclass(frozen=True, slots=True, kw_only=True)
class EventPage:
    """Verdicts gained and lost, in order; the cursor to ask with next; the newest cursor the verifier has."""

    events: tuple[VerdictEvent, ...]
    next: int
    newest: int


_Asking = tuple[float, "asyncio.Task[Standing]"]
"""A question on its way, and when it was asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostAuthority:
    """The verifier of this provider."""

    url: str
    server_name: str
    roots_pem: bytes
    identity: Callable[[], ClientIdentity]
    keys: Callable[[], tuple[PublicKey, ...]]
    """Keys that may have signed a result: the active one, and those that retire."""
    audience: str
    clock: Clock
    reuse_s: float = 0.0
    """How long a result that stands is used again; an event about its host ends that at once."""
    _clients: dict[float, tuple[ClientIdentity, HttpClient]] = field(default_factory=dict)
    _kept: dict[str, tuple[float, Standing]] = field(default_factory=dict)
    _asking: dict[str, _Asking] = field(default_factory=dict)

    async def standing(self, host: str) -> Standing:
        """The verified result about a host. Raises Unavailable if the verifier cannot be asked: that decides nothing."""
        now, kept = time.monotonic(), self._kept.get(host)
        if kept is not None and kept[0] > now - self.reuse_s and self.clock.now() < kept[1].expires:
            if kept[0] <= now - _ASK_AHEAD * self.reuse_s and host not in self._asking:
                self._ask(host, now)  # what is asked for all the time is asked again in time, and nobody waits for it
            return kept[1]
        # A question on its way is as good as its answer will be: all sessions of a host ask it once.
        asking = self._asking.get(host)
        if asking is None or asking[0] <= now - self.reuse_s:
            asking = self._ask(host, now)
        return await asyncio.shield(asking[1])

    def _ask(self, host: str, now: float) -> _Asking:
        asking = self._asking[host] = (now, asyncio.ensure_future(self._asked(host)))
        asking[1].add_done_callback(lambda _: self._answered(host, asking))
        return asking

    def _answered(self, host: str, asking: _Asking) -> None:
        """Keep what was said, unless something newer was asked, or the authority has said since that it changed."""
        asked, task = asking
        failed = task.cancelled() or task.exception() is not None
        if self._asking.get(host) is not asking:
            return
        del self._asking[host]
        self._kept.pop(host, None)
        if not failed and task.result().result is not None:
            self._kept[host] = (asked, task.result())

    def forget(self, host: str) -> None:
        """The authority said something new about a host: what was said or asked before does not count for it any more."""
        self._kept.pop(host, None)
        self._asking.pop(host, None)

    async def _asked(self, host: str) -> Standing:
        try:
            answer = await self._get(f"/v1/results/{host}")
            jwt = answer.get("ear") if isinstance(answer, dict) else None
            if not isinstance(jwt, str):
                raise Malformed("broker.verifier_answer", "the attestation authority's answer has no result")
            result = parse_verified(jwt, self.keys(), now=self.clock.now(), audience=self.audience)
        except (Refused, Malformed, NotAuthentic) as error:
            return Standing(result=None, problem=error.code)
        return Standing(result=result, problem=None, digest=hashlib.sha256(jwt.encode("ascii")).digest())

    async def events(self, *, after: int, wait_s: int) -> EventPage:
        """Events after a cursor, as soon as there are any, or none after `wait_s`.

        Raises Malformed("broker.verifier_answer"), what the verifier answers, or Unavailable.
        """
        query = {"after": str(after), "wait_s": str(wait_s)}
        answer = await self._get("/v1/events", query, timeout_s=wait_s + _ANSWER_S)
        try:
            assert isinstance(answer, dict)
            page = EventPage(
                events=tuple(_event(one) for one in answer["events"]),
                next=_number(answer["next"]),
                newest=_number(answer["newest"]),
            )
            cursors = (after, *(one.cursor for one in page.events))
            assert all(low < high for low, high in pairwise(cursors))
            assert page.next == cursors[-1]
        except (AssertionError, KeyError, TypeError):
            raise Malformed("broker.verifier_answer", "the attestation authority's events cannot be read") from None
        return page

    async def enrolled_key(self, host: str) -> bytes:
        """TPMT_PUBLIC of the attestation key enrolled for a host. Raises what the verifier answers."""
        answer = await self._get(f"/v1/hosts/{host}/enrolment")
        try:
            assert isinstance(answer, dict)
            return base64.b64decode(answer["ak_public"], validate=True)
        except (AssertionError, KeyError, TypeError, binascii.Error):
            raise Malformed("broker.verifier_answer", "the attestation authority's answer has no key") from None

    async def _get(self, path: str, query: dict[str, str] | None = None, *, timeout_s: float = _ANSWER_S) -> object:
        return await self._client(timeout_s).get_json(path, query)

    def _client(self, timeout_s: float) -> HttpClient:
        """A client that is kept while the broker's own certificate is the same; that is replaced within the hour."""
        identity = self.identity()
        kept = self._clients.get(timeout_s)
        if kept is not None and kept[0] == identity:
            return kept[1]
        made = HttpClient(
            self.url,
            server_name=self.server_name,
            roots_pem=self.roots_pem,
            identity=identity,
            timeout_s=timeout_s,
        )
        # The one before may be in use just now; its idle connections are closed by the verifier within seconds.
        self._clients[timeout_s] = (identity, made)
        return made


def _event(item: dict[str, object]) -> VerdictEvent:
    kind, host, code = item["kind"], item["host"], item["code"]
    assert kind in (LOST, GAINED)
    assert isinstance(kind, str)
    assert isinstance(host, str)
    assert isinstance(code, str)
    return VerdictEvent(
        cursor=_number(item["cursor"]),
        host=host,
        at=Instant(_number(item["at"])),
        kind=kind,
        code=code[:_CODE_CHARS],
        result_expires=Instant(_number(item["result_expires"])),
    )


def _number(item: object) -> int:
    assert isinstance(item, int)
    assert 0 <= item < 1 << 63
    return item
