"""A settings file says everything once; what it says too much, too little or wrongly is named."""

from dataclasses import dataclass, fields
from pathlib import Path

import pytest

from moorline.errors import Misconfigured
from moorline.services import settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    url: str
    weight: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    name: str
    state: Path
    peers: tuple[Peer, ...] = ()
    timeout_s: float = 1.0
    token: Path | None = None


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "x.toml"
    path.write_text(text)
    return path


def test_a_full_file_is_read_with_paths_relative_to_it(tmp_path):
    path = written(tmp_path, 'name = "a"\nstate = "db"\ntimeout_s = 2\n[[peers]]\nurl = "u"\n')
    assert settings.load(Settings, path) == Settings(name="a", state=tmp_path / "db", peers=(Peer(url="u"),), timeout_s=2.0)


@pytest.mark.parametrize(
    ("text", "code", "remedy"),
    [
        ('name = "a"\nstate = "s"\ntimeout = 2', "settings.unknown_key", "did you mean timeout_s?"),
        ('name = "a"', "settings.missing_key", "add state = ..."),
        ('name = 1\nstate = "s"', "settings.wrong_type", None),
        ('name = "a"\nstate = "s"\n[[peers]]\nur = "x"', "settings.unknown_key", "did you mean url?"),
        ("name =", "settings.not_toml", "correct it there; moor init writes one with comments"),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path, text, code, remedy):
    with pytest.raises(Misconfigured) as refusal:
        settings.load(Settings, written(tmp_path, text))
    assert (refusal.value.code, refusal.value.remedy) == (code, remedy)


def test_no_file_is_said(tmp_path):
    with pytest.raises(Misconfigured, match="settings.no_file"):
        settings.load(Settings, tmp_path / "none.toml")


def test_what_is_written_is_what_is_read(tmp_path):
    path = tmp_path / "w.toml"
    original = Settings(
        name='quo"te\\',
        state=tmp_path / "db",
        peers=(Peer(url="a", weight=2), Peer(url="b")),
        timeout_s=2.5,
        token=tmp_path / "t",
    )
    settings.write(original, path)
    assert settings.load(Settings, path) == original
    assert path.stat().st_mode & 0o777 == 0o600


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    period_s: float = 10.0
    """Seconds between rounds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    name: str
    """What it is called, which can be said at a length that no line of a settings file should have, and so it is folded."""
    state: Path
    """Where it keeps things."""
    ports: tuple[int, ...] = (1, 2)
    """Where it listens."""
    table: Table | None = None
    """How often."""


def loaded(path, **environment):
    return settings.load(Service, path, service="thing", environment=environment)


def test_the_environment_takes_the_place_of_keys(tmp_path):
    path = written(tmp_path, 'name = "a"\nstate = "s"')
    environment = {
        "MOOR_THING_NAME": "b",
        "MOOR_THING_STATE": "elsewhere",
        "MOOR_THING_PORTS": "[3]",
        "MOOR_THING_TABLE_PERIOD_S": "2",
        "MOOR_OTHER_NAME": "not ours",
        "MOOR_THINGS": "neither",
    }
    assert loaded(path, **environment) == Service(
        name="b", state=tmp_path / "elsewhere", ports=(3,), table=Table(period_s=2.0)
    )


def test_a_key_can_come_from_the_environment_alone(tmp_path):
    assert loaded(written(tmp_path, 'name = "a"'), MOOR_THING_STATE="s").state == tmp_path / "s"


def test_without_a_service_the_environment_says_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("MOOR_THING_NAME", "b")
    path = written(tmp_path, 'name = "a"\nstate = "s"')
    assert settings.load(Service, path).name == "a"
    assert settings.load(Service, path, service="thing").name == "b"


@pytest.mark.parametrize(
    ("environment", "code", "remedy"),
    [
        ({"MOOR_THING_PORT": "[3]"}, "settings.unknown_variable", "did you mean MOOR_THING_PORTS?"),
        ({"MOOR_THING_PORTS": "three"}, "settings.variable_not_toml", None),
        ({"MOOR_THING_PORTS": "[3]\nname = 'x'"}, "settings.variable_not_toml", None),
        ({"MOOR_THING_PORTS": "3"}, "settings.wrong_type", None),
    ],
)
def test_a_wrong_variable_is_refused_by_name(tmp_path, environment, code, remedy):
    with pytest.raises(Misconfigured) as refusal:
        loaded(written(tmp_path, 'name = "a"\nstate = "s"'), **environment)
    assert (refusal.value.code, refusal.value.remedy) == (code, remedy)


def test_a_file_for_people_has_every_key_under_its_comment_and_reads_back(tmp_path):
    path = tmp_path / "new" / "thing.toml"
    original = Service(name="a", state=tmp_path / "new" / "state", table=Table(period_s=3.0))
    settings.write_commented(original, path, head="A thing.")
    text = path.read_text()
    assert text.startswith("# A thing.\n\n# What it is called")
    assert 'state = "state"' in text
    assert "# ports = [1, 2]" in text
    assert "# How often.\n[table]\n# Seconds between rounds.\nperiod_s = 3.0" in text
    assert max(map(len, text.splitlines())) <= 102
    assert path.stat().st_mode & 0o777 == 0o600
    assert settings.load(Service, path) == original


def test_a_file_that_is_there_is_never_overwritten(tmp_path):
    path = written(tmp_path, "precious = true")
    with pytest.raises(Misconfigured, match="settings.exists"):
        settings.write_commented(Service(name="a", state=tmp_path), path, head="A thing.")
    assert path.read_text() == "precious = true"


def settings_of_services():
    from moorline.cli.acting import ProviderSettings
    from moorline.cli.vnf import OperatorSettings
    from moorline.services import (
        authority,
        broker_settings,
        host,
        launcher_parent,
        orchestrator,
        silicon,
        verifier_settings,
    )

    return [
        ProviderSettings,
        OperatorSettings,
        authority.Settings,
        broker_settings.BrokerSettings,
        host.HostSettings,
        host.AttestationSettings,
        launcher_parent.LauncherSettings,
        orchestrator.OrchestratorSettings,
        silicon.SiliconSettings,
        verifier_settings.VerifierSettings,
    ]


@pytest.mark.parametrize("kind", settings_of_services(), ids=lambda kind: kind.__name__)
def test_every_key_of_every_service_says_what_it_is_for(kind):
    said = settings.descriptions(kind)
    assert [field.name for field in fields(kind) if field.name not in said] == []
