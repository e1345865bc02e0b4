"""`moor host locate`: refute a location by round trips to landmarks. It never proves one.

Landmarks are named in a TOML file of the verifier's:

    [landmark.berlin]
    place = "52.5200,13.4050"
    key = "berlin.pem"            # public key; paths are relative to this file
"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from moorline.cli import render
from moorline.clock import SystemClock
from moorline.errors import EXIT_REFUSED, EXIT_UNDECIDED, EXIT_YES, Misconfigured

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey


app = typer.Typer(no_args_is_help=True)

_DAY_S: Final = 86400
Output = Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where to write it; never over a file.")]
HostName = Annotated[str, typer.Option("--host", metavar="NAME", help="The host's id.")]
EchoKey = Annotated[Path, typer.Option("--echo-key", metavar="FILE", help="The host's echo key (public, PEM, Ed25519).")]


@app.callback()
def locate() -> None:
    """Refute a location by round trips to landmarks; it never proves one."""


@app.command()
def answer(
    key: Annotated[Path, typer.Option(metavar="FILE", help="The host's echo key (private, PEM, Ed25519).")],
    listen: Annotated[str, typer.Option(metavar="ADDRESS:PORT", help="Where to answer (UDP).")] = "0.0.0.0:0",
) -> None:
    """On the host: answer landmarks until stopped."""
    from moorline.host_agent import echo

    host, port = _address(listen)
    private = _private_echo(key)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as listening:
        listening.bind((host, port))
        bound = listening.getsockname()
        typer.echo(f"answering on {bound[0]}:{bound[1]}; next: moor host locate measure, on each landmark")
        try:
            echo.answer(listening, private, until=lambda: False)
        except KeyboardInterrupt:
            raise typer.Exit(EXIT_YES) from None


@app.command()
def measure(
    to: Annotated[str, typer.Argument(metavar="ADDRESS:PORT", help="Where the host answers.")],
    *,
    host: HostName,
    echo_key: EchoKey,
    landmark: Annotated[str, typer.Option(help="This landmark's name.")],
    key: Annotated[Path, typer.Option(metavar="FILE", help="This landmark's private key (PEM).")],
    output: Output,
    tries: Annotated[int, typer.Option(min=1, max=1000, help="Round trips; the shortest counts.")] = 20,
    as_json: render.AsJson = False,
) -> None:
    """On a landmark: time the host, and sign the shortest round trip."""
    from moorline.cli.evidence_cases import tokens
    from moorline.host_agent import echo
    from moorline.policy import distance
    from moorline.services import verifier_landmarks

    public = verifier_landmarks.public_echo_key(echo_key)
    with render.progress(f"asking {to} {tries} times"):
        took = echo.round_trip_ns(_address(to), public, tries=tries)
    made = distance.Measurement(
        landmark=landmark,
        host=host,
        answering=echo.echo_key_digest(public),
        round_trip_ns=took,
        tries=tries,
        at=SystemClock().now(),
    )
    render.new_file(output, distance.sign(made, tokens.any_signer(render.read(key))))
    kilometres = f"{distance.at_most_m(took) / 1000:.1f}"
    then = ["moor host locate judge MEASUREMENT... --place PLACE --landmarks FILE"]
    render.files([output], as_json=as_json, then=then, round_trip_us=f"{took / 1000:.1f}", at_most_km=kilometres)


@app.command()
def judge(
    measurements: Annotated[list[Path], typer.Argument(help="What landmarks measured.")],
    *,
    host: HostName,
    echo_key: EchoKey,
    place: Annotated[str, typer.Option(metavar="LAT,LON[~Nkm]", help="Where the host's tag says it stands.")],
    landmarks: Annotated[Path, typer.Option(metavar="FILE", help="The landmarks that are trusted (TOML).")],
    max_age: Annotated[int, typer.Option(min=1, metavar="SECONDS", help="How old a measurement may be.")] = _DAY_S,
    as_json: render.AsJson = False,
) -> None:
    """On the verifier: exit 1 if the place is refuted, 0 if it is compatible with what was measured, 2 if nothing was."""
    from moorline.host_agent import echo
    from moorline.policy import distance
    from moorline.services import verifier_landmarks

    known, now = verifier_landmarks.landmarks(landmarks), SystemClock().now()
    answering = echo.echo_key_digest(verifier_landmarks.public_echo_key(echo_key))
    claimed = distance.parse_place(place)
    read = [
        distance.parse_verified(render.read(path), known, host=host, answering=answering, now=now, max_age_s=max_age)
        for path in measurements
    ]
    found = distance.judge(claimed, read, known)
    rows = [
        {
            "landmark": one.landmark,
            "host_at_most_km": round(one.at_most_m / 1000, 1),
            "place_at_least_km": round(one.claimed_m / 1000, 1),
            "refutes": one.refutes,
        }
        for one in found.bounds
    ]
    if as_json:
        render.facts({"standing": found.standing.value, "bounds": rows}, as_json=True)
    else:
        columns = ("landmark", "host_at_most_km", "place_at_least_km", "refutes")
        render.table(rows, columns, key="bounds", as_json=False, empty="nothing was measured")
        typer.echo(f"{found.standing.value}: {_WORDS[found.standing.value]}")
    codes = {distance.Standing.REFUTED: EXIT_REFUSED, distance.Standing.COMPATIBLE: EXIT_YES}
    raise typer.Exit(codes.get(found.standing, EXIT_UNDECIDED))


_WORDS: Final = {
    "refuted": "the host answered faster than light could from there; it has moved, or its tag is false",
    "compatible": "no landmark refutes it; that is no proof",
    "not_measured": "no measurement holds",
}


def _private_echo(path: Path) -> Ed25519PrivateKey:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ed25519

    try:
        key = serialization.load_pem_private_key(render.read(path), None)
    except (ValueError, TypeError):
        raise Misconfigured("distance.key", "a key cannot be read", expected="PEM, a private key", got=path) from None
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise Misconfigured("distance.key", "an echo key is Ed25519", got=path)
    return key


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not port.isascii() or int(port) > 65535:
        raise Misconfigured("distance.address", "not an address", expected="ADDRESS:PORT", got=text)
    return host, int(port)
