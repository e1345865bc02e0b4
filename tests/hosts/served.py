"""Verifiers over real TLS within a test: each with its own trust domain, policy and keys, all under one root or another."""

import asyncio
import contextlib
import dataclasses
import sys

from test_service import PKI, by_chain_alone, trust

from moorline.clock import SystemClock
from moorline.nfv import Role, SpiffeId
from moorline.services import (
    http,
    verifier_anchors,
    verifier_asking,
    verifier_results,
    verifier_routes,
)
from moorline.services.attestation_authority import AttestationAuthority
from moorline.services.verifier_asking import Asking
from moorline.wire.certificates import dns_name
from moorline.wire.http import HttpClient


class Served:
    """One verifier, `spiffe://<domain>/verifier/v1`, over the database and by the policy of a World."""

    def __init__(self, world, domain="alpha.test", *, pki=PKI, may_ask=(), answer_s=30):
        self.world, self.domain, self.pki = world, domain, pki
        self.uri = f"spiffe://{domain}/verifier/v1"
        self.name = dns_name(SpiffeId.parse(self.uri))
        parts = dataclasses.replace(world.authority()._parts, verifier=self.uri, audience=domain, clock=SystemClock())
        self.authority = AttestationAuthority(parts)
        anchors = verifier_anchors.Anchors(tpm=(), snp=(), simulated_allowed=trust().simulated_allowed)
        self.app = verifier_routes.application(
            self.authority,
            anchors,
            trust_domain=domain,
            clock=parts.clock,
            guard=by_chain_alone,
            may_ask=frozenset(map(SpiffeId.parse, may_ask)),
        )
        terms = verifier_asking.Terms(answer_s=answer_s, pull_every_s=None)
        self.asking = Asking(parts.store, terms, parts.clock)
        verifier_results.add_asking(self.app, self.authority, self.asking, trust_domain=domain, clock=parts.clock)

    @contextlib.asynccontextmanager
    async def serving(self):
        bound = asyncio.get_running_loop().create_future()
        shown = self.pki.identity(self.uri)
        identity = http.TlsIdentity(chain_pem=shown.certificate_chain_pem, key_pem=shown.private_key_pem)
        task = asyncio.create_task(
            http.serve(
                self.app,
                listen="127.0.0.1:0",
                identity=identity,
                client_roots_pem=self.pki.roots_pem,
                ready=bound.set_result,
            )
        )
        looking = asyncio.create_task(self.asking.keep(lambda _: True))
        self.address = await bound
        try:
            yield self
        finally:
            for one in (task, looking):
                one.cancel()
            await asyncio.gather(task, looking, return_exceptions=True)

    async def moor(self, directory, *words):
        """`moor ...` as operator ann of this verifier's domain, asking it: exit code, output, errors."""
        identity = self.pki.identity(f"spiffe://{self.domain}/operator/ann")
        (directory / "ann.pem").write_bytes(identity.certificate_chain_pem)
        (directory / "ann.key").write_bytes(identity.private_key_pem)
        (directory / "r.pem").write_bytes(self.pki.roots_pem)
        named = 'roots = "r.pem"\ncertificate_chain = "ann.pem"\nprivate_key = "ann.key"\n'
        (directory / "operator.toml").write_text(named, "utf-8")
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "moorline.cli", *words),
            *("--at", f"https://{self.address}|{self.name}", "--as", str(directory / "operator.toml")),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await child.communicate()
        return child.returncode, out.decode(), err.decode()

    def client(self, uri=None, *, timeout_s=20.0):
        """A client of this verifier that believes nobody else; with `uri`, as somebody."""
        return HttpClient(
            f"https://{self.address}",
            server_name=self.name,
            server_role=Role.VERIFIER,
            roots_pem=self.pki.roots_pem,
            identity=None if uri is None else self.pki.identity(uri),
            timeout_s=timeout_s,
        )
