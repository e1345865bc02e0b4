"""The pages of docs/spec about packages and launch tokens are true: their examples decode, verify and are what they say."""

import json
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import x25519

from moorline.clock import Instant
from moorline.orchestration import archive, package
from moorline.orchestration import intent as intents
from moorline.orchestration.launcher import launch_fields, launcher_id
from moorline.wire import cose, keys, launch, schema
from moorline.wire.orchestration import GRANT_PURPOSE, INTENT_PURPOSE, LaunchGrant, intent_digest, open_token

from .conftest import der

SPEC = Path(__file__).parents[2] / "docs" / "spec"
_TEXTS = json.loads((SPEC / "examples/launch-token.json").read_text())
EXAMPLE = {name: bytes.fromhex(value) for name, value in _TEXTS.items()}
TOKEN_PAGE = (SPEC / "launch-token.md").read_text()
PACKAGE_PAGE = (SPEC / "package.md").read_text()


def test_the_intent_is_what_the_orchestrator_signed():
    signed = cose.parse(INTENT_PURPOSE, EXAMPLE["signed_intent"])
    cose.verify(signed, keys.parse_public(EXAMPLE["orchestrator_public"]))
    assert intent_digest(EXAMPLE["signed_intent"]) == EXAMPLE["intent_digest"]
    assert f"{len(EXAMPLE['signed_intent'])} bytes" in TOKEN_PAGE


def test_the_fields_are_the_intent_completed():
    intent = intents.parse(EXAMPLE["signed_intent"])
    fields = launch.parse_fields(EXAMPLE["launch_fields"])
    assert fields.launcher == launcher_id(EXAMPLE["launcher_public"])
    completed = launch_fields(intent, launcher=fields.launcher, epoch=7, sequence=41, not_after=intent.not_after)
    assert completed == fields
    assert launch.encode_fields(fields) == EXAMPLE["launch_fields"]


def test_commitment_token_and_proof():
    fields = launch.parse_fields(EXAMPLE["launch_fields"])
    assert launch.commitment(fields) == EXAMPLE["commitment"]
    assert launch.token(EXAMPLE["launch_key"], fields) == EXAMPLE["token"]
    assert launch.token_proof(EXAMPLE["token"], EXAMPLE["challenge_digest"]) == EXAMPLE["token_proof"]


def test_the_grant_is_the_launchers_and_its_token_opens():
    signed = cose.parse(GRANT_PURPOSE, EXAMPLE["signed_grant"])
    grant = schema.decode(LaunchGrant, cose.verify(signed, keys.parse_public(EXAMPLE["launcher_public"])))
    assert (grant.intent_digest, grant.launch_fields) == (EXAMPLE["intent_digest"], EXAMPLE["launch_fields"])
    private = x25519.X25519PrivateKey.from_private_bytes(EXAMPLE["reply_private"])
    assert open_token(grant.sealed_token, private, EXAMPLE["signed_intent"]) == EXAMPLE["token"]


def test_the_page_shows_these_values():
    for name in ("intent_digest", "commitment", "launch_key", "token", "challenge_digest", "token_proof"):
        assert EXAMPLE[name].hex() in TOKEN_PAGE, name


def test_the_package_of_the_page_verifies():
    csar = (SPEC / "examples/records.csar").read_bytes()
    publisher = x509.load_pem_x509_certificate((SPEC / "examples/records-publisher.pem").read_bytes())
    verified = package.verify(csar, signers=(der(publisher),), now=Instant(1_800_000_000))
    assert verified.digest.hex() in PACKAGE_PAGE
    assert f"{len(csar)} bytes" in PACKAGE_PAGE
    assert verified.descriptor.use_case == "4.7"
    files = archive.read(csar)
    manifest = files["records.mf"].split(b"-----BEGIN")[0].decode()
    for text in (manifest, files["TOSCA-Metadata/TOSCA.meta"].decode()):
        for line in filter(None, text.splitlines()):
            assert f"    {line}\n" in PACKAGE_PAGE
