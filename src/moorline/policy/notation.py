"""Documents that people write, policies and reference values, as plain data: YAML, JSON (which is YAML 1.2) or TOML.

What YAML guesses about plain words is where policies go wrong, so of plain words only `true`, `false`, `null` and numbers
(decimal, or hexadecimal with 0x) are not texts: `1e10` in a digest stays a text, `no` is a text, a date is a text. A key
that stands twice is refused in all three. YAML needs PyYAML (`moorline[policy]`); JSON and TOML need nothing.
"""

from __future__ import annotations

import importlib
import json
import re
import tomllib
from typing import Any, Final

from moorline.errors import Misconfigured

MAX_BYTES: Final = 1 << 20
MAX_NODES: Final = 200_000
_TOML: Final = re.compile(r"^\s*[A-Za-z0-9_\".-]+\s*=", re.MULTILINE)
_WORDS: Final = {
    "tag:yaml.org,2002:bool": (r"^(?:true|false)$", "tf"),
    "tag:yaml.org,2002:null": (r"^(?:null|)$", ["n", ""]),
    "tag:yaml.org,2002:int": (r"^(?:0|-?[1-9][0-9]*|0x[0-9a-fA-F]+)$", "-0123456789"),
}


def read_document(data: bytes, *, max_bytes: int = MAX_BYTES, max_nodes: int = MAX_NODES) -> dict[str, Any]:
    """The mapping that `data` is. Who configures the verifier wrote it: errors are Misconfigured (`document.*`)."""
    if len(data) > max_bytes:
        raise Misconfigured("document.too_large", "the document is too large", expected=f"<= {max_bytes}", got=len(data))
    try:
        text = data.decode("utf-8")
        if text.lstrip()[:1] == "{":
            found = json.loads(text, object_pairs_hook=_unique)
        elif _TOML.search(text):
            found = tomllib.loads(text)
        else:
            found = _yaml(text)
    except (ValueError, RecursionError) as error:  # of all three, and of decoding
        raise _undecodable(str(error) or type(error).__name__) from None
    _bounded(found, max_nodes)
    if not isinstance(found, dict):
        raise _undecodable("not a mapping at the top")
    return found


def _undecodable(why: str) -> Misconfigured:
    return Misconfigured("document.undecodable", "the document is not YAML, JSON or TOML", got=" ".join(why.split()))


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    made = dict(pairs)
    if len(made) != len(pairs):
        twice = next(name for index, (name, _) in enumerate(pairs) if name in [one for one, _ in pairs[:index]])
        raise ValueError(f"the key {twice} stands twice")
    return made


def _yaml(text: str) -> object:
    try:
        yaml: Any = importlib.import_module("yaml")
    except ModuleNotFoundError:
        raise Misconfigured(
            "document.no_yaml",
            "YAML is read by PyYAML, which is not installed",
            remedy="install moorline[policy], or write JSON, which is YAML too",
        ) from None
    try:
        return yaml.load(text, _loader(yaml))
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


def _loader(yaml: Any) -> Any:  # noqa: ANN401 - PyYAML brings no types
    class Loader(yaml.SafeLoader):  # type: ignore[misc] # as above
        """The safe loader, without the guesses of YAML 1.1 and without keys that stand twice."""

        yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - what the base class has there

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:  # noqa: ANN401, FBT001, FBT002 - as the base
            return _unique([(self.construct_object(key, deep=True), self.construct_object(value, deep=deep))
                            for key, value in node.value])  # fmt: skip

    for tag, (pattern, first) in _WORDS.items():
        Loader.add_implicit_resolver(tag, re.compile(pattern), list(first))
    return Loader


def _bounded(found: object, max_nodes: int) -> None:
    """Aliases of YAML can make a small text a large, or an endless, document."""
    waiting, seen = [found], 0
    while waiting:
        one = waiting.pop()
        seen += 1
        if seen > max_nodes:
            raise Misconfigured("document.too_large", "the document holds too much", expected=f"<= {max_nodes} parts")
        waiting.extend(one.values() if isinstance(one, dict) else one if isinstance(one, list) else ())
