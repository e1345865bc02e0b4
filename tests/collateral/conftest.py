"""Vendors under false roots: an Intel and an AMD that sign, and a local server that is slow, wrong, limited or absent."""

import base64
import importlib.util
import json
import sys
import threading
import time
from dataclasses import dataclass, field
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl, quote, urlsplit

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding

from moorline.clock import Instant, to_datetime
from moorline.evidence.sgx_quote import serialize_sgx_quote
from moorline.evidence.tdx_quote import serialize_tdx_quote
from moorline.rats import EvidenceRoot
from moorline.simulators.manufacturer import create_manufacturer, open_chip
from moorline.verification import collateral_judging as forms
from moorline.verification.anchors import parse_anchor_file
from moorline.verification.collateral import ItemKind, ItemName
from moorline.verification.collateral_judging import Anchors
from moorline.verification.tpm_revocation import item_subject


def _intel_fixtures():
    path = Path(__file__).parents[1] / "intel" / "conftest.py"
    spec = importlib.util.spec_from_file_location("false_intel", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sys.path.insert(0, str(Path(__file__).parents[1] / "hosts"))
from tpm_maker import TpmMaker  # noqa: E402 - the folder is known only now

INTEL = _intel_fixtures()
NOW, DAY = INTEL.NOW, INTEL.DAY


# ---------------------------------------------------------------- vendors


class Intel:
    """Intel's service under a false root, over `FakeIntel`: items by name, and answers as they travel."""

    def __init__(self, keys):
        self.fakes = {tee: INTEL.FakeIntel(keys, tee) for tee in ("sgx", "tdx")}
        self.standard, self.early, self.numbers = 17, 19, (19, 18, 17)
        self.levels = {}
        self.issued = NOW - DAY
        self.qe_status = {}

    @property
    def any(self):
        return self.fakes["sgx"]

    @property
    def anchors(self):
        return self.any.anchors

    @property
    def fmspc(self):
        return self.any.fmspc.hex()

    def number(self, track):
        return {"standard": self.standard, "early": self.early}.get(track) or int(track)

    def tcb_info(self, tee, track="standard"):
        fake = self.fakes[tee]
        fake.issued = self.issued
        number = self.number(track)
        changes = {"tcbEvaluationDataNumber": number}
        if (tee, number) in self.levels:
            changes["tcbLevels"] = self.levels[tee, number]
        return self.answer("tcbInfo", json.dumps({**json.loads(fake.tcb_info_body()), **changes}).encode())

    def identity(self, tee, track="standard"):
        fake = self.fakes[tee]
        fake.issued = self.issued
        changes = {"tcbEvaluationDataNumber": self.number(track)}
        return self.answer("enclaveIdentity", json.dumps({**json.loads(fake.qe_identity_body()), **changes}).encode())

    def evaluations(self, tee):
        stamp = INTEL.stamp
        body = {
            "id": tee.upper(),
            "version": 1,
            "issueDate": stamp(self.issued),
            "nextUpdate": stamp(NOW + DAY),
            "tcbEvalNumbers": [
                {
                    "tcbEvaluationDataNumber": number,
                    "tcbRecoveryEventDate": stamp(NOW - (20 - number) * 30 * DAY),
                    "tcbDate": stamp(NOW - (20 - number) * 30 * DAY),
                }
                for number in self.numbers
            ],
        }
        return self.answer("tcbEvaluationDataNumbers", json.dumps(body).encode())

    def answer(self, member, body):
        signed = self.any.signed(body)
        return b'{"' + member.encode() + b'":' + body + b',"signature":"' + signed.signature.hex().encode() + b'"}'

    @property
    def signer_chain(self):
        return self.any.chain("signer").decode()

    @property
    def ca_chain(self):
        return (self.any.certificate("ca") + self.any.certificate("root")).decode()

    def item(self, name):
        """The item `name`, as it is kept."""
        tee = name.subject.partition("/")[0]
        if name.kind is ItemKind.INTEL_TCB_INFO:
            return forms.packed(forms.TCB_INFO, self.tcb_info(tee, name.track).decode(), self.signer_chain)
        if name.kind is ItemKind.INTEL_ENCLAVE_IDENTITY:
            return forms.packed(forms.ENCLAVE_IDENTITY, self.identity(tee, name.track).decode(), self.signer_chain)
        if name.kind is ItemKind.INTEL_EVALUATIONS:
            return forms.packed(forms.EVALUATIONS, self.evaluations(tee).decode(), self.signer_chain)
        if name.kind is ItemKind.INTEL_PCK_CRL:
            return forms.packed_crl(self.any.crl("ca"), self.ca_chain)
        return self.any.crl("root")

    def quote(self, tee):
        made = self.fakes[tee].quote()
        return serialize_sgx_quote(made) if tee == "sgx" else serialize_tdx_quote(made)

    def root_certificate(self):
        return self.any.certificate("root")


class Amd:
    """AMD's KDS under a simulated manufacturer's root."""

    def __init__(self, maker, chip):
        self.maker, self.chip = maker, chip
        self.crl_from, self.crl_until, self.crl_number, self.revoked = NOW - DAY, NOW + DAY, 5, ()

    @property
    def anchors(self):
        return parse_anchor_file(self.maker.anchors_path.read_bytes())

    @property
    def vcek_name(self):
        subject = f"Milan/{self.chip.chip_id.hex()}/{self.chip.tcb.raw():016x}"
        return ItemName(kind=ItemKind.SNP_VCEK, subject=subject)

    def chain(self):
        return b"".join(
            x509.load_der_x509_certificate(der).public_bytes(serialization.Encoding.PEM)
            for der in (self.maker.ask, self.maker.ark)
        )

    def crl(self, key=None):
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(x509.load_der_x509_certificate(self.maker.ark).subject)
            .last_update(to_datetime(self.crl_from))
            .next_update(to_datetime(self.crl_until))
            .add_extension(x509.CRLNumber(self.crl_number), critical=False)
        )
        for serial in self.revoked:
            entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(to_datetime(NOW)).build()
            builder = builder.add_revoked_certificate(entry)
        pss = padding.PSS(mgf=padding.MGF1(hashes.SHA384()), salt_length=48)
        signed = builder.sign(key or self.maker.ark_key, hashes.SHA384(), rsa_padding=pss)
        return signed.public_bytes(serialization.Encoding.DER)

    def item(self, name):
        if name.kind is ItemKind.SNP_VCEK:
            return self.chip.vcek
        return self.chain() if name.kind is ItemKind.SNP_CHAIN else self.crl()


class Tpm:
    """The revocation lists of a maker of TPMs; `revoked` are certificates of its authority."""

    def __init__(self, maker):
        self.maker, self.revoked, self.number, self.start, self.end = maker, (), 5, -1, 1

    @property
    def anchors(self):
        return self.maker.anchors

    def name(self, issuer):
        return ItemName(kind=ItemKind.TPM_CRL, subject=item_subject(getattr(self.maker, issuer)))

    def item(self, name, **options):
        issuer = next(one for one in ("root", "ca") if self.name(one) == name)
        chain = "".join(
            getattr(self.maker, one).public_bytes(serialization.Encoding.PEM).decode()
            for one in (("root",) if issuer == "root" else ("ca", "root"))
        )
        made = {"start": self.start, "end": self.end, "number": self.number} | options
        revoked = self.revoked if issuer == "ca" else ()
        return forms.packed_crl(self.maker.crl(issuer, *revoked, **made), chain)


class World:
    """All vendors, the names of all their items, and the anchors that trust them."""

    def __init__(self, intel, amd, tpm):
        self.intel, self.amd, self.tpm = intel, amd, tpm
        self.now = NOW

    @property
    def anchors(self):
        return Anchors(snp=self.amd.anchors, intel=self.intel.anchors, tpm=self.tpm.anchors)

    def names(self):
        return [*self.asked(), self.tpm.name("ca"), self.tpm.name("root")]

    def asked(self):
        """The items that a vendor's service has."""
        subject = self.intel.fmspc
        texts = [
            "intel-root-crl/root",
            "intel-pck-crl/platform",
            *(f"intel-tcb-info/{tee}/{subject}/{track}" for tee in ("sgx", "tdx") for track in ("standard", "early", "18")),
            *(f"intel-enclave-identity/{tee}/{track}" for tee in ("sgx", "tdx") for track in ("standard", "early", "18")),
            "intel-evaluations/sgx",
            "intel-evaluations/tdx",
            "snp-chain/Milan/vcek",
            "snp-crl/Milan/vcek",
        ]
        return [*(ItemName.parse(text) for text in texts), self.amd.vcek_name]

    def item(self, name):
        vendors = {"snp": self.amd, "tpm": self.tpm, "intel": self.intel}
        return vendors[name.kind.value.partition("-")[0]].item(name)

    def name(self, text):
        return ItemName.parse(text.replace("FMSPC", self.intel.fmspc))

    @property
    def root_crl(self):
        return self.intel.any.crl("root")


@pytest.fixture(scope="session")
def intel_keys():
    return {name: INTEL.new_key() for name in ("root", "other root", "ca", "pck", "signer", "attestation", "stranger")}


@pytest.fixture(scope="session")
def maker(tmp_path_factory):
    return create_manufacturer(tmp_path_factory.mktemp("maker"), now=NOW)


@pytest.fixture(scope="session")
def chip(maker):
    return open_chip(maker.make_chip("m0", now=NOW))


@pytest.fixture(scope="session")
def tpm_maker():
    return TpmMaker(NOW, EvidenceRoot.TEST)


@pytest.fixture
def world(intel_keys, maker, chip, tpm_maker):
    return World(Intel(intel_keys), Amd(maker, chip), Tpm(tpm_maker))


# ---------------------------------------------------------------- a server


@dataclass
class Reply:
    """One answer. `drip_s`: one byte at a time with this pause; `cut`: closes in the middle; `hang`: never answers."""

    status: int = 200
    body: bytes = b""
    headers: dict = field(default_factory=dict)
    drip_s: float = 0.0
    cut: bool = False
    hang: bool = False


class Vendor:
    """A local server. `replies[path]` is a reply or a list of them used up one by one, the last one staying."""

    def __init__(self, context=None):
        self.replies, self.requests, self.hosts, self.stopping = {}, [], [], threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                outer.requests.append(self.path)
                outer.hosts.append(self.headers["host"])
                outer.answer(self)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        if context is not None:
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.scheme = "http" if context is None else "https"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    @property
    def url(self):
        return f"{self.scheme}://127.0.0.1:{self.server.server_port}"

    def stop(self):
        self.stopping.set()
        self.server.shutdown()
        self.server.server_close()

    def answer(self, handler):
        reply = self.chosen(handler.path)
        if reply.hang:
            self.stopping.wait(30)
            handler.close_connection = True
            return
        handler.send_response(reply.status)
        for name, value in reply.headers.items():
            handler.send_header(name, value)
        if "Content-Length" not in reply.headers:
            handler.send_header("Content-Length", str(len(reply.body)))
        handler.end_headers()
        handler.close_connection = reply.cut
        body = reply.body[: len(reply.body) // 2] if reply.cut else reply.body
        try:
            if not reply.drip_s:
                handler.wfile.write(body)
                return
            for byte in body:
                handler.wfile.write(bytes([byte]))
                handler.wfile.flush()
                if self.stopping.wait(reply.drip_s):
                    return
        except OSError:
            return

    def chosen(self, path):
        found = self.replies.get(path) or self.replies.get(path.partition("?")[0]) or Reply(status=404)
        if isinstance(found, list):
            return found.pop(0) if len(found) > 1 else found[0]
        return found(path) if callable(found) else found


@pytest.fixture
def vendor():
    server = Vendor()
    yield server
    server.stop()


@pytest.fixture
def served(world, vendor):
    """The local server as both vendors, answering from `world` as it is when asked."""
    chain = {"sgx": quote(world.intel.signer_chain), "tdx": quote(world.intel.signer_chain)}

    def track(path):
        asked = dict(parse_qsl(urlsplit(path).query))
        return asked.get("tcbEvaluationDataNumber") or asked.get("update", "standard")

    for tee in ("sgx", "tdx"):
        base = f"/{tee}/certification/v4"

        def tcb(path, tee=tee):
            if dict(parse_qsl(urlsplit(path).query)).get("fmspc") != world.intel.fmspc:
                return Reply(status=404, headers={"Request-ID": "r"})
            return Reply(body=world.intel.tcb_info(tee, track(path)), headers={"TCB-Info-Issuer-Chain": chain[tee]})

        def identity(path, tee=tee):
            headers = {"SGX-Enclave-Identity-Issuer-Chain": chain[tee]}
            return Reply(body=world.intel.identity(tee, track(path)), headers=headers)

        def evaluations(_, tee=tee):
            headers = {"TCB-Evaluation-Data-Numbers-Issuer-Chain": chain[tee]}
            return Reply(body=world.intel.evaluations(tee), headers=headers)

        vendor.replies[f"{base}/tcb"] = tcb
        vendor.replies[f"{base}/qe/identity"] = identity
        vendor.replies[f"{base}/tcbevaluationdatanumbers"] = evaluations

    def pck_crl(_):
        return Reply(body=world.intel.any.crl("ca"), headers={"SGX-PCK-CRL-Issuer-Chain": quote(world.intel.ca_chain)})

    vendor.replies["/sgx/certification/v4/pckcrl"] = pck_crl
    vendor.replies["/IntelSGXRootCA.der"] = lambda _: Reply(body=world.root_crl)
    vendor.replies["/vcek/v1/Milan/cert_chain"] = lambda _: Reply(body=world.amd.chain())
    vendor.replies["/vcek/v1/Milan/crl"] = lambda _: Reply(body=world.amd.crl())
    vendor.replies[f"/vcek/v1/Milan/{world.amd.chip.chip_id.hex()}"] = lambda _: Reply(body=world.amd.chip.vcek)
    return vendor


@pytest.fixture(scope="session")
def tools():
    """What tests need of this file: it is no module they could import."""

    class Tools:
        pass

    tools = Tools()
    tools.NOW, tools.DAY, tools.INTEL = NOW, DAY, INTEL
    tools.Reply, tools.Vendor = Reply, Vendor
    tools.base64, tools.time, tools.timedelta, tools.Instant = base64, time, timedelta, Instant
    return tools
