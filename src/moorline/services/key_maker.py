"""The process that makes key pairs ahead, with what nobody else needs of the processor.

It is a child of the broker under SCHED_IDLE: the kernel lets it run where a core would stand idle, so that filling a pool
takes nothing from those who ask now. It is given seeds of the token's generator, answers with pairs and keeps nothing; it
writes no file, dumps no core and ends when the broker does (its input ends). The broker wraps what it made under the token.

    broker -> child   length, CBOR {"profile": text, "seeds": [bytes]}
    child -> broker   length, CBOR [[SubjectPublicKeyInfo, PKCS#8], ...]

Who waits for a key does not wait for this process: below a pool's low mark the broker makes keys itself.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import IO, Final

import structlog

from moorline.errors import Malformed
from moorline.hsm import key_pairs
from moorline.hsm.key_pairs import KeyPair
from moorline.secrecy import keep_secrets
from moorline.wire import cbor
from moorline.wire.frames import HEADER, frame

_DEADLINE_S: Final = 15.0
_END_S: Final = 2.0
_LOG: Final = structlog.stdlib.get_logger("broker")


class KeyMaker:
    """The broker's end. The child is started when it is first needed, and again if it died."""

    def __init__(self, command: Sequence[str] = (sys.executable, "-P", "-m", __name__)) -> None:
        self._command = command
        self._child: subprocess.Popen[bytes] | None = None
        self._turn = threading.Lock()
        self._closed = False

    @property
    def pid(self) -> int | None:
        """The child's, while there is one."""
        return None if self._child is None else self._child.pid

    def make(self, profile: str, seeds: Sequence[bytes]) -> list[KeyPair]:
        """A pair for each seed, made when there is time. If the child fails or has no time for long, they are made here.

        Once the broker ends there are none.
        """
        with self._turn:
            try:
                return self._asked(profile, seeds)
            except (OSError, Malformed) as error:
                self._stop()
                if self._closed:
                    return []
                _LOG.warning("key maker failed", reason=type(error).__name__)
        return [key_pairs.pair(profile, seed) for seed in seeds]

    def close(self) -> None:
        """End the child, also while somebody waits for its answer."""
        self._closed = True
        child = self._child
        if child is not None:
            child.kill()  # it holds nothing that anybody was promised
        with self._turn:
            self._stop()

    def _asked(self, profile: str, seeds: Sequence[bytes]) -> list[KeyPair]:
        to_child, from_child = self._pipes()
        to_child.write(frame(cbor.encode({"profile": profile, "seeds": list(seeds)})))
        to_child.flush()
        if not select.select([from_child], [], [], _DEADLINE_S)[0]:
            message = "no answer in time"
            raise TimeoutError(message)
        answer = _read(from_child)
        made = [] if answer is None else cbor.decode(answer)
        if not isinstance(made, list) or len(made) != len(seeds):
            message = "another number of keys than was asked for"
            raise BrokenPipeError(message)
        return [KeyPair(public=public, private=private) for public, private in made]

    def _pipes(self) -> tuple[IO[bytes], IO[bytes]]:
        if self._closed:
            message = "the broker ends"
            raise BrokenPipeError(message)
        if self._child is None:
            self._child = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
            )
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        return self._child.stdin, self._child.stdout

    def _stop(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        for pipe in (child.stdin, child.stdout):
            with suppress(OSError):
                if pipe is not None:
                    pipe.close()
        with suppress(subprocess.TimeoutExpired):
            child.wait(_END_S)
            return
        child.kill()
        child.wait()


def _read(stream: IO[bytes]) -> bytes | None:
    """One frame; None at the end."""
    head = stream.read(HEADER)
    return stream.read(int.from_bytes(head, "big")) if len(head) == HEADER else None


def main() -> None:
    """The child: answer until the input ends."""
    keep_secrets()
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    while (asked := _read(sys.stdin.buffer)) is not None:
        wanted = cbor.decode(asked)
        assert isinstance(wanted, dict)
        made = [key_pairs.pair(wanted["profile"], seed) for seed in wanted["seeds"]]
        sys.stdout.buffer.write(frame(cbor.encode([[one.public, one.private] for one in made])))
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
