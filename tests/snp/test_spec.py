"""docs/spec/simulated-silicon.md: its example is decoded, and gives what the page says."""

from __future__ import annotations

import re
from pathlib import Path

from moorline.evidence.snp import Product
from moorline.rats import EvidenceRoot
from moorline.simulators.guest_image import Manifest
from moorline.simulators.silicon import IMAGE_GPA
from moorline.verification.anchors import parse_anchor_file
from moorline.verification.snp_launch import in_pages, launch_digest
from moorline.wire import schema

PAGE = Path(__file__).parents[2] / "docs" / "spec" / "simulated-silicon.md"


def _examples() -> list[bytes]:
    """Every indented block of hex on the page, lines joined."""
    blocks = re.findall(r"(?:^ {4}[0-9a-f]{32,}\n|^ {4}[0-9a-f]+\n)+", PAGE.read_text(), re.MULTILINE)
    return [bytes.fromhex("".join(block.split())) for block in blocks]


def test_the_example_hashes_page_has_the_example_digest():
    page, digest, _ = _examples()
    manifest = schema.decode(Manifest, page)
    assert schema.encode(manifest) == page
    assert (len(page), manifest.arguments[-1], manifest.files[0].path) == (
        219,
        "moorline.attesters.collect",
        "moor/start.py",
    )
    assert launch_digest(in_pages(page), first_gpa=IMAGE_GPA) == digest


def test_the_example_anchors_file_is_one():
    (anchor,) = parse_anchor_file(_examples()[2]).snp
    assert (anchor.product, anchor.ark, anchor.intermediates) == (Product.MILAN, b"ark", (b"ask",))
    assert anchor.root is EvidenceRoot.TEST
