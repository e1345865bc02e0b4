"""`moor refs`: reference values of files, from packages or a golden host, carried through updates.

moor refs from-packages *.deb --set base --release 12.8 --until 2027-06-01 -o base.json
moor refs from-packages openssl_3.deb --changed --onto base.json --release 12.8+1 --overlap-days 14 -o base-2.json
moor refs from-boot --event-log LOG --set boot --serial 1 --until 2027-06-01 -o boot.bin      # what a golden host booted
moor evidence sign-references base-2.json --key K --out base-2.cose      # for `moor evidence appraise --refs`
moor refs values base-2.json -o values.bin                               # for `moor verifier sign-reference-values`
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from moorline.cli import render
from moorline.clock import Instant, SystemClock
from moorline.errors import Misconfigured

if TYPE_CHECKING:
    from moorline.evidence.debian import DebianPackage
    from moorline.policy.reference_sets import ReferenceSet

app = typer.Typer(no_args_is_help=True)

_DAY_S: Final = 86400
_BANKS: Final = {"sha1": 0x04, "sha256": 0x0B, "sha384": 0x0C, "sha512": 0x0D}
_MAX_DEB: Final = 1 << 30
_BOOT_LOG: Final = Path("/sys/kernel/security/tpm0/binary_bios_measurements")

Output = Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where to write it; never over a file.")]
SetName = Annotated[str | None, typer.Option("--set", metavar="NAME", help="Name of a new set.")]
ReleaseName = Annotated[str, typer.Option("--release", metavar="NAME", help="Name of this release, such as 12.8.")]
Onto = Annotated[Path | None, typer.Option("--onto", metavar="FILE", help="The set that this release follows.")]
From = Annotated[
    str | None, typer.Option("--from", metavar="WHEN", help="Beginning of the release (RFC 3339); default now.")
]
Until = Annotated[str, typer.Option("--until", metavar="WHEN", help="End of the release, a date or RFC 3339.")]
Overlap = Annotated[int, typer.Option(min=0, max=366, help="Days in which the release before it counts too.")]
Hash = Annotated[str, typer.Option("--hash", metavar="HASH", help="What IMA measures with: sha256, sha384, sha512, sha1.")]


@app.callback()
def refs() -> None:
    """Make reference values of files, and carry them through updates."""


@app.command("from-packages")
def from_packages(  # noqa: PLR0913 - each is an option of its own
    debs: Annotated[list[Path] | None, typer.Argument(metavar="DEB...", help="Debian packages, or folders of them.")] = None,
    *,
    release_name: ReleaseName,
    until: Until,
    output: Output,
    set_name: SetName = None,
    onto: Onto = None,
    changed: Annotated[bool, typer.Option("--changed", help="Only what was updated is given; the rest stays.")] = False,
    since: From = None,
    overlap_days: Overlap = 14,
    algorithm: Hash = "sha256",
    executable_only: Annotated[bool, typer.Option("--executable-only", help="Leave out what is not executed.")] = False,
    installed: Annotated[bool, typer.Option("--installed", help="Every package of this machine, brought by apt.")] = False,
    inrelease: Annotated[Path | None, typer.Option(metavar="FILE", help="InRelease of the archive, to verify.")] = None,
    keyring: Annotated[Path | None, typer.Option(metavar="FILE", help="Keyring that InRelease is signed under.")] = None,
    packages: Annotated[Path | None, typer.Option(metavar="FILE", help="Packages (unpacked) that InRelease names.")] = None,
    as_json: render.AsJson = False,
) -> None:
    """Hash what Debian packages install, without installing it. With an index, a package that is not in it is refused."""
    from moorline.policy import file_releases

    listed = _index(inrelease, keyring, packages)
    read = list(_packages(debs or [], algorithm, installed=installed))
    if listed is not None:
        from moorline.evidence import debian_index

        for one in read:
            debian_index.verify_package(one.identity, one.sha256, listed)
    files = file_releases.files_of_packages(read, executable_only=executable_only)
    made = _next(onto, set_name, release_name, files, since, until, overlap_days, changed=changed)
    _written(made, output, as_json=as_json, packages=len(read), verified=listed is not None)


@app.command("from-host")
def from_host(  # noqa: PLR0913 - each is an option of its own
    *,
    release_name: ReleaseName,
    until: Until,
    output: Output,
    set_name: SetName = None,
    onto: Onto = None,
    changed: Annotated[bool, typer.Option("--changed", help="Only what was updated is given; the rest stays.")] = False,
    since: From = None,
    overlap_days: Overlap = 14,
    algorithm: Hash = "sha256",
    ima: Annotated[Path | None, typer.Option(metavar="FILE", help="The golden host's IMA list: what it ran.")] = None,
    root: Annotated[Path, typer.Option(metavar="DIR", help="Where the golden host's file system begins.")] = Path("/"),
    below: Annotated[
        list[str] | None, typer.Option(metavar="PATH", help="Hash every file below it, such as /usr; repeat.")
    ] = None,
    as_json: render.AsJson = False,
) -> None:
    """Take what a golden host ran (its IMA list), or what lies on it, as what is accepted. It is believed as it is."""
    from moorline.policy import file_releases

    if (ima is None) is (not below):
        raise Misconfigured(
            "refs.source", "say what of the golden host counts", expected="either --ima FILE or --below PATH"
        )
    if ima is not None:
        from moorline.evidence.ima import parse_ima

        files = file_releases.files_of_list(parse_ima(render.read(ima)))
    else:
        from moorline.attesters import debian

        _bank(algorithm)
        with render.progress("hashing the files of the host"):
            files = {path: (digest,) for path, digest in debian.host_files(root.resolve(), tuple(below or ()), algorithm)}
    made = _next(onto, set_name, release_name, files, since, until, overlap_days, changed=changed)
    _written(made, output, as_json=as_json, packages=0, verified=False)


@app.command("from-boot")
def from_boot(
    *,
    set_name: Annotated[str, typer.Option("--set", metavar="NAME", help="Name of the set.")],
    serial: Annotated[int, typer.Option(min=1, help="Rises with each set of this name.")],
    until: Until,
    output: Output,
    event_log: Annotated[
        Path, typer.Option(metavar="FILE", help="The golden host's boot log; default this machine's, which takes root.")
    ] = _BOOT_LOG,
    since: From = None,
    algorithm: Hash = "sha256",
    as_json: render.AsJson = False,
) -> None:
    """Take what a golden host booted (its boot log) as what is accepted. It is believed as it is."""
    from moorline.evidence.eventlog import parse_event_log
    from moorline.policy import reference_values
    from moorline.verification.eventlog import Component, replay, verify_boot
    from moorline.wire import schema

    bank = _bank(algorithm)
    parsed = parse_event_log(render.read(event_log))
    replayed = replay(parsed, bank)
    state = verify_boot(parsed, bank=bank, quoted=replayed, pcrs=sorted(replayed))
    made = reference_values.values_of(
        state,
        name=set_name,
        serial=serial,
        not_before=SystemClock().now() if since is None else _instant(since),
        not_after=_instant(until),
        files={},
    )
    render.new_file(output, schema.encode(made))
    booted = {f"{component}": str(len(state.of(component))) for component in Component}
    then = [f"moor verifier sign-reference-values {output} --key KEY -o {output}.cose"]
    shown = {"secure_boot": str(state.secure_boot), "options": state.command_line or "known by its digest only"}
    render.files([output], as_json=as_json, then=then, **booted, **shown)


@app.command()
def values(
    file: Annotated[Path, typer.Argument(help="A set that from-packages or from-host wrote.")],
    *,
    output: Output,
    at: Annotated[str | None, typer.Option(metavar="WHEN", help="What is in force at this time; default now.")] = None,
    algorithm: Hash = "sha256",
    as_json: render.AsJson = False,
) -> None:
    """Write what is in force as the set that an attestation authority reads; then sign it, and give it beside the boot's."""
    from moorline.policy import file_releases
    from moorline.wire import schema

    moment = SystemClock().now() if at is None else _instant(at)
    made = file_releases.in_force(_set(file), at=moment, bank=_bank(algorithm))
    render.new_file(output, schema.encode(made))
    then = [f"moor verifier sign-reference-values {output} --key KEY -o {output}.cose"]
    render.files([output], as_json=as_json, then=then, files=str(len(made.files)), serial=str(made.serial))


def _packages(debs: list[Path], algorithm: str, *, installed: bool) -> Iterator[DebianPackage]:
    from moorline.attesters import debian
    from moorline.evidence.debian import parse_deb

    if bool(debs) is installed:
        raise Misconfigured("refs.source", "say which packages count", expected="either DEB... or --installed")
    _bank(algorithm)
    if installed:
        rows = debian.installed()
        for number, (name, version, architecture) in enumerate(rows, start=1):
            with render.progress(f"{number} of {len(rows)}: {name}"):
                yield parse_deb(debian.downloaded(name, version, architecture), algorithm=algorithm, unzstd=debian.unzstd)
        return
    for path in _spread(debs):
        if path.is_file() and path.stat().st_size > _MAX_DEB:
            raise Misconfigured("refs.too_large", "the package is too large to be one", got=path)
        with render.progress(str(path)):
            yield parse_deb(render.read(path), algorithm=algorithm, unzstd=debian.unzstd)


def _spread(paths: Iterable[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            yield from sorted(path.glob("*.deb"))
        else:
            yield path


def _index(inrelease: Path | None, keyring: Path | None, packages: Path | None) -> dict[str, bytes] | None:
    given = [inrelease, keyring, packages]
    if given.count(None) == len(given):
        return None
    if inrelease is None or keyring is None or packages is None:
        raise Misconfigured(
            "refs.index", "an index counts with its signature and keyring", expected="--inrelease, --keyring and --packages"
        )
    from moorline.attesters import debian
    from moorline.evidence import debian_index

    release = debian.verified_release(render.read(inrelease), keyring)
    index = render.read(packages)
    debian_index.verify_packages(index, debian_index.digests_of_release(release))
    return debian_index.digests_of_packages(index)


def _next(
    onto: Path | None,
    name: str | None,
    release: str,
    files: dict[str, tuple[bytes, ...]],
    since: str | None,
    until: str,
    overlap_days: int,
    *,
    changed: bool,
) -> ReferenceSet:
    from moorline.policy import file_releases

    if (onto is None) is (name is None):
        raise Misconfigured("refs.set", "a release begins a set or follows one", expected="either --set NAME or --onto FILE")
    if changed and onto is None:
        raise Misconfigured("refs.set", "--changed is about a set that is there", expected="--onto FILE")
    at = SystemClock().now() if since is None else _instant(since)
    if name is not None:
        return file_releases.first(name, release, files, at=at, until=_instant(until))
    assert onto is not None
    return file_releases.updated(
        _set(onto),
        release,
        files,
        at=at,
        until=_instant(until),
        overlap_s=overlap_days * _DAY_S,
        changed=changed,
    )


def _set(path: Path) -> ReferenceSet:
    from moorline.policy import reference_text

    return reference_text.parse_reference_set(render.read(path))


def _written(made: ReferenceSet, output: Path, *, as_json: bool, packages: int, verified: bool) -> None:
    from moorline.policy import file_releases

    document = json.dumps(file_releases.as_document(made), indent=1).encode()
    render.new_file(output, document)
    then = [f"moor evidence sign-references {output} --key KEY --out {output}.cose", f"moor refs values {output} -o VALUES"]
    render.files(
        [output],
        as_json=as_json,
        then=then,
        set=made.name,
        serial=str(made.serial),
        files=str(len(made.releases[-1].files)),
        packages=str(packages),
        index="verified" if verified else "none given: who made the packages was not verified",
    )


def _bank(algorithm: str) -> int:
    if algorithm not in _BANKS:
        raise Misconfigured("refs.hash", "no such hash of IMA", expected=", ".join(_BANKS), got=algorithm)
    return _BANKS[algorithm]


def _instant(text: str) -> Instant:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise Misconfigured("refs.time", "a time is a date or RFC 3339 with its zone", got=text) from None
    if moment.tzinfo is None:
        if len(text) > 10:
            raise Misconfigured("refs.time", "a time is a date or RFC 3339 with its zone", got=text)
        moment = moment.replace(tzinfo=UTC)
    return Instant(int(moment.timestamp()))
