"""Walking from a trusted header to a newer one, and noticing when two headers of one height both look right.

Sans-IO: `walk` is a generator that yields heights it wants light blocks of; whoever drives it fetches them, from one source
for one walk. It tries to skip to the target, and halves the distance when too few of the trusted validators signed there.

`compare` is given what a witness, another source, has at a height that a walk verified. Two different headers that both
follow from one trusted header are an attack (`comet.attack`): the light client stops, and the evidence, which anybody can
verify, goes to people (evidence.py).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Final

from moorline.errors import Malformed, MoorlineError, NotAuthentic
from moorline.ledger.engines.cometbft import verifier
from moorline.ledger.engines.cometbft.evidence import LightClientAttack
from moorline.ledger.engines.cometbft.verifier import LightBlock, Rules

MAX_STEPS: Final = 256
Walk = Generator[int, LightBlock, tuple[LightBlock, ...]]


def walk(trusted: LightBlock, target: int, rules: Rules) -> Walk:
    """The trace of light blocks verified, the trusted one first, one of height `target` last.

    Raises as verifier.verify, and NotAuthentic("comet.too_many_steps"). A source that hands out another height is malformed:
    Malformed("comet.height_wrong").
    """
    trace = [trusted]
    wanted = [target]
    for _ in range(MAX_STEPS):
        if not wanted:
            return tuple(trace)
        new = yield wanted[-1]
        if new.height != wanted[-1]:
            raise Malformed(
                "comet.height_wrong", "the light block is of another height", expected=wanted[-1], got=new.height
            )
        try:
            verifier.verify(trace[-1], new, rules)
        except NotAuthentic as error:
            if error.code != "comet.overlap_missing":
                raise
            wanted.append((trace[-1].height + new.height) // 2)
        else:
            trace.append(new)
            wanted.pop()
    raise NotAuthentic("comet.too_many_steps", "the headers do not lead to the target", expected=f"<= {MAX_STEPS} steps")


def drive(walking: Walk, fetch: Callable[[int], LightBlock]) -> tuple[LightBlock, ...]:
    """Run a walk over a source that answers at once."""
    try:
        height = next(walking)
        while True:
            height = walking.send(fetch(height))
    except StopIteration as done:
        found: tuple[LightBlock, ...] = done.value
        return found


def compare(trace: Sequence[LightBlock], fetch: Callable[[int], LightBlock], rules: Rules) -> LightClientAttack | None:
    """None if the witness has the same header at the end of the trace; evidence if it has another that verifies too.

    Raises what kept the witness's header from verifying: then it is the witness that cannot be believed.
    """
    last = trace[-1]
    other = fetch(last.height)
    if other.signed.header.hash() == last.signed.header.hash():
        return None
    common = trace[0]
    for one in trace[1:-1]:  # the last header both agree on is where they part
        if fetch(one.height).signed.header.hash() != one.signed.header.hash():
            break
        common = one
    drive(walk(common, last.height, rules), lambda height: other if height == last.height else fetch(height))
    return LightClientAttack.of(common, last, other)


def cross_checked(
    trace: Sequence[LightBlock], witnesses: Sequence[Callable[[int], LightBlock]], rules: Rules
) -> tuple[LightBlock, tuple[MoorlineError, ...]]:
    """The last block of the trace once at least one witness has the same, and what the others could not answer.

    Raises Attack with evidence if a witness has another header that verifies, NotAuthentic("comet.no_witness") if none
    agrees.
    """
    agreed, trouble = 0, []
    for fetch in witnesses:
        try:
            attack = compare(trace, fetch, rules)
        except MoorlineError as error:
            trouble.append(error)
            continue
        if attack is not None:
            raise Attack(attack)
        agreed += 1
    if not agreed:
        raise NotAuthentic(
            "comet.no_witness",
            "no witness has this header",
            expected="one that agrees",
            got=", ".join(error.code for error in trouble) or "none asked",
            remedy="name other authorities as witnesses",
        )
    return trace[-1], tuple(trouble)


class Attack(NotAuthentic):
    """Two headers at one height, both signed: `evidence` shows it to anybody."""

    def __init__(self, evidence: LightClientAttack) -> None:
        self.evidence = evidence
        super().__init__(
            "comet.attack",
            "validators signed two headers at one height",
            expected=evidence.one.header.hash(),
            got=evidence.other.header.hash(),
            remedy="keep the evidence, believe neither, and ask people",
        )
