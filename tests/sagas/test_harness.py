"""The harness finds sagas that double, lose or hang; and passes one that does not."""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from moorline.errors import Refused, Unavailable
from moorline.storage.steps import reached

sys.path.insert(0, str(Path(__file__).parent))
from harness import Mischief, exercise


class Bank:
    """The outside: money arrives there. Orders with a name are carried out once."""

    def __init__(self):
        self.orders = []

    async def pay(self, name=None):
        if name is None or name not in self.orders:
            self.orders.append(name)


@dataclass
class Payment:
    """Intent before effect, an effect that may be repeated, and the record after it."""

    bank: Bank = field(default_factory=Bank)
    durable: dict = field(default_factory=dict)
    named: bool = True
    intends: bool = True
    forgets: bool = False

    async def start(self, outside):
        bank = outside.guard(self.bank, "pay")
        if self.durable.get("paid") is not None or (self.forgets and "intended" in self.durable):
            return
        if self.intends:
            self.durable["intended"] = True
            reached("test.payment.intended")
        while True:
            try:
                await bank.pay("rent" if self.named else None)
                self.durable["paid"] = True
            except Unavailable:
                continue
            except Refused:
                self.durable["paid"] = False
            reached("test.payment.made")
            return

    async def resume(self, outside):
        if self.durable:  # what never was intended, nobody resumes
            await self.start(outside)

    def observe(self):
        return len(self.bank.orders), self.durable

    def judge(self, observed, spoilt):
        orders, durable = observed
        refused = spoilt is not None and spoilt.how is Mischief.REFUSED
        assert durable == {"intended": True, "paid": not refused}
        assert orders == (0 if refused else 1)


async def test_a_good_saga_passes(monkeypatch):
    done = await exercise(Payment, monkeypatch)
    assert done.calls == ("pay",)
    assert done.steps == ("test.payment.intended", "test.payment.made")
    assert {one.how for one in done.spoilt} == set(Mischief)


@pytest.mark.parametrize("fault", ["named", "intends", "forgets"])
async def test_a_bad_one_does_not(monkeypatch, fault):
    """Paid twice when the answer is lost; lost when nothing was intended; left undone after a crash."""
    faults = {"named": {"named": False}, "intends": {"intends": False}, "forgets": {"forgets": True}}
    with pytest.raises(AssertionError):
        await exercise(lambda: Payment(**faults[fault]), monkeypatch)
