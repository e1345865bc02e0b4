"""The example of docs/spec/audit-log.md is what the code says, byte for byte."""

import json
import re
from pathlib import Path

import pytest

from moorline.audit import checkpoint, export
from moorline.audit.log import encode_entry, parse_entry
from moorline.clock import Instant
from moorline.errors import MoorlineError
from moorline.ledger import audit_export, records
from moorline.ledger.light_client import LedgerTrust
from moorline.wire import cose, keys, schema

SPEC = Path(__file__).parents[2] / "docs" / "spec"
PAGE = (SPEC / "audit-log.md").read_text("utf-8")
EXAMPLE = json.loads((SPEC / "examples" / "audit-log.json").read_text("utf-8"))
FILE = bytes.fromhex(EXAMPLE["file"])
TRUST = LedgerTrust.parse(bytes.fromhex(EXAMPLE["trust"]))
AT = Instant(EXAMPLE["at"])


def test_the_example_verifies_and_shows_what_the_page_shows():
    found = audit_export.verify(FILE, TRUST, now=AT, max_age_s=60)
    assert [one.log for one in found.logs] == ["broker/hsm-1", "verifier/v1"]
    first = found.logs[1].entries[0]
    text = re.sub(r"\s", "", PAGE)
    assert first.hex() in text
    entry = parse_entry(first)
    assert f'"time":{entry.time},"event":"{entry.event}","number":{entry.number}' in text
    signed = checkpoint_of_example(found)
    shown = re.findall(r"h'([0-9a-f]{8})…'", PAGE)
    assert shown == [one.hex()[:8] for one in (entry.previous, signed.ledger_id, signed.root, signed.head)]
    assert f'"size":{signed.size}' in text
    assert f'"time":{signed.time}' in text


def checkpoint_of_example(found):
    parsed = export.parse(FILE)
    bundle = audit_export.verify_bundle(parsed.bundle, TRUST, now=AT)
    record = records.parse(records.HsmRecord, bundle.record(records.hsm_key("alpha", "hsm-1")))
    key = keys.parse_public(record.signing_public)
    facts = {"ledger_id": TRUST.ledger_id, "provider": found.provider, "hsm": found.hsm, "log": "verifier/v1"}
    return checkpoint.verify(parsed.logs[1].checkpoints[-1], key, **facts)


def test_every_part_has_one_encoding():
    """verifies that: what is parsed and written again is the same file, entry for entry."""
    parsed = export.parse(FILE)
    header = parsed.header
    again = export.write(
        ledger_id=header.ledger_id, provider=header.provider, hsm=header.hsm, bundle=parsed.bundle, logs=parsed.logs
    )
    assert again == FILE
    for one in parsed.logs:
        for data in one.entries:
            entry = parse_entry(data)
            assert encode_entry(**{name: getattr(entry, name) for name in entry.__dataclass_fields__}) == data
        for data in one.checkpoints:
            payload = cose.parse(checkpoint.PURPOSE, data).payload
            assert schema.encode(schema.decode(checkpoint.AuditCheckpoint, payload)) == payload


def test_no_single_byte_of_the_example_can_be_changed():
    """verifies that: each byte of a whole file, changed in its lowest bit, its highest or all, makes it refused."""
    for at in range(len(FILE)):
        changed = bytearray(FILE)
        changed[at] ^= (1, 0x80, 0xFF)[at % 3]
        with pytest.raises(MoorlineError):
            audit_export.verify(bytes(changed), TRUST, now=AT)


def test_no_byte_but_the_digest_rests_on_the_digest_alone():
    """verifies that: with the digest repaired, as an attacker would, the changed byte is found all the same."""
    body = export.split(FILE)[0]
    size = sum(len(export.byte_string(item)) for item in body[:-1])
    passed = []
    for at in range(size):
        changed = bytearray(FILE[:size])
        changed[at] ^= 1
        try:
            audit_export.verify(repaired(bytes(changed)), TRUST, now=AT)
            passed.append(at)
        except MoorlineError:
            pass
    assert passed == []


def repaired(body):
    import hashlib

    return body + export.byte_string(hashlib.sha256(body).digest())
