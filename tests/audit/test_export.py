"""The exported file as a format: any bytes are a file or malformed, and what was written is read as it was."""

import contextlib
import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moorline.audit import checkpoint, export
from moorline.audit.export import ExportedLog
from moorline.errors import Malformed
from moorline.services.service_audit import page_response, parse_page

_SOME_BYTES = st.binary(min_size=1, max_size=400)
_LOGS = st.lists(st.lists(_SOME_BYTES, max_size=4), min_size=1, max_size=3)


def file_of(logs, bundle=b"bundle"):
    kept = [
        ExportedLog(log=f"verifier/v{number}", checkpoints=(b"c",), entries=tuple(entries))
        for number, entries in enumerate(logs)
    ]
    return kept, export.write(ledger_id=bytes(32), provider="alpha", hsm="hsm-1", bundle=bundle, logs=kept)


@given(_LOGS, st.binary(max_size=70_000))
def test_what_was_written_is_read_as_it_was(logs, bundle):
    kept, data = file_of(logs, bundle)
    found = export.parse(data)
    assert (list(found.logs), found.bundle, found.cut, found.damaged) == (kept, bundle, False, False)


@given(_LOGS, st.data())
def test_a_cut_or_damaged_file_is_malformed_or_says_so(logs, data):
    """verifies that: no prefix of a file, and no change of one byte, reads as a whole file."""
    _, file = file_of(logs)
    at = data.draw(st.integers(0, len(file) - 1))
    changed = bytearray(file)
    changed[at] ^= data.draw(st.integers(1, 255))
    for bad in (file[:at], bytes(changed), file + b"\x40"):
        with contextlib.suppress(Malformed):
            found = export.parse(bad)
            assert found.cut or found.damaged


@given(st.binary(max_size=300))
def test_any_bytes_are_a_file_or_malformed(data):
    with contextlib.suppress(Malformed):
        export.parse(data)
    with contextlib.suppress(Malformed):
        parse_page(data)
    _, file = file_of([[b"x"]])
    with contextlib.suppress(Malformed):
        export.parse(file[:120] + data)


@pytest.mark.parametrize("size", [0, 1, 23, 24, 255, 256, 65_535, 65_536, export.MAX_ITEM_BYTES])
def test_lengths_have_one_form(size):
    written = export.byte_string(bytes(size))
    assert export.split(written) == ([bytes(size)], False)
    if size < 65_536:
        width = 4 if size > 255 else 2
        longer = bytes([0x5A if width == 4 else 0x59]) + size.to_bytes(width, "big") + bytes(size)
        if written != longer:
            with pytest.raises(Malformed, match="file_malformed"):
                export.split(longer)


def test_what_is_too_long_or_no_byte_string_is_malformed():
    too_long = b"\x5a" + (export.MAX_ITEM_BYTES + 1).to_bytes(4, "big") + bytes(export.MAX_ITEM_BYTES + 1)
    for bad in (too_long, b"\x5b" + bytes(8), b"\x5f\xff", b"\x60", b"\xa0"):
        with pytest.raises(Malformed, match="file_malformed"):
            export.split(bad)


def test_an_entry_left_out_leaves_a_whole_file():
    """verifies that: the digest is no protection, and is not taken for one."""
    _, file = file_of([[b"a", b"b", b"c"]])
    cut = export.without(file, log="verifier/v0", entry=1)
    found = export.parse(cut)
    assert (found.logs[0].entries, found.damaged) == ((b"a", b"c"), False)
    assert cut[-32:] == hashlib.sha256(cut[:-34]).digest()
    with pytest.raises(IndexError):
        export.without(file, log="verifier/v0", entry=3)


def test_pages_go_on_where_they_end():
    rows = tuple((number, bytes([number])) for number in (0, 1, 3, 4))

    def read(*, first, limit):
        return tuple(row for row in rows if row[0] >= first)[: min(limit, 2)]

    found, first = [], 0
    while first < 4:
        entries, first = parse_page(page_response(read, first, 4).body)
        found += entries
    assert found == [b"\x00", b"\x01", b"\x03"]
    for bad in (-1, 0), (0, -1):
        with pytest.raises(Malformed, match="negative"):
            page_response(read, *bad)


@pytest.mark.parametrize("name", ["", "broker", "host/h1", "broker/", "broker/A B", "broker/a/b"])
def test_only_services_have_logs(name):
    with pytest.raises(Malformed):
        checkpoint.domain_of(name)
