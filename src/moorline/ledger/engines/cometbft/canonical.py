"""The few protobuf encodings that CometBFT hashes and signs (0.38: types/canonical.go, types/encoding_helper.go).

Fields stand in the order of their numbers, zero values are left out, embedded messages that Go does not hold as pointers are
written even when empty: the rules of gogoproto, on which every validator agrees to the byte.
"""

from __future__ import annotations

from typing import Final

NANOSECONDS: Final = 1_000_000_000
PREVOTE: Final = 1
PRECOMMIT: Final = 2
PROPOSAL: Final = 32


def varint(value: int) -> bytes:
    """A protobuf varint; negative numbers as their 64-bit two's complement."""
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def number(field: int, value: int) -> bytes:
    """An integer field; nothing for zero."""
    return varint(field << 3) + varint(value) if value else b""


def fixed(field: int, value: int) -> bytes:
    """An sfixed64 field; nothing for zero."""
    return varint(field << 3 | 1) + value.to_bytes(8, "little", signed=True) if value else b""


def blob(field: int, value: bytes) -> bytes:
    """A bytes or string field; nothing if empty."""
    return embedded(field, value) if value else b""


def embedded(field: int, message: bytes) -> bytes:
    """A message field that is written whatever it holds."""
    return varint(field << 3 | 2) + varint(len(message)) + message


def timestamp(time_ns: int) -> bytes:
    """google.protobuf.Timestamp of nanoseconds since the epoch."""
    seconds, nanos = divmod(time_ns, NANOSECONDS)
    return number(1, seconds) + number(2, nanos)


def block_id(block_hash: bytes, parts_total: int, parts_hash: bytes) -> bytes:
    """tendermint.types.BlockID, and CanonicalBlockID, which has the same bytes."""
    return blob(1, block_hash) + embedded(2, number(1, parts_total) + blob(2, parts_hash))


def vote(kind: int, *, height: int, round_: int, block: bytes, time_ns: int, chain_id: str) -> bytes:
    """What a validator signs for a prevote or precommit: CanonicalVote behind its length. `block` is empty for nil."""
    body = (
        number(1, kind)
        + fixed(2, height)
        + fixed(3, round_)
        + blob(4, block)
        + embedded(5, timestamp(time_ns))
        + blob(6, chain_id.encode())
    )
    return varint(len(body)) + body


def proposal(*, height: int, round_: int, pol_round: int, block: bytes, time_ns: int, chain_id: str) -> bytes:
    """What a proposer signs: CanonicalProposal behind its length. `pol_round` is -1 for none."""
    body = (
        number(1, PROPOSAL)
        + fixed(2, height)
        + fixed(3, round_)
        + number(4, pol_round)
        + blob(5, block)
        + embedded(6, timestamp(time_ns))
        + blob(7, chain_id.encode())
    )
    return varint(len(body)) + body


def vote_extension(*, extension: bytes, height: int, round_: int, chain_id: str) -> bytes:
    """What a validator signs for the extension of its precommit: CanonicalVoteExtension behind its length."""
    body = blob(1, extension) + fixed(2, height) + fixed(3, round_) + blob(4, chain_id.encode())
    return varint(len(body)) + body
