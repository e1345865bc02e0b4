"""What a host agent and a (simulated) secure processor say to each other over a unix socket.

This is the simulation of the hypervisor's launch interface: SNP_LAUNCH_START, _UPDATE and _FINISH in one request, and the
guest's life cycle after it. The host supplies what a hypervisor supplies on silicon: which image to load, its arguments
that are measured (`entry`), HOST_DATA, policy, and the unmeasured devices (`shared`). It does not choose measurement or
chip id, and cannot ask for reports: only the guest can, over a socket that it inherits (GUEST_REPORT_FD).
One frame (wire.frames) a message, deterministic CBOR, answered by `["ok", message]` or `["problem", error]`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Final, TypeVar

from moorline.errors import Malformed, MoorlineError, from_problem
from moorline.wire import cbor, schema
from moorline.wire.schema import Bytes32, Bytes48, Bytes64, Size

T = TypeVar("T")

GUEST_REPORT_FD: Final = "MOOR_SILICON_FD"
"""Environment variable inside a guest: the number of the inherited descriptor that answers ReportRequest frames."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchGuest:
    """Start a guest. `entry` is a Python module of the measured runtime, e.g. `moorline.workload_agent`.

    `shared` is a host directory that becomes /run/moor inside: configuration, package and sockets; its content is not
    measured (as any virtio device). `debug` sets the guest policy's debug bit.
    """

    op: str  # "launch"
    name: str
    entry: str
    host_data: Bytes32
    shared: str
    debug: bool
    memory_mib: int
    pids: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestRequest:
    """`op` is "status", "stop" (SIGTERM, then SIGKILL) or "kill" of the guest called `name`."""

    op: str
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PlatformRequest:
    """Ask for chip id, the measurement of an entry under this silicon's runtime, and certificates."""

    op: str  # "platform"
    entry: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Platform:
    """Public facts of a chip. `vcek`, `ask`, `ark` are DER."""

    chip_id: Bytes64
    measurement: Bytes48
    product: str
    vcek: bytes
    ask: bytes
    ark: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestStatus:
    """`state` is "running" or "ended"; `exit_code` is null while running, 128+n after signal n."""

    name: str
    state: str
    pid: int
    exit_code: int | None
    measurement: Bytes48


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportRequest:
    """From inside the guest: a report over these 64 bytes."""

    report_data: Bytes64


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportAnswer:
    """As configfs-tsm gives it: `outblob` is the attestation report, `auxblob` the GHCB certificate table."""

    provider: str
    outblob: Annotated[bytes, Size(at_most=4096)]
    auxblob: Annotated[bytes, Size(at_most=65536)]


def encode_answer(message: object) -> bytes:
    """The frame body that answers a request with `message`."""
    return cbor.encode(["ok", schema.to_item(message)])


def encode_problem(error: MoorlineError) -> bytes:
    """The frame body that answers a request with `error`; seconds are rounded up, since our CBOR has no fractions."""
    item = {name: value if isinstance(value, str) else int(value) + 1 for name, value in error.as_problem().items()}
    return cbor.encode(["problem", item])


def decode_answer(kind: type[T], data: bytes) -> T:
    """The message in an answer; raises the error in it, or Malformed if it is neither. Input is untrusted."""
    item = cbor.decode(data)
    if isinstance(item, list) and len(item) == 2 and item[0] == "ok":
        return schema.from_item(kind, item[1])
    if isinstance(item, list) and len(item) == 2 and item[0] == "problem":
        raise from_problem(item[1])
    raise Malformed("silicon.answer_malformed", "the silicon's answer is neither a message nor a problem")
