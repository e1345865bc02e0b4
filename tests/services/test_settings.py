"""A settings file says everything once; what it says too much, too little or wrongly is named."""

from dataclasses import dataclass
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
        ("name =", "settings.not_toml", None),
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
