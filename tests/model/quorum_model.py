"""Quorum, change of the authority set and promotion of the embedded engine, as a machine small enough to search entirely.

    python -m tests.model.quorum_model        searches the rules as they are, then each mutation, and says what it found

The rules, in the words of ledger.engines:
  R1  an honest authority signs one block a height, whatever the term, and only on top of the head it has adopted;
  R2  it signs only what the sequencer of the term it follows proposed;
  R3  a block is committed by a quorum of the set in force before it (`checkpoint.quorum_of`); who sees that adopts it;
  R4  a sequencer may give up a block that it did not sign itself, and signs last;
  R5  a word for term 1 says what the authority has adopted and what it signed above that; with the words of a quorum the new
      sequencer takes the highest head, and proposes again the block above it that most of them signed, if there is one.
  R6  in the transaction that commits a block a sequencer may propose the next (docs/adr/0020): one step does both.
One authority is Byzantine: it signs everything, proposes everything, and says anything in its word. Messages are lost and
overtake one another without limit: whatever was sent may be acted on at any time, or never.

Invariants: never two blocks committed at one height; a block that changes the set was signed by a quorum of the old set;
once a block is committed, no promotion leads to a head without it, nor to another block in its place.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

from moorline.ledger.checkpoint import quorum_of, tolerated_faults


@dataclass(frozen=True, slots=True, order=True)
class Block:
    """Which block at which height, on top of which; `GENESIS` is at 0."""

    height: int
    name: str
    parent: Block | None = None

    def chain(self) -> tuple[Block, ...]:
        return (() if self.parent is None else self.parent.chain()) + (self,)


GENESIS = Block(0, "-")


@dataclass(frozen=True)
class Rules:
    """The model's bounds and its rules; the fields with a default False are mutations."""

    byzantine: int
    heights: int
    names: str = "xy"
    promotes: bool = True
    second_names: str = "x"
    after_x: tuple[int, ...] = (0, 1, 2, 3)  # the set after block x at height 1; 4 is an honest newcomer
    quorum: int | None = None  # M1: another quorum than quorum_of
    signs_again: bool = False  # M2: one signature a height AND term
    forgets_held: bool = False  # M3: a new sequencer proposes anew whatever was signed before
    new_set_signs: bool = False  # M4: a block is committed by a quorum of the set after it
    few_words: bool = False  # M5: f+1 words are enough
    ahead: bool = False  # M6: signs and proposes on top of what it signed itself, committed or not
    together: bool = True  # R6

    @property
    def actors(self) -> tuple[int, ...]:
        return (0, 1, 2, 3, 4) if 4 in self.after_x else (0, 1, 2, 3)

    def set_after(self, block: Block) -> tuple[int, ...]:
        changed = any(one.height == 1 and one.name == "x" for one in block.chain())
        return self.after_x if changed else (0, 1, 2, 3)

    def false(self, who: int) -> bool:
        return who == self.byzantine

    def needed(self, members: int) -> int:
        return self.quorum or quorum_of(members)


@dataclass(frozen=True, slots=True)
class State:
    """What is durable at the honest ones (by authority), and what was ever sent."""

    signed: tuple[frozenset[tuple[int, Block]], ...]  # (term, block) an authority signed
    heads: tuple[Block, ...]
    words: tuple[tuple[Block, Block | None] | None, ...]  # an authority's word for term 1: its head and what it held
    proposed: frozenset[tuple[int, Block]]
    taken: tuple[Block, Block | None] | None  # what the new sequencer took over: head and the block above it


def start(rules: Rules) -> State:
    count = len(rules.actors)
    return State(
        signed=(frozenset(),) * count,
        heads=(GENESIS,) * count,
        words=(None,) * count,
        proposed=frozenset(),
        taken=None,
    )


def committed(rules: Rules, state: State, block: Block) -> bool:
    """R3, with every signature a Byzantine authority could add."""
    assert block.parent is not None
    members = rules.set_after(block if rules.new_set_signs else block.parent)
    return len(signers(rules, state, block, members)) >= rules.needed(len(members))


def signers(rules: Rules, state: State, block: Block, members: tuple[int, ...]) -> set[int]:
    honest = {who for who in rules.actors if not rules.false(who) and any(one == block for _, one in state.signed[who])}
    return {who for who in members if rules.false(who) or who in honest}


def candidates(rules: Rules, parent: Block) -> Iterator[Block]:
    if parent.height < rules.heights:
        for name in rules.names if parent.height == 0 else rules.second_names:
            yield Block(parent.height + 1, name, parent)


def steps(rules: Rules, state: State) -> Iterator[State]:
    """Everything that can happen next."""
    yield from _proposals(rules, state)
    for who in rules.actors:
        if rules.false(who):
            continue
        term = 0 if state.words[who] is None else 1
        for sent_term, block in state.proposed:
            if sent_term == term and _may_sign(rules, state, who, term, block):
                yield _with(state, who, signed=state.signed[who] | {(term, block)})
        for block in {one for _, one in state.proposed}:
            if block.parent == state.heads[who] and committed(rules, state, block):
                adopted = _with(state, who, heads=block)
                yield adopted
                if rules.together and who in (0, 1):
                    yield from (after for after in _proposals(rules, adopted) if _by(who, adopted, after))
        if rules.promotes and state.words[who] is None:
            yield _with(state, who, words=(state.heads[who], _held(state, who)))
    if rules.promotes and state.taken is None:
        yield from _taken_over(rules, state)


def _by(who: int, before: State, after: State) -> bool:
    """Whether it is this sequencer that proposes, on top of what it has just committed."""
    return any(term == who and one.parent == before.heads[who] for term, one in after.proposed - before.proposed)


def _proposals(rules: Rules, state: State) -> Iterator[State]:
    known = {GENESIS, *(one for _, one in state.proposed)}
    for term, sequencer in ((0, 0), (1, 1)):
        if term == 1 and state.taken is None:
            continue
        for parent in known:
            for block in candidates(rules, parent):
                may = rules.false(sequencer) or _honestly(rules, state, term, sequencer, block)
                if may and (term, block) not in state.proposed:
                    yield replace(state, proposed=state.proposed | {(term, block)})


def _honestly(rules: Rules, state: State, term: int, sequencer: int, block: Block) -> bool:
    own = [one for _, one in state.signed[sequencer]] if rules.ahead else []
    if state.heads[sequencer] != block.parent and block.parent not in own:
        return False
    if term == 0 and state.words[sequencer] is not None:
        return False
    if term == 1 and state.taken is not None and not rules.forgets_held:
        head, above = state.taken
        if block.height <= head.height or (above is not None and block.height == above.height and block != above):
            return False
    return all(one == block for _, one in state.signed[sequencer] if one.height == block.height)  # R4


def _may_sign(rules: Rules, state: State, who: int, term: int, block: Block) -> bool:
    if block.parent is None or who not in rules.set_after(block.parent):
        return False
    own = [one for _, one in state.signed[who]] if rules.ahead else []
    if block.parent != state.heads[who] and block.parent not in own:
        return False
    if who == term:  # the sequencer signs last: when with its own there is a quorum
        members = rules.set_after(block.parent)
        if len(signers(rules, state, block, members) | {who}) < rules.needed(len(members)):
            return False
    binding = [one for made, one in state.signed[who] if not rules.signs_again or made == term]
    return all(one.height != block.height for one in binding)  # R1


def _held(state: State, who: int) -> Block | None:
    above = [one for _, one in state.signed[who] if one.parent == state.heads[who]]
    return max(above) if above else None


Lie = tuple[Block, Block | None] | None
"""What the Byzantine authority says in its word: a head, and what it holds above; None if it gives none."""


def lies(rules: Rules, state: State) -> list[Lie]:
    """Every word that a Byzantine authority could give."""
    if rules.byzantine < 0:
        return [None]
    blocks = {GENESIS, *(one for _, one in state.proposed)}
    return [None, *((one.parent, one) for one in blocks if one.parent is not None)]


def _taken_over(rules: Rules, state: State) -> Iterator[State]:
    """R5, once for each word that a Byzantine authority could give."""
    for lie in lies(rules, state):
        yield from taken_with(rules, state, lie)


def taken_with(rules: Rules, state: State, lie: Lie) -> Iterator[State]:
    """R5, with this word of the Byzantine authority."""
    if state.words[1] is None and not rules.false(1):
        return
    words = {who: word for who, word in enumerate(state.words) if word is not None and not rules.false(who)}
    if lie is not None:
        words[rules.byzantine] = lie
    members = rules.set_after(GENESIS)
    wanted = tolerated_faults(len(members)) + 1 if rules.few_words else rules.needed(len(members))
    if len(words) < wanted:
        return
    # A head is shown with its quorum's signatures, so nobody can claim one that was not committed.
    shown = [head for who, (head, _) in words.items() if not rules.false(who)]
    head = max(shown, default=GENESIS)
    above = [held for _, held in words.values() if held is not None and held.parent == head]
    chosen = None if rules.forgets_held or not above else max(above, key=lambda one: (above.count(one), one))
    if not rules.false(1) and state.heads[1] not in head.chain():
        return
    after = replace(state, taken=(head, chosen))
    yield after if rules.false(1) else _with(after, 1, heads=head)


def _with(state: State, who: int, **changes: object) -> State:
    made = {}
    for name, value in changes.items():
        values = list(getattr(state, name))
        values[who] = value
        made[name] = tuple(values)
    return replace(state, **made)


# What must hold ---------------------------------------------------------------------------------------------------------


def broken(rules: Rules, state: State) -> str | None:
    """The invariant that this state breaks, or None."""
    done = [one for one in {one for _, one in state.proposed} if committed(rules, state, one)]
    return _forked(rules, state, done) or _parted(rules, state) or _lost(rules, state, done)


def _forked(rules: Rules, state: State, done: list[Block]) -> str | None:
    for one in done:
        assert one.parent is not None
        old = rules.set_after(one.parent)
        if len(signers(rules, state, one, old)) < quorum_of(len(old)):
            return f"height {one.height} was committed without a quorum of the set before it"
        for other in done:
            if one.height == other.height and one != other:
                return f"two blocks were committed at height {one.height}"
    return None


def _parted(rules: Rules, state: State) -> str | None:
    heads = [head for who, head in enumerate(state.heads) if not rules.false(who)]
    for one in heads:
        for other in heads:
            if one not in other.chain() and other not in one.chain():
                return "two honest authorities adopted chains that part"
    return None


def _lost(rules: Rules, state: State, done: list[Block]) -> str | None:
    if state.taken is not None:
        head, above = state.taken
        taken = {*head.chain(), *(() if above is None else above.chain())}
        for one in done:
            others = [block for block in taken if block.height == one.height and block != one]
            if others and any(committed(rules, state, block) for block in others):
                return f"a promotion put another block in place of a committed one at height {one.height}"
    return None


@dataclass(frozen=True)
class Found:
    """How many states there were, and the shortest way to a broken invariant, if there is one."""

    states: int
    broken: str | None
    way: tuple[State, ...] = ()


def search(rules: Rules, *, limit: int = 2_000_000) -> Found:
    """Every reachable state, breadth first."""
    first = start(rules)
    came_from: dict[State, State | None] = {first: None}
    waiting = deque([first])
    while waiting:
        state = waiting.popleft()
        why = broken(rules, state)
        if why is not None:
            return Found(states=len(came_from), broken=why, way=tuple(_way(came_from, state)))
        for after in steps(rules, state):
            if after not in came_from:
                came_from[after] = state
                waiting.append(after)
        if len(came_from) > limit:
            message = f"more than {limit} states: choose smaller bounds"
            raise RuntimeError(message)
    return Found(states=len(came_from), broken=None)


def _way(came_from: dict[State, State | None], state: State | None) -> list[State]:
    found = []
    while state is not None:
        found.append(state)
        state = came_from[state]
    return found[::-1]


GROWN, SHRUNK = (0, 1, 2, 3, 4), (0, 1)
AS_IT_IS = {
    "sequencer Byzantine, promotion": Rules(byzantine=0, heights=1),
    "new sequencer Byzantine, promotion": Rules(byzantine=1, heights=1),
    "cosigner Byzantine, promotion": Rules(byzantine=3, heights=1),
    "sequencer Byzantine, the set grows": Rules(byzantine=0, heights=2, promotes=False, after_x=GROWN),
    "cosigner Byzantine, the set grows": Rules(byzantine=3, heights=2, promotes=False, after_x=GROWN),
    "sequencer Byzantine, the set shrinks": Rules(byzantine=0, heights=2, promotes=False, after_x=SHRUNK),
}
LARGE = {
    "nobody Byzantine, promotion": Rules(byzantine=-1, heights=1),
    "sequencer Byzantine, the set grows, two choices a height": Rules(
        byzantine=0, heights=2, second_names="xy", promotes=False, after_x=GROWN
    ),
    "sequencer Byzantine, the set shrinks, two choices a height": Rules(
        byzantine=0, heights=2, second_names="xy", promotes=False, after_x=SHRUNK
    ),
    "nobody Byzantine, promotion, two heights": Rules(byzantine=-1, heights=2, names="x"),
    "cosigner Byzantine, promotion, two heights": Rules(byzantine=3, heights=2, names="x"),
}
MUTATIONS = {
    "a quorum of f+1": Rules(byzantine=0, heights=1, quorum=2),
    "one signature a height and term, what was held is forgotten": Rules(
        byzantine=0, heights=1, signs_again=True, forgets_held=True
    ),
    "one signature a height and term, few words": Rules(byzantine=0, heights=1, signs_again=True, few_words=True),
    "blocks are signed on top of what is not committed": Rules(
        byzantine=0, heights=2, promotes=False, after_x=SHRUNK, ahead=True
    ),
    "the new set signs its own change": Rules(byzantine=0, heights=1, promotes=False, after_x=SHRUNK, new_set_signs=True),
}


def main() -> int:
    """Search everything; 0 if the rules hold and every mutation is caught."""
    wrong = 0
    for name, rules in (*AS_IT_IS.items(), *LARGE.items(), *MUTATIONS.items()):
        found = search(rules)
        wrong += (found.broken is None) == (name in MUTATIONS)
        print(f"{found.states:>8} states  {name}: {found.broken or 'holds'}")  # noqa: T201 - a program that says what it found
    return wrong


if __name__ == "__main__":
    sys.exit(main())
