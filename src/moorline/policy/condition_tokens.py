"""The words of a contract's conditions: tokens of the part of Cedar a contract may use (docs/spec/contract-conditions.md).

Printable ASCII, tabs and newlines only. No two texts that look the same can mean different things, and nothing depends on a
table of characters that grows from one version of a library to the next. Pure; one pass; the number of tokens is bounded.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Final, NamedTuple

from moorline.errors import Malformed

MAX_TOKENS: Final = 4000
MAX_LONG: Final = (1 << 63) - 1
_TOKEN: Final = re.compile(
    r"""(?P<blank>[ \t\n]+|//[ \t!-~]*(?:\n|\Z))
    |(?P<string>"(?:[ !#-\[\]-~]|\\["\\*])*")
    |(?P<number>[0-9]{1,19}(?![0-9A-Za-z_]))
    |(?P<word>[A-Za-z_][A-Za-z0-9_]*)
    |(?P<sign>::|==|!=|<=|>=|&&|\|\||[@(){}\[\].,;<>!])""",
    re.VERBOSE,
)


class Kind(StrEnum):
    """What a token is."""

    STRING = "string"
    NUMBER = "number"
    WORD = "word"
    SIGN = "sign"
    END = "end"


_KINDS: Final = {one.value: one for one in Kind}


class Token(NamedTuple):  # one is made for each word: a dataclass takes thrice the time
    """A token as it stands in the text, and in which line, from 1."""

    kind: Kind
    text: str
    line: int


def malformed(why: str, *, line: int, expected: object = None, got: object = None) -> Malformed:
    """Why conditions are not taken, and where."""
    return Malformed(
        "conditions.malformed",
        f"the conditions cannot be read: {why}",
        expected=expected,
        got=f"line {line}" if got is None else f"line {line}: {got}",
        remedy="docs/spec/contract-conditions.md says what conditions can say",
    )


def tokens(text: str) -> list[Token]:
    """The tokens of a text, an END last. Raises Malformed("conditions.malformed")."""
    found: list[Token] = []
    at, line = 0, 1
    for match in _TOKEN.finditer(text):
        if match.start() != at:
            break
        group, word, at = match.lastgroup, match.group(), match.end()
        if group == "blank":
            line += word.count("\n")  # no other token spans lines
        else:
            found.append(Token(_KINDS[group or ""], word, line))
            if len(found) > MAX_TOKENS:
                raise malformed("they are too long", line=line, expected=f"<= {MAX_TOKENS} words and signs")
    if at != len(text):
        raise malformed("there is a character that has no place here", line=line, got=ascii(text[at]))
    found.append(Token(kind=Kind.END, text="", line=line))
    return found


MAX_FORM_CHARS: Final = 2048
_LITERAL: Final = re.compile(r'"[ !#-\[\]-~]*"')  # a STRING of `_TOKEN` in which nothing is escaped
_TELLING: Final = re.compile(r"[\\@]|//|Action")


def form_of(text: str) -> str | None:
    """The text with another word in all its quotes, where that changes nothing that a reader of conditions can tell.

    Where no quoted word can be an annotation's or an action's and none holds an escape, the reader asks of a quoted word
    only that it is one: a text is as good as its form, line by line. None where that is not so (a comment may hold quotes),
    and for a long text.
    """
    if _TELLING.search(text) is not None:
        return None
    form = _LITERAL.sub('"_"', text)
    return form if len(form) <= MAX_FORM_CHARS else None
