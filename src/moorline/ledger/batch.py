"""Several transactions in one request, and an answer to each (docs/spec/ledger-batch.md). Pure.

A batch is no transaction: nothing is signed by it, and each of its transactions stands or falls by itself, as if it had come
alone. Those of one sender are taken in the order they have here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from moorline.errors import Malformed, MoorlineError, Unavailable, from_problem
from moorline.wire import schema

MAX_TRANSACTIONS: Final = 256
MAX_BYTES: Final = 1 << 20
MAX_ANSWERS_BYTES: Final = 8 << 20
_PER_TRANSACTION: Final = 8
_AROUND: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Transactions as they travel alone, 1 to MAX_TRANSACTIONS; MAX_BYTES in all."""

    transactions: tuple[bytes, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Why there is no receipt: the members of the problem document that a transaction sent alone is answered with."""

    kind: str
    code: str
    says: str
    expected: str | None
    got: str | None
    remedy: str | None
    retry_after_ms: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came of one: its encoded receipt or a problem. Neither: it was taken, and nobody waited for its receipt."""

    receipt: bytes | None
    problem: Problem | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """One for each transaction, in the batch's order."""

    answers: tuple[Answer, ...]


Outcome = bytes | MoorlineError | None
"""An encoded receipt, an error, or None where a transaction was taken and not waited for."""


def encode(transactions: Sequence[bytes]) -> bytes:
    """A batch as it travels."""
    return schema.encode(Batch(transactions=tuple(transactions)))


def parse(data: bytes) -> tuple[bytes, ...]:
    """The transactions of a batch, untrusted; raises only Malformed (`ledger.batch_malformed`, `cbor.*`, `message.*`)."""
    if len(data) > MAX_BYTES:
        raise Malformed("ledger.batch_malformed", "the batch is too large", expected=f"<= {MAX_BYTES} bytes", got=len(data))
    found = schema.decode(Batch, data, max_bytes=MAX_BYTES).transactions
    if not 1 <= len(found) <= MAX_TRANSACTIONS:
        raise Malformed(
            "ledger.batch_malformed", "a batch has some transactions", expected=f"1 to {MAX_TRANSACTIONS}", got=len(found)
        )
    return found


def split(transactions: Iterable[bytes]) -> list[list[bytes]]:
    """The same in order, in as few batches as they fit in."""
    parts: list[list[bytes]] = []
    size = 0
    for one in transactions:
        size += len(one) + _PER_TRANSACTION
        if not parts or size > MAX_BYTES - _AROUND or len(parts[-1]) >= MAX_TRANSACTIONS:
            parts.append([])
            size = len(one) + _PER_TRANSACTION
        parts[-1].append(one)
    return parts


def encode_answers(outcomes: Sequence[Outcome]) -> bytes:
    """The answers as they travel."""
    return schema.encode(Answers(answers=tuple(_answer(one) for one in outcomes)))


def parse_answers(data: bytes, count: int) -> list[Outcome]:
    """What came of each of `count` transactions; receipts are as the authority gave them. Raises only Malformed."""
    found = schema.decode(Answers, data, max_bytes=MAX_ANSWERS_BYTES).answers
    if len(found) != count:
        raise Malformed("ledger.batch_malformed", "there is not one answer a transaction", expected=count, got=len(found))
    return [one.receipt if one.problem is None else _error(one.problem) for one in found]


def _answer(outcome: Outcome) -> Answer:
    if not isinstance(outcome, MoorlineError):
        return Answer(receipt=outcome, problem=None)
    later = int(outcome.retry_after_s * 1000) if isinstance(outcome, Unavailable) else None
    problem = Problem(
        kind=type(outcome).__name__,
        code=outcome.code,
        says=outcome.says,
        expected=outcome.expected,
        got=outcome.got,
        remedy=outcome.remedy,
        retry_after_ms=later,
    )
    return Answer(receipt=None, problem=problem)


def _error(problem: Problem) -> MoorlineError:
    said: dict[str, object] = {
        name: getattr(problem, name) for name in ("kind", "code", "says", "expected", "got", "remedy")
    }
    if problem.retry_after_ms is not None:
        said["retry_after_s"] = problem.retry_after_ms / 1000
    return from_problem(said)
