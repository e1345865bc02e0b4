"""What services count and measure, for /metrics: read from stores and state at the moment somebody asks, kept nowhere else.

docs/reference/metrics.md is made from the calls of `measured` here and of `Counter` and `Gauge` in services.http; names and
words are literals for that. Whoever reaches a port may read its metrics: they are counts, no label is a name of a host,
device or function, and a broker's are on its admin socket alone.
"""

from __future__ import annotations

import time
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from fastapi import FastAPI
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

Values = Mapping[tuple[str, ...], float]


class _Measured(Collector):
    """One gauge, read when asked."""

    def __init__(self, name: str, says: str, labels: tuple[str, ...], read: Callable[[], Values]) -> None:
        self._name, self._says, self._labels, self._read = name, says, labels, read

    def describe(self) -> Iterable[Metric]:
        return [GaugeMetricFamily(self._name, self._says, labels=self._labels)]

    def collect(self) -> Iterator[Metric]:
        family = GaugeMetricFamily(self._name, self._says, labels=self._labels)
        for values, number in self._read().items():
            family.add_metric(list(values), number)
        yield family


def measured(app: FastAPI, name: str, says: str, read: Callable[[], Values], *, labels: tuple[str, ...] = ()) -> None:
    """A gauge of an application that `read` gives the values of: one for each combination of labels, () for none."""
    app.state.metrics.register(_Measured(name, says, labels, read))


def of_authority(app: FastAPI, node: Any) -> None:  # noqa: ANN401 - ledger.engines.node.Node, and its bad twins in tests
    """An authority: how far its ledger is, and how old its head."""
    measured(app, "moorline_ledger_height", "Height of the newest block", lambda: {(): node.head.state.height})
    measured(
        app,
        "moorline_ledger_head_age_seconds",
        "Seconds since the newest block was made",
        lambda: {(): max(0.0, time.time() - node.head.state.time_ms / 1000)},
    )
    measured(app, "moorline_ledger_records", "Records in the ledger's state", lambda: {(): len(node.head.state.records)})


def of_broker(app: FastAPI, broker: Any) -> None:  # noqa: ANN401 - services.broker.Broker, which imports the routes
    """A broker: launches, key pools, alarms, peers, and the epoch of its launch keys."""
    store = broker.store
    measured(
        app,
        "moorline_broker_launches",
        "Launches among the latest 1000, by state",
        lambda: _tally(row.state for row in store.launches()),
        labels=("state",),
    )
    measured(
        app,
        "moorline_broker_pool_keys",
        "Key pairs ready for launches, by service and channel profile",
        store.pools,
        labels=("service", "profile"),
    )
    measured(app, "moorline_broker_alarms", "Alarms among the latest 1000", lambda: {(): len(store.alarms())})
    measured(app, "moorline_broker_peers", "HSMs of other providers whose trust is kept", lambda: {(): len(store.peers())})

    def epoch() -> Values:
        newest = store.newest_epoch()
        return {} if newest is None else {(): newest.epoch}

    measured(
        app,
        "moorline_broker_verdict_effect_seconds",
        "From the last lost verdict to the last session closed: since the verifier's event, and since it was read here",
        lambda: {(since,): seconds for since, seconds in broker.effects.items()},
        labels=("since",),
    )
    _of_keys(app, broker)
    measured(app, "moorline_broker_epoch", "The running epoch of launch keys", epoch)
    measured(
        app,
        "moorline_broker_log_judged",
        "1 if the log was compared with its anchor on the ledger, which launching needs",
        lambda: {(): float(broker.judged.is_set())},
    )


def _of_keys(app: FastAPI, broker: Any) -> None:  # noqa: ANN401 - as above
    def due() -> Values:
        from moorline.hsm.calendar import due_at

        found = {row.role: due_at(row, broker.settings.rotation) for row in broker.hsm.key_rows() if row.state == "active"}
        return {(role,): float(at - broker.clock.now()) for role, at in found.items() if at is not None}

    measured(
        app,
        "moorline_broker_key_due_seconds",
        "Seconds until the active key of a role is due by calendar; negative: overdue",
        due,
        labels=("role",),
    )
    measured(
        app,
        "moorline_broker_keys",
        "Keys of the HSM that are kept account of, by role and state",
        lambda: {names: float(n) for names, n in Tally((row.role, row.state) for row in broker.hsm.key_rows()).items()},
        labels=("role", "state"),
    )


def why_broker_not_ready(broker: Any) -> str | None:  # noqa: ANN401 - as above
    """What keeps a broker from launching. It enrols, renews and answers all the same."""
    return None if broker.judged.is_set() else "the log has not been compared with its anchor on the ledger yet"


def of_verifier(app: FastAPI, overview: Callable[[], list[dict[str, object]]]) -> None:
    """An attestation authority: hosts by their last result."""

    def hosts() -> Values:
        return _tally(str(row["code"] or row["status"] or "none") for row in overview())

    measured(
        app, "moorline_verifier_hosts", "Enrolled hosts, by status or code of the last result", hosts, labels=("result",)
    )


def of_orchestrator(app: FastAPI, store: Any) -> None:  # noqa: ANN401 - storage.orchestrator_store.OrchestratorStore
    """An orchestrator: functions by state, packages."""
    measured(
        app,
        "moorline_orchestrator_functions",
        "Functions, by state",
        lambda: _tally(row.state.value for row in store.functions()),
        labels=("state",),
    )
    measured(app, "moorline_orchestrator_packages", "Onboarded packages", lambda: {(): len(store.packages())})


def of_host(app: FastAPI, condition: Any) -> None:  # noqa: ANN401 - services.condition.Condition
    """A host's agent: what it heard of itself."""
    measured(
        app,
        "moorline_host_standing",
        "1 while the last verdict about this host affirms it",
        lambda: {(): float(condition.standing)},
    )
    measured(
        app,
        "moorline_host_verdict_age_seconds",
        "Seconds since the last verdict about this host",
        lambda: {} if condition.changed == 0 else {(): time.time() - condition.changed},
    )


def of_launcher(app: FastAPI, condition: Any) -> None:  # noqa: ANN401 - services.condition.Condition
    """A launcher: whether the broker admitted the enclave."""
    measured(
        app,
        "moorline_launcher_admitted",
        "1 while the enclave runs and the broker has admitted it",
        lambda: {(): float(condition.standing)},
    )


def _tally(names: Iterable[str]) -> Values:
    return {(name,): float(count) for name, count in Tally(names).items()}
