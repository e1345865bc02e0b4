"""docs/spec/hsm-backup.md is true: its example opens, and gives keys, without any token."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import x25519
from cryptography.hazmat.primitives.keywrap import aes_key_unwrap_with_padding

from moorline.clock import Instant
from moorline.errors import NotAuthentic
from moorline.hsm import approvals, backup, custody
from moorline.hsm.approvals import Request
from moorline.hsm.custody import Locked
from moorline.wire import keys, schema

SPEC = Path(__file__).parents[2] / "docs" / "spec"
PAGE = (SPEC / "hsm-backup.md").read_text()
EXAMPLE = {name: bytes.fromhex(text) for name, text in json.loads((SPEC / "examples/hsm-backup.json").read_text()).items()}
IDENTITY = keys.parse_public(EXAMPLE["identity_public"])


def shares(locked: Locked, *names: str) -> list[custody.Share]:
    return [
        custody.take_share(locked, name, x25519.X25519PrivateKey.from_private_bytes(EXAMPLE[f"sealing_private_{name}"]))
        for name in names
    ]


def test_the_backup_opens_to_a_quorum_and_its_keys_are_what_they_say():
    found = backup.verify(EXAMPLE["backup"], IDENTITY)
    assert f"{len(EXAMPLE['backup'])} bytes, COSE_Sign1" in PAGE
    assert found.key.id.hex() in PAGE
    assert schema.encode(shares(found.key, "bo")[0]) == EXAMPLE["share_bo"]
    assert f"{len(EXAMPLE['share_bo'])} bytes, CBOR" in PAGE
    for names in (("ada", "bo"), ("cy", "ada"), ("bo", "cy")):
        secret = custody.unlock(found.key, shares(found.key, *names))
        for each in found.keys:
            plain = aes_key_unwrap_with_padding(secret, each.wrapped)
            assert f"{each.label}" in PAGE
            if each.kind == "secret":
                assert len(plain) == 32
                continue
            whole, padding = plain[: 2 + plain[1]], plain[2 + plain[1] :]  # DER of less than 128 bytes
            assert not any(padding)
            private = serialization.load_der_private_key(whole, password=None)
            form = (serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)
            assert private.public_key().public_bytes(*form) == each.point
    (counter,) = found.counters
    assert f"{counter.label} {counter.value}" in PAGE


def test_the_custody_record_gives_the_officers_pin():
    locked = schema.decode(Locked, EXAMPLE["custody"])
    assert locked.purpose == backup.OFFICER_PURPOSE
    assert f"{len(EXAMPLE['custody'])} bytes, CBOR" in PAGE
    assert len(bytes.fromhex(custody.unlock(locked, shares(locked, "ada", "cy")).decode("ascii"))) == 16


def test_the_approval_is_adas():
    request = schema.decode(Request, EXAMPLE["request"])
    assert approvals.digest(request).hex() in PAGE
    circle = schema.decode(Locked, EXAMPLE["custody"]).circle
    assert approvals.verify(request, EXAMPLE["approval"], circle, Instant(request.created)).custodian == "ada"


def test_the_twin_with_one_bit_changed_is_refused():
    changed = bytearray(EXAMPLE["backup"])
    changed[len(changed) // 2] ^= 1
    with pytest.raises(NotAuthentic):
        backup.verify(bytes(changed), IDENTITY)
