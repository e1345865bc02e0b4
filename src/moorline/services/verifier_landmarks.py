"""What landmarks measured, as a verifier takes it: a folder into which they, or whoever fetches from them, put files.

For host h1 the folder holds `h1.pem`, the public echo key the host was given, and any number of `h1.*.cose`, measurements
that landmarks signed (docs/spec/distance-measurement.md). Landmarks, with place and key, are in a file of their own, which
`moor host locate judge` reads too. The folder is read every LOOK_EVERY_S; a file that does not hold counts for nothing and
is logged: who can write there refutes nothing without a landmark's key. Who can delete there hides what landmarks said.
"""

from __future__ import annotations

import asyncio
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import structlog
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519

from moorline.clock import Clock, Instant
from moorline.errors import Misconfigured, MoorlineError
from moorline.host_agent.echo import echo_key_digest
from moorline.policy import distance
from moorline.policy.distance import Judgement, Landmark, Measurement, Place
from moorline.wire import keys

LOOK_EVERY_S: Final = 5.0
MAX_AGE_S: Final = 24 * 3600
_MAX_BYTES: Final = 4096
_LOG: Final = structlog.stdlib.get_logger("verifier")


class Measurements:
    """The measurements in a folder, and what they say."""

    def __init__(self, folder: Path, landmarks: Mapping[str, Landmark], clock: Clock) -> None:
        self._folder, self._landmarks, self._clock = folder, landmarks, clock
        self._held: dict[str, tuple[Measurement, ...]] = {}

    def judge(self, host: str, claimed: Place) -> Judgement:
        """What the measurements of a host that are fresh now say about a place."""
        oldest = self._clock.now() - MAX_AGE_S
        return distance.judge(claimed, (one for one in self._held.get(host, ()) if one.at >= oldest), self._landmarks)

    def look(self) -> None:
        """Read the folder. Raises Misconfigured("distance.folder") if it cannot be read."""
        now, found = self._clock.now(), {}
        try:
            echo_keys = sorted(self._folder.glob("*.pem"))
        except OSError as error:
            raise Misconfigured("distance.folder", "the folder cannot be read", got=error) from None
        for file in echo_keys:
            found[file.stem] = tuple(self._of(file, now))
        self._held = found

    async def keep(self) -> None:
        """Look until cancelled."""
        while True:
            try:
                await asyncio.to_thread(self.look)
            except MoorlineError as error:
                _LOG.warning("measurements", **error.as_problem())
            await asyncio.sleep(LOOK_EVERY_S)

    def _of(self, echo_key: Path, now: Instant) -> list[Measurement]:
        host, found = echo_key.stem, []
        for file in sorted(self._folder.glob(f"{host}.*.cose")):
            try:
                answering = echo_key_digest(public_echo_key(echo_key))
                with file.open("rb") as opened:
                    data = opened.read(_MAX_BYTES)
                made = distance.parse_verified(
                    data, self._landmarks, host=host, answering=answering, now=now, max_age_s=MAX_AGE_S
                )
            except (MoorlineError, OSError) as error:
                _LOG.warning("measurement refused", file=file.name, why=str(error))
            else:
                found.append(made)
        return found


def landmarks(path: Path) -> dict[str, Landmark]:
    """The landmarks of a file: `[landmark.NAME]` with `place` and `key`. Raises Misconfigured("distance.landmarks")."""
    try:
        named = tomllib.loads(path.read_text("utf-8")).get("landmark")
    except (OSError, ValueError) as error:
        raise Misconfigured("distance.landmarks", "the landmarks cannot be read", got=f"{path}: {error}") from None
    if not isinstance(named, dict) or not named or not all(isinstance(one, dict) for one in named.values()):
        raise Misconfigured("distance.landmarks", "no landmarks are named", expected="[landmark.NAME]", got=path)
    found = {}
    for name, one in named.items():
        if set(one) != {"place", "key"}:
            raise Misconfigured("distance.landmarks", "a landmark has place and key", got=name)
        found[name] = Landmark(place=distance.parse_place(str(one["place"])), key=public_key(path.parent / str(one["key"])))
    return found


def public_echo_key(path: Path) -> ed25519.Ed25519PublicKey:
    """The public echo key in a PEM file. Raises Misconfigured("distance.key")."""
    key = public_key(path)
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise Misconfigured("distance.key", "an echo key is Ed25519", got=path)
    return key


def public_key(path: Path) -> keys.PublicKey:
    """A public key in a PEM file. Raises Misconfigured("distance.key")."""
    try:
        key = serialization.load_pem_public_key(path.read_bytes())
    except (OSError, ValueError):
        raise Misconfigured("distance.key", "a key cannot be read", expected="PEM, a public key", got=path) from None
    return keys.parse_public(key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo))
