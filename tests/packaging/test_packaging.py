"""What `pip install moorline` brings: wheels only, three dependencies, and a library that needs no more than these."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PURE = ("evidence", "verification", "policy", "audit", "wire")
LEDGER = ("records", "transactions", "genesis", "state", "blocks", "tree", "checkpoint", "proof", "light_client", "standing")
EXTRAS = ("pkcs11", "tpm2_pytss", "fastapi", "uvicorn", "httpx", "OpenSSL", "sqlalchemy", "alembic", "cedarpy", "structlog")
NEED_MORE = {
    "moorline.verification.chains": "OpenSSL enforces the name constraints",
    "moorline.wire.http": "the HTTP client",
}
IMPORT_WITHOUT_EXTRAS = f"""
import importlib, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {EXTRAS!r}:
            raise ModuleNotFoundError(name=name)
sys.meta_path.insert(0, Absent())
for module in sys.argv[1:]:
    importlib.import_module(module)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)], cwd=ROOT, check=True)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_the_base_depends_on_cryptography_cbor2_and_a_small_command_line_only():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert sorted(one.split(">")[0] for one in project["dependencies"]) == ["cbor2", "cryptography", "typer"]


def test_the_wheel_is_pure_and_holds_data_examples_and_types(wheel):
    names = wheel.namelist()
    assert not [name for name in names if name.endswith((".so", ".c"))]
    for wanted in (
        "moorline/py.typed",
        "moorline/policy/sec009/catalogue.json",
        "moorline/examples/records/function.py",
        "moorline/services/defaults/verifier-production.toml",
    ):
        assert wanted in names


def pure_modules():
    for room in PURE:
        for path in sorted((ROOT / "src" / "moorline" / room).rglob("*.py")):
            name = ".".join(("moorline", *path.relative_to(ROOT / "src" / "moorline").with_suffix("").parts))
            yield name.removesuffix(".__init__")


def test_the_pure_rooms_import_with_nothing_but_the_base():
    wanted = [name for name in pure_modules() if name not in NEED_MORE]
    wanted += [f"moorline.ledger.{name}" for name in LEDGER]
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_WITHOUT_EXTRAS, *wanted], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_command_that_needs_an_extra_says_which_and_how_to_get_it():
    code = IMPORT_WITHOUT_EXTRAS + "\nfrom moorline.cli import run\nsys.exit(run(['demo']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pip install 'moorline[all]'" in done.stderr
