"""Where reports come from: the silicon's descriptor, the kernel's interface, and what happens when they misbehave."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest

from moorline.attesters import configfs_tsm
from moorline.attesters.configfs_tsm import ConfigfsTsmReports
from moorline.attesters.reports import report_source
from moorline.attesters.silicon import SiliconReports
from moorline.errors import Malformed, Misconfigured, MoorlineError, Refused, Unavailable
from moorline.wire import frames, schema
from moorline.wire.silicon import GUEST_REPORT_FD, ReportRequest, encode_answer, encode_problem


def _read(connection: socket.socket) -> bytes:
    size = int.from_bytes(connection.recv(4, socket.MSG_WAITALL), "big")
    return connection.recv(size, socket.MSG_WAITALL)


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def _answering(connection: socket.socket, answer: bytes) -> tuple[threading.Thread, list[bytes]]:
    seen: list[bytes] = []

    def serve() -> None:
        seen.append(_read(connection))
        connection.sendall(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    return thread, seen


def test_a_report_over_the_descriptor(world, pair):
    ours, theirs = pair
    answer = world.silicon().report(world.guest(), world.report_data)
    thread, seen = _answering(ours, frames.frame(encode_answer(answer)))
    source = SiliconReports.from_environment({GUEST_REPORT_FD: str(theirs.fileno())})
    report = source.report(world.report_data)
    thread.join()
    theirs.detach()
    assert schema.decode(ReportRequest, seen[0]).report_data == world.report_data
    assert (report.provider, report.outblob, report.auxblob) == ("sev_guest", answer.outblob, answer.auxblob)


@pytest.mark.parametrize(
    ("answer", "kind", "code"),
    [
        (frames.frame(encode_problem(Refused("silicon.no", "no"))), Refused, "silicon.no"),
        (frames.frame(b"\xff"), Malformed, "cbor.undecodable"),
        (frames.frame(b"\x81\x01"), Malformed, "silicon.answer_malformed"),
        ((1 << 24).to_bytes(4, "big"), Malformed, "frame.too_large"),
    ],
)
def test_an_answer_that_is_no_report_is_a_typed_error(pair, answer, kind, code):
    ours, theirs = pair
    thread, _ = _answering(ours, answer)
    with pytest.raises(kind) as refusal:
        SiliconReports(theirs).report(bytes(64))
    thread.join()
    assert refusal.value.code == code


def test_silicon_that_is_gone_is_unavailable(pair):
    ours, theirs = pair
    ours.close()
    with pytest.raises(Unavailable) as refusal:
        SiliconReports(theirs).report(bytes(64))
    assert refusal.value.code == "report.silicon_gone"


@pytest.mark.parametrize("text", ["", "no", "-1", "999999"])
def test_a_guest_without_its_descriptor_is_misconfigured(text):
    with pytest.raises(Misconfigured):
        SiliconReports.from_environment({GUEST_REPORT_FD: text})


@pytest.mark.parametrize("size", [0, 32, 63, 65])
def test_report_data_is_never_padded(pair, tmp_path, size):
    for source in (SiliconReports(pair[1]), ConfigfsTsmReports(tmp_path)):
        with pytest.raises(Malformed) as refusal:
            source.report(bytes(size))
        assert refusal.value.code == "report.data_size"


def test_a_machine_without_any_source_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(configfs_tsm, "KERNEL_PATH", tmp_path / "not here")
    with pytest.raises(Unavailable) as refusal:
        report_source({})
    assert refusal.value.code == "report.no_source"


class Kernel:
    """A configfs-tsm directory that answers as the kernel does: a thread that watches `inblob` through a FIFO."""

    def __init__(self, root: Path, *, steps: list[int], auxblob: bytes | None = b"certificates") -> None:
        self.root = root
        self._steps = steps
        self._auxblob = auxblob
        self.asked: list[bytes] = []

    def populate(self, entry: Path) -> None:
        """What the kernel does when the directory is made."""
        (entry / "generation").write_text("7\n")
        (entry / "provider").write_text("sev_guest\n")

    def write(self, entry: Path, data: bytes) -> None:
        """What the kernel does when `inblob` is written: a report, and one generation more, or several under contention."""
        self.asked.append(data)
        (entry / "outblob").write_bytes(b"report over " + data)
        if self._auxblob is not None:
            (entry / "auxblob").write_bytes(self._auxblob)
        step = self._steps.pop(0) if self._steps else 1
        (entry / "generation").write_text(f"{int((entry / 'generation').read_text()) + step}\n")


@pytest.fixture
def kernel(monkeypatch, tmp_path):
    """Real files under tmp_path; only the two moments where the kernel acts are played by `Kernel`."""
    made = Kernel(tmp_path, steps=[])
    mkdir, write_bytes, rmdir = Path.mkdir, Path.write_bytes, Path.rmdir

    def acting_mkdir(path: Path, *arguments: object, **named: object) -> None:
        mkdir(path, *arguments, **named)
        if path.parent == tmp_path:
            made.populate(path)

    def acting_write(path: Path, data: bytes) -> int:
        if path.name == "inblob":
            made.write(path.parent, data)
            return len(data)
        return write_bytes(path, data)

    def acting_rmdir(path: Path) -> None:
        for attribute in path.iterdir():  # configfs removes its own attributes
            attribute.unlink()
        rmdir(path)

    monkeypatch.setattr(Path, "mkdir", acting_mkdir)
    monkeypatch.setattr(Path, "write_bytes", acting_write)
    monkeypatch.setattr(Path, "rmdir", acting_rmdir)
    return made


def test_the_kernel_gives_a_report_and_the_entry_is_removed(kernel):
    report = ConfigfsTsmReports(kernel.root).report(b"\1" * 64)
    assert (report.provider, report.auxblob) == ("sev_guest", b"certificates")
    assert report.outblob == b"report over " + b"\1" * 64
    assert list(kernel.root.iterdir()) == []


def test_a_report_that_another_write_touched_is_asked_for_again(kernel):
    kernel._steps = [2, 1]
    assert ConfigfsTsmReports(kernel.root).report(bytes(64)).provider == "sev_guest"
    assert len(kernel.asked) == 2


def test_endless_contention_is_unavailable(kernel):
    kernel._steps = [2] * 99
    with pytest.raises(Unavailable) as refusal:
        ConfigfsTsmReports(kernel.root).report(bytes(64))
    assert refusal.value.code == "report.contended"
    assert list(kernel.root.iterdir()) == []


def test_a_provider_without_certificates_gives_none(kernel):
    kernel._auxblob = None
    assert ConfigfsTsmReports(kernel.root).report(bytes(64)).auxblob == b""


def test_no_interface_and_a_broken_one_are_unavailable(tmp_path):
    for root in (tmp_path / "nothing", tmp_path):
        with pytest.raises(MoorlineError) as refusal:
            ConfigfsTsmReports(root).report(bytes(64))
        assert refusal.value.code == "report.kernel"
