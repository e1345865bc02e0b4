# ruff: noqa: INP001 - one file in a package for functions, not a module of a Python package
"""The sample function: a small records service. Each caller has its own records; all are sealed before the host sees them.

A request is CBOR: {"op": "put", "name": text, "data": bytes}, {"op": "get", "name": text} or {"op": "list"}. The answer is
{"ok": true}, {"data": bytes} or {"names": [text]}. Callers are SPIFFE IDs that the agent has authenticated and authorised.
"""

from __future__ import annotations

from moorline.errors import Malformed, Refused
from moorline.wire import cbor
from moorline.workload_agent.function import Context

Request = dict[str, object]

MAX_NAME = 100
MAX_DATA = 512 * 1024


class Function:
    """Records by caller and name."""

    def __init__(self, context: Context) -> None:
        self._storage = context.storage
        self._most = int(context.settings.get("records_per_caller", "100"))

    async def handle(self, request: bytes, caller: str) -> bytes:
        """One request, one answer."""
        item = cbor.decode(request)
        operations = {"put": self._put, "get": self._get, "list": self._list}
        op = item.get("op") if isinstance(item, dict) else None
        if not isinstance(item, dict) or not isinstance(op, str) or op not in operations:
            raise Malformed("records.request", "a request is a map with an op", expected=", ".join(sorted(operations)))
        return cbor.encode(operations[op](item, caller))

    def _put(self, item: Request, caller: str) -> Request:
        name, data = _name(item), item.get("data")
        if not isinstance(data, bytes) or len(data) > MAX_DATA:
            raise Malformed("records.data", "a record is bytes", expected=f"<= {MAX_DATA} bytes")
        mine = self._of(caller)
        if name not in mine and len(mine) >= self._most:
            raise Refused("records.full", "this caller has as many records as it may", expected=self._most)
        self._storage.put(_key(caller, name), data)
        return {"ok": True}

    def _get(self, item: Request, caller: str) -> Request:
        name = _name(item)
        if name not in self._of(caller):
            raise Refused("records.unknown", "this caller has no record of this name")
        return {"data": self._storage.get(_key(caller, name))}

    def _list(self, _item: Request, caller: str) -> Request:
        return {"names": self._of(caller)}

    def _of(self, caller: str) -> list[str]:
        prefix = _key(caller, "")
        return sorted(key[len(prefix) :] for key in self._storage.names() if key.startswith(prefix))


def _key(caller: str, name: str) -> str:
    return f"{caller}|{name}"  # a SPIFFE ID holds no bar, so no caller reaches another's records


def _name(item: Request) -> str:
    name = item.get("name")
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME or not name.isascii() or not name.isprintable():
        raise Malformed("records.name", "a record's name is printable ASCII", expected=f"1 to {MAX_NAME} characters")
    return name
