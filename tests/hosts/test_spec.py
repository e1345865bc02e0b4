"""The example of docs/spec/security-event.md is what the code says."""

import base64
import json
import re
from pathlib import Path

from moorline.services import settings
from moorline.services.verifier_push import ReceiverSettings
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
