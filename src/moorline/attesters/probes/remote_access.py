"""How administrators get in (SEC009 6.7): what sshd asks for, as its configuration files say."""

from __future__ import annotations

import fnmatch
import shlex
from collections.abc import Iterator
from typing import Final

from moorline.attesters.probes.saying import met, not_met, unread
from moorline.attesters.probes.tree import State, Tree
from moorline.policy.sec009.assessment import Observation

CONFIG: Final = "/etc/ssh/sshd_config"
CAPABILITIES: Final = ("auth.admin.mfa",)
_DEPTH: Final = 8
_FACTORS: Final = {
    "password": "knows",
    "keyboard-interactive": "answers",
    "publickey": "has",
    "hostbased": "",
    "gssapi-with-mic": "ticket",
}


def probe(tree: Tree) -> Iterator[Observation]:
    """Whether every list of AuthenticationMethods asks for two different factors.

    As in sshd the first value of a keyword counts, includes stand where they are written, and what stands in a Match block
    counts against the host if it is weaker. What PAM does behind keyboard-interactive is not seen.
    """
    name, read = CAPABILITIES[0], tree.read(CONFIG)
    if not read.ok:
        if read.state is State.ABSENT:
            yield not_met(name, "no sshd configuration: nothing shows how administrators log in", read.shown())
        else:
            yield unread(name, read)
        return
    words, files = list(_words(tree, CONFIG, 0)), [CONFIG]
    unreadable = [value for keyword, value, _ in words if keyword == "!unread"]
    asked = [(value, in_match) for keyword, value, in_match in words if keyword == "authenticationmethods"]
    main = next((value for value, in_match in asked if not in_match), "any")
    weak = [value for value in (main, *(value for value, in_match in asked if in_match)) if not _two(value)]
    root = next(
        (value for keyword, value, in_match in words if keyword == "permitrootlogin" and not in_match), "prohibit-password"
    )
    evidence = (f"{files[0]}: AuthenticationMethods {main}", f"{files[0]}: PermitRootLogin {root}")
    if unreadable:
        yield unread(name, tree.read(unreadable[0]))
    elif weak:
        yield not_met(name, "one factor is enough to log in", *evidence, value=main)
    else:
        yield met(name, main, *evidence)


def _two(methods: str) -> bool:
    """Whether each alternative (separated by blanks) asks at least two kinds of factor."""
    alternatives = methods.split()
    return bool(alternatives) and all(
        len({_FACTORS.get(one.partition(":")[0], "") for one in alternative.split(",")} - {""}) >= 2
        for alternative in alternatives
    )


def _words(tree: Tree, path: str, depth: int) -> Iterator[tuple[str, str, bool]]:
    """Keyword (lower case), value, and whether it stands in a Match block; `!unread` for a file that cannot be read."""
    read = tree.read(path)
    if not read.ok:
        yield "!unread", path, False
        return
    in_match = False
    for line in read.text.splitlines():
        try:
            parts = shlex.split(line.replace("=", " ", 1) if "=" in line.split(" ")[0] else line, comments=True)
        except ValueError:
            continue  # sshd would refuse to start with such a line
        if not parts:
            continue
        keyword = parts[0].lower()
        if keyword == "match":
            in_match = [one.lower() for one in parts[1:]] != ["all"]
        elif keyword == "include" and depth < _DEPTH:
            for included in _included(tree, parts[1:]):
                for word, value, inside in _words(tree, included, depth + 1):
                    yield word, value, inside or in_match
        else:
            yield keyword, " ".join(parts[1:]), in_match


def _included(tree: Tree, patterns: list[str]) -> Iterator[str]:
    for pattern in patterns:
        full = pattern if pattern.startswith("/") else f"/etc/ssh/{pattern}"
        folder, _, name = full.rpartition("/")
        yield from (f"{folder}/{one}" for one in tree.names(folder) if fnmatch.fnmatchcase(one, name))
