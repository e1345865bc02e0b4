"""Can a host stand where its tag says? Round trips to landmarks refute it; nothing here ever proves it.

A landmark is a machine of known position and key. It sends a nonce, the host signs it, and the landmark signs the shortest
round trip it saw. Nothing travels faster than light, and no way is shorter than the straight line, through the ground if
need be. So the host is no further from the landmark than half the round trip allows, and a tag whose place is further away
is refuted.

1. A measurement is signed by the landmark it names, about this host and the key that answered, and fresh.
2. The claimed place is as far away as the straight line between two points on the smallest sphere that the earth contains
   (polar radius): a bound from below of the true distance. What the tag itself calls its uncertainty is taken off.
3. Light in vacuum, not in glass: a signal by radio or in hollow fibre must not refute an honest host.
4. One landmark that refutes is enough. Without a single measurement that holds, nothing is said: `not_measured`.

What it does not establish: that the host is there. A slow answer is always possible, so a host that went far away from every
landmark is not found; and whoever holds the answering key near a landmark answers for a host that is elsewhere.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Final

from moorline.clock import Instant
from moorline.digest import same
from moorline.errors import Malformed, NotAuthentic, Refused
from moorline.wire import cose, keys, schema
from moorline.wire.schema import Bytes32, Size

PURPOSE: Final = "distance-measurement"
LIGHT_M_PER_US: Final = 299.792458
POLAR_RADIUS_M: Final = 6_356_752.0
_PLACE: Final = re.compile(r"([+-]?[0-9]{1,2}(?:\.[0-9]{1,6})?),([+-]?[0-9]{1,3}(?:\.[0-9]{1,6})?)(?:~([0-9]{1,5})km)?")

Name = Annotated[str, Size(at_most=128)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A point in degrees (north and east positive), and how far from it the machine may stand, in metres."""

    latitude: float
    longitude: float
    within_m: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What a landmark signs. `round_trip_ns` is the shortest of `tries`; `answering` digests the host's echo key."""

    landmark: Name
    host: Name
    answering: Bytes32
    round_trip_ns: int
    tries: int
    at: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Landmark:
    """A landmark as the verifier knows it: where it stands, and its key. Never taken from a measurement."""

    place: Place
    key: keys.PublicKey


class Standing(StrEnum):
    """What round trips say about a claim. `compatible` is no proof."""

    REFUTED = "refuted"
    COMPATIBLE = "compatible"
    NOT_MEASURED = "not_measured"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """One landmark's word: the host is at most `at_most_m` from it, the claimed place at least `claimed_m`."""

    landmark: str
    at_most_m: float
    claimed_m: float

    @property
    def refutes(self) -> bool:
        """Whether the claimed place is out of reach."""
        return self.claimed_m > self.at_most_m


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """All bounds that hold, and what follows."""

    standing: Standing
    bounds: tuple[Bound, ...]


def parse_place(text: str) -> Place:
    """`52.5200,13.4050` or `52.52,13.40~20km`. Raises only Malformed("distance.place")."""
    match = _PLACE.fullmatch(text)
    if match is None or abs(float(match[1])) > 90 or abs(float(match[2])) > 180:
        raise Malformed("distance.place", "not a place", expected="latitude,longitude[~Nkm] in degrees", got=text)
    return Place(latitude=float(match[1]), longitude=float(match[2]), within_m=float(match[3] or 0) * 1000)


def at_least_m(one: Place, other: Place) -> float:
    """A bound from below of the straight distance between two places, in metres, less what both are uncertain by."""
    first, second = _unit(one), _unit(other)
    chord = POLAR_RADIUS_M * math.dist(first, second)
    return max(0.0, chord - one.within_m - other.within_m)


def at_most_m(round_trip_ns: int) -> float:
    """How far light gets and back in this time, in metres."""
    return round_trip_ns / 1000 * LIGHT_M_PER_US / 2


def sign(made: Measurement, signer: keys.Signer) -> bytes:
    """The measurement as the landmark hands it out."""
    return cose.sign(PURPOSE, schema.encode(made), signer)


def parse_verified(
    data: bytes, landmarks: Mapping[str, Landmark], *, host: str, answering: bytes, now: Instant, max_age_s: int
) -> Measurement:
    """A measurement that counts; `data` is untrusted. Raises Malformed, NotAuthentic and Refused (`distance.*`)."""
    signed = cose.parse(PURPOSE, data)
    found = next((name for name, one in landmarks.items() if cose.key_id(one.key) == signed.key_id), None)
    if found is None:
        raise NotAuthentic("distance.landmark_unknown", "signed by no landmark that is known here", got=signed.key_id)
    made = schema.decode(Measurement, cose.verify(signed, landmarks[found].key))
    if made.landmark != found:
        raise NotAuthentic(
            "distance.other_landmark", "a landmark signs in another's name", expected=found, got=made.landmark
        )
    if made.host != host or not same(made.answering, answering):
        raise Refused("distance.other_host", "the measurement is about another host or key", expected=host, got=made.host)
    if not now - max_age_s <= made.at <= now + 5 or made.round_trip_ns <= 0 or made.tries < 1:
        raise Refused("distance.stale", "the measurement is not fresh", expected=f"<= {max_age_s} s old", got=now - made.at,
                      remedy="have the landmark measure again")  # fmt: skip
    return made


def judge(claimed: Place, measured: Iterable[Measurement], landmarks: Mapping[str, Landmark]) -> Judgement:
    """What verified measurements say about a claimed place. Of several by one landmark the shortest counts."""
    shortest: dict[str, int] = {}
    for one in measured:
        shortest[one.landmark] = min(one.round_trip_ns, shortest.get(one.landmark, one.round_trip_ns))
    bounds = tuple(
        Bound(landmark=name, at_most_m=at_most_m(took), claimed_m=at_least_m(claimed, landmarks[name].place))
        for name, took in sorted(shortest.items())
    )
    if not bounds:
        return Judgement(standing=Standing.NOT_MEASURED, bounds=())
    refuted = any(bound.refutes for bound in bounds)
    return Judgement(standing=Standing.REFUTED if refuted else Standing.COMPATIBLE, bounds=bounds)


def _unit(place: Place) -> tuple[float, float, float]:
    north, east = math.radians(place.latitude), math.radians(place.longitude)
    return math.cos(north) * math.cos(east), math.cos(north) * math.sin(east), math.sin(north)
