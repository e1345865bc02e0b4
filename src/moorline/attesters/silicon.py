"""Reports from SIMULATED silicon, over the descriptor that the silicon gave this guest when it started it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Mapping
from typing import Final

from moorline.attesters.reports import Report, require_report_data
from moorline.errors import Malformed, Misconfigured, Unavailable
from moorline.wire import frames, schema
from moorline.wire.silicon import GUEST_REPORT_FD, ReportAnswer, ReportRequest, decode_answer

_DEADLINE_S: Final = 10.0
_CAP: Final = 128 * 1024


class SiliconReports:
    """A `ReportSource` over a connected socket. One request at a time; safe to use from several threads."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._connection.settimeout(_DEADLINE_S)
        self._lock = threading.Lock()

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> SiliconReports:
        """Over the descriptor that `environment` names; raises Misconfigured("silicon.no_descriptor")."""
        text = environment.get(GUEST_REPORT_FD, "")
        try:
            return cls(socket.socket(fileno=int(text)))
        except (ValueError, OSError):
            raise Misconfigured(
                "silicon.no_descriptor",
                "this process did not inherit a descriptor to silicon",
                expected=f"{GUEST_REPORT_FD}=<number>",
                got=text or None,
            ) from None

    def report(self, report_data: bytes) -> Report:
        """A report over 64 bytes. Raises Unavailable("report.silicon_gone") if the silicon does not answer."""
        require_report_data(report_data)
        request = frames.frame(schema.encode(ReportRequest(report_data=report_data)))
        with self._lock:
            try:
                self._connection.sendall(request)
                size = int.from_bytes(self._exactly(frames.HEADER), "big")
                if size > _CAP:
                    raise Malformed("frame.too_large", "the silicon announced too large an answer", got=size)
                body = self._exactly(size)
            except OSError as error:  # a timeout is one too
                raise Unavailable("report.silicon_gone", "the silicon does not answer", got=type(error).__name__) from None
        answer = decode_answer(ReportAnswer, body)
        return Report(provider=answer.provider, outblob=answer.outblob, auxblob=answer.auxblob)

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self._connection.recv(size - len(data))
            if not part:
                raise Unavailable("report.silicon_gone", "the silicon closed the connection")
            data += part
        return data
