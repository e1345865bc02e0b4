"""Tenants' logs, held by the broker's own log: changed, cut or put back behind its back, they raise an alarm."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import sqlalchemy as sa

from moorline.audit.log import entry_digest
from moorline.clock import Instant
from moorline.services.broker_tenant_logs import TenantLogs, entered
from moorline.storage.broker_store import BrokerStore
from moorline.storage.hsm_store import HsmStore, TenantRow

NOW = Instant(1_800_000_000)


@pytest.fixture
def broker(tmp_path):
    """What TenantLogs needs of a broker: both stores on one database, and a clock."""
    url = f"sqlite:///{tmp_path / 'broker.db'}"
    made = SimpleNamespace(
        store=BrokerStore.open(url),
        hsm=HsmStore.open(url),
        clock=SimpleNamespace(now=lambda: NOW),
        engine=sa.create_engine(url),
    )
    for name in ("clinic", "lab"):
        row = TenantRow(
            name=name, token=name, state="active", uid=1, weight=1, keys=1, operations=1, created=NOW, changed=NOW
        )
        made.hsm.add_tenant(row)
    yield made
    made.store.close()
    made.hsm.close()
    made.engine.dispose()


def write(broker, tenant: str, count: int) -> None:
    for number in range(count):
        broker.hsm.log(tenant, at=NOW, event="ecdsa", body={"key": f"{tenant}-{number}"})


def changed(broker, statement: str) -> None:
    """Whoever can write the database does."""
    with broker.engine.begin() as c:
        c.execute(sa.text(statement))


def test_a_log_that_grew_is_entered_and_one_that_did_not_is_not(broker):
    """verifies that: each tenant's size and head come into the anchored log when they changed, and only then."""
    logs = TenantLogs(broker)
    assert logs.turn() == ()
    assert entered(broker.store) == {}
    write(broker, "clinic", 3)
    assert logs.turn() == ()
    held = entered(broker.store)
    assert set(held) == {"clinic"}
    assert (held["clinic"].size, held["clinic"].head) == (3, entry_digest(broker.hsm.tenant_log("clinic")[-1]))
    before = len(broker.store.audit())
    assert logs.turn() == ()
    assert len(broker.store.audit()) == before
    write(broker, "clinic", 1)
    write(broker, "lab", 1)
    assert TenantLogs(broker).turn() == ()  # another process, after a restart
    assert {name: one.size for name, one in entered(broker.store).items()} == {"clinic": 4, "lab": 1}


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM hsm_tenant_log WHERE tenant = 'clinic' AND number = 2",
        "DELETE FROM hsm_tenant_log WHERE tenant = 'clinic'",
        "UPDATE hsm_tenant_log SET data = (SELECT data FROM hsm_tenant_log WHERE tenant = 'lab') WHERE tenant = 'clinic'",
    ],
    ids=["cut", "emptied", "changed"],
)
@pytest.mark.parametrize("restarted", [False, True])
def test_a_log_behind_what_was_entered_raises_an_alarm(broker, statement, restarted):
    """verifies that: cut, emptied or changed, also while the broker was down, is told once; the other tenant goes on."""
    write(broker, "clinic", 3)
    write(broker, "lab", 3)
    logs = TenantLogs(broker)
    logs.turn()
    changed(broker, statement)
    write(broker, "lab", 1)
    logs = TenantLogs(broker) if restarted else logs
    assert logs.turn() == ("clinic",)
    assert logs.turn() == ("clinic",)
    alarms = [(one.code, one.first) for one in broker.store.alarms()]
    assert alarms == [("tenant.log_rewritten", "clinic")]
    assert entered(broker.store)["lab"].size == 4
    assert entered(broker.store)["clinic"].size == 3


def test_an_entry_rewritten_with_all_that_follow_is_noticed(broker):
    """verifies that: a log made anew from an earlier entry on, chained as it should be, has another head."""
    write(broker, "clinic", 3)
    logs = TenantLogs(broker)
    logs.turn()
    changed(broker, "DELETE FROM hsm_tenant_log WHERE tenant = 'clinic'")
    for number in range(5):
        broker.hsm.log("clinic", at=NOW, event="ecdsa", body={"key": f"other-{number}"})
    assert logs.turn() == ("clinic",)
