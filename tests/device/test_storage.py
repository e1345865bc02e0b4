"""Sealed storage against a host that reads, changes, swaps, removes and puts back."""

import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moorline.errors import Malformed, MoorlineError, NotAuthentic, Refused
from moorline.workload_agent.storage import MAX_RECORD_BYTES, SealedStorage

KEY = b"k" * 32


@pytest.fixture
def storage(tmp_path):
    return SealedStorage(tmp_path / "s", KEY)


def files(storage):
    return sorted(path for path in storage._directory.iterdir() if path.name != "index")


def test_records_are_kept_replaced_listed_and_forgotten(storage, tmp_path):
    storage.put("a", b"one")
    storage.put("a", b"two")
    storage.put("b", b"")
    again = SealedStorage(tmp_path / "s", KEY)
    for one in (storage, again):
        assert one.names() == ("a", "b")
        assert (one.get("a"), one.get("b")) == (b"two", b"")
    assert len(files(storage)) == 2
    again.delete("a")
    assert again.names() == ("b",)
    with pytest.raises(Refused) as caught:
        again.get("a")
    assert caught.value.code == "workload.storage_record_unknown"


def test_the_host_sees_neither_names_nor_data(storage, tmp_path):
    storage.put("patient-4711", b"personal data")
    everything = b"".join(path.read_bytes() + path.name.encode() for path in (tmp_path / "s").iterdir())
    assert b"patient" not in everything
    assert b"personal" not in everything


def test_another_key_opens_nothing(storage, tmp_path):
    storage.put("a", b"one")
    with pytest.raises(NotAuthentic):
        SealedStorage(tmp_path / "s", b"x" * 32)


def attack_flip(storage, _tmp):
    path = files(storage)[0]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def attack_truncate(storage, _tmp):
    files(storage)[0].write_bytes(b"")


def attack_remove(storage, _tmp):
    files(storage)[0].unlink()


def attack_swap(storage, _tmp):
    one, two = files(storage)
    data = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(data)


@pytest.mark.parametrize("attack", [attack_flip, attack_truncate, attack_remove, attack_swap])
def test_a_changed_record_is_noticed(storage, tmp_path, attack):
    storage.put("a", b"one")
    storage.put("b", b"two")
    attack(storage, tmp_path)
    codes = set()
    for name in ("a", "b"):
        try:
            storage.get(name)
        except MoorlineError as error:
            codes.add(error.code)
    assert codes == {"workload.storage_not_authentic"}


def test_a_directory_put_back_within_a_run_is_noticed(storage, tmp_path):
    storage.put("a", b"old")
    shutil.copytree(tmp_path / "s", tmp_path / "kept")
    storage.put("a", b"new")
    shutil.rmtree(tmp_path / "s")
    shutil.copytree(tmp_path / "kept", tmp_path / "s")
    with pytest.raises(NotAuthentic):
        storage.get("a")


def test_records_without_their_index_are_refused(storage, tmp_path):
    storage.put("a", b"one")
    (tmp_path / "s" / "index").unlink()
    with pytest.raises(NotAuthentic):
        SealedStorage(tmp_path / "s", KEY)


def test_bounds(storage):
    with pytest.raises(Refused):
        storage.put("a", bytes(MAX_RECORD_BYTES + 1))
    for name in ("", "x" * 257):
        with pytest.raises(Malformed):
            storage.put(name, b"")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=200))
def test_any_bytes_for_an_index_are_refused(tmp_path, data):
    directory = tmp_path / "t"
    directory.mkdir(exist_ok=True)
    (directory / "index").write_bytes(data)
    with pytest.raises(NotAuthentic):
        SealedStorage(directory, KEY)
