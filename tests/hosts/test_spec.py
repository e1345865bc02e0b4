"""The example of docs/spec/security-event.md is what the code says."""

import base64
import dataclasses
import json
import re
import tomllib
from pathlib import Path

from moorline.nfv import SpiffeId
from moorline.services import settings
from moorline.services.host_attesting import AttestationSettings, FurtherVerifier
from moorline.services.verifier_push import ReceiverSettings
from moorline.services.verifier_settings import VerifierSettings
from moorline.wire import keys, security_event

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "spec" / "security-event.md").read_text("utf-8")
HOWTO = (DOCS / "howto" / "follow-verdicts.md").read_text("utf-8")
EXAMPLE = json.loads((DOCS / "spec" / "examples" / "security-event.json").read_text("utf-8"))


def test_the_example_verifies_and_shows_what_the_page_shows():
    token = EXAMPLE["token"].encode()
    key = keys.parse_public(bytes.fromhex(EXAMPLE["key"]))
    event = security_event.parse_verified(token, key, issuer=EXAMPLE["issuer"], audience=EXAMPLE["audience"])
    assert (event.host, event.kind, event.cursor) == ("h1", "verdict_lost", 7)
    shown = json.JSONDecoder()
    block = re.search(r"```json\n(.*?)```", PAGE, re.DOTALL).group(1)
    header, end = shown.raw_decode(block)
    claims, _ = shown.raw_decode(block[end:].lstrip())
    parts = [json.loads(base64.urlsafe_b64decode(part + b"==")) for part in token.split(b".")[:2]]
    assert [header, claims] == parts


def test_the_settings_of_the_howto_are_settings(tmp_path):
    table = re.search(r"```toml\n\[\[receivers\]\]\n(.*?)```", HOWTO, re.DOTALL).group(1)
    (tmp_path / "one.toml").write_text(table, "utf-8")
    found = settings.load(ReceiverSettings, tmp_path / "one.toml")
    assert (found.name, found.audience) == ("siem", "siem.example")


def test_the_settings_of_several_verifiers_are_settings():
    """verifies that: every key in the page's blocks is a setting of the file that the page says it is for."""
    page = (DOCS / "howto" / "run-several-verifiers.md").read_text("utf-8")
    processes, host, further, asking = (tomllib.loads(one) for one in re.findall(r"```toml\n(.*?)```", page, re.DOTALL))

    def fields(kind):
        return {field.name for field in dataclasses.fields(kind)}

    assert set(processes) | set(asking) <= fields(VerifierSettings)
    assert set(host["attestation"]) <= fields(AttestationSettings)
    (one,) = further["attestation"]["further"]
    assert set(one) <= fields(FurtherVerifier)
    assert str(SpiffeId.parse(asking["may_ask"][0])) == asking["may_ask"][0]
