"""The parsers that ./dev fuzz drives for minutes, driven briefly here: any bytes give a value or Malformed."""

import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moorline.errors import Malformed

sys.path.insert(0, str(Path(__file__).parent))

from formats import FORMATS


@pytest.mark.parametrize("name", FORMATS)
def test_any_bytes_give_a_value_or_malformed(name):
    @settings(max_examples=150, deadline=None)
    @given(st.binary(max_size=2048) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")))
    def any_bytes(data: bytes) -> None:
        try:
            FORMATS[name](data)
        except Malformed as refusal:
            assert "." in refusal.code

    any_bytes()
