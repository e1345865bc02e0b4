"""/healthz says live, ready and why not; /metrics says what is when it is asked; a socket says both without a network."""

from types import SimpleNamespace

import httpx
import pytest

from moorline.services import http, metrics
from moorline.services.condition import Condition, told


async def text_of(app, path="/metrics"):
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as client:
        return (await client.get(path)).text


async def test_a_gauge_is_read_when_it_is_asked_for():
    app, now = http.application("x"), {("a",): 1.0}
    metrics.measured(app, "moorline_test", "For a test", lambda: dict(now), labels=("state",))
    assert 'moorline_test{state="a"} 1.0' in await text_of(app)
    now[("b",)] = 2.0
    assert 'moorline_test{state="b"} 2.0' in await text_of(app)


async def test_readiness_is_a_metric_too():
    assert "moorline_ready 1.0" in await text_of(http.application("x"))
    assert "moorline_ready 0.0" in await text_of(http.application("x", ready=lambda: "not yet"))


async def test_an_authority_says_its_height_and_how_old_its_head_is():
    state = SimpleNamespace(height=7, time_ms=0, records={"a": b"", "b": b""})
    app = http.application("x")
    metrics.of_authority(app, SimpleNamespace(head=SimpleNamespace(state=state)))
    said = await text_of(app)
    assert "moorline_ledger_height 7.0" in said
    assert "moorline_ledger_records 2.0" in said
    assert "moorline_ledger_head_age_seconds" in said


async def test_a_verifier_counts_its_hosts_by_result():
    app = http.application("x")
    rows = [{"status": "affirming", "code": None}, {"status": "affirming", "code": None}, {"status": None, "code": "tpm.x"}]
    metrics.of_verifier(app, lambda: rows)
    said = await text_of(app)
    assert 'moorline_verifier_hosts{result="affirming"} 2.0' in said
    assert 'moorline_verifier_hosts{result="tpm.x"} 1.0' in said


@pytest.mark.parametrize(("standing", "status", "gauge"), [(True, 200, 1.0), (False, 503, 0.0)])
async def test_a_unix_socket_tells_how_a_service_is(tmp_path, standing, status, gauge):
    socket, condition = tmp_path / "status.sock", Condition()
    condition.set(standing=standing, why="the verdict is contraindicated")
    async with told(socket, "host", condition, metrics.of_host):
        transport = httpx.AsyncHTTPTransport(uds=str(socket))
        async with httpx.AsyncClient(transport=transport, base_url="http://host") as client:
            health = await client.get("/healthz")
            said = (await client.get("/metrics")).text
    assert health.status_code == status
    assert health.json() == {
        "live": True,
        "ready": standing,
        "why_not": None if standing else "the verdict is contraindicated",
    }
    assert f"moorline_host_standing {gauge}" in said
    assert socket.stat().st_mode & 0o077 == 0


async def test_a_socket_that_cannot_be_made_is_an_error_of_the_service(tmp_path):
    with pytest.raises(OSError, match="AF_UNIX path too long"):
        async with told(tmp_path / ("x" * 120), "host", Condition(), metrics.of_host):
            pass


async def test_without_a_socket_nothing_is_told():
    async with told(None, "host", Condition(), metrics.of_host):
        pass
