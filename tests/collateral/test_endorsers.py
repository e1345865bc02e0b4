"""The vendors' clients against a local server: recorded and generated answers, slow, wrong, limited and absent."""

import asyncio
import base64
import json
import ssl
from datetime import timedelta
from email.utils import format_datetime
from urllib.parse import quote

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from moorline.clock import Instant, to_datetime
from moorline.endorsers.amd_kds import AmdKds
from moorline.endorsers.amd_kds import request_of as amd_request
from moorline.endorsers.collecting import collect, settled
from moorline.endorsers.intel_pcs import IntelPcs
from moorline.endorsers.intel_pcs import request_of as intel_request
from moorline.endorsers.pacing import Pacing, retry_after
from moorline.endorsers.port import Endorsers
from moorline.endorsers.transport import Limits, Surroundings, VendorHttp
from moorline.errors import Malformed, Misconfigured, NotAuthentic, Unavailable
from moorline.storage.collateral_directory import DirectoryStore
from moorline.verification.collateral import ItemName
from moorline.verification.collateral_judging import Held, judge

NOW = Instant(1_800_000_000)
PATIENT = Pacing(interval_s=0.0, attempts=4, base_s=2.0, cap_s=60.0, longest_wait_s=120.0)


class Clock:
    """Time that moves only when somebody sleeps."""

    def __init__(self):
        self.slept, self.at = [], 1000.0

    def now(self):
        return Instant(int(NOW + self.at - 1000.0))

    def monotonic(self):
        return self.at

    async def sleep(self, seconds):
        self.slept.append(seconds)
        self.at += seconds

    def around(self):
        return Surroundings(clock=self, monotonic=self.monotonic, sleep=self.sleep, jitter=lambda: 0.5)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def http(vendor, clock):
    return VendorHttp(vendor.url, surroundings=clock.around(), pacing=PATIENT)


@pytest.fixture
def intel(http):
    return IntelPcs(http, http)


@pytest.fixture
def amd(http):
    return AmdKds(http)


def name(text):
    return ItemName.parse(text)


# ---------------------------------------------------------------- what is asked


@pytest.mark.parametrize(
    ("text", "path", "params"),
    [
        ("intel-tcb-info/sgx/00606a000000/standard", "/sgx/certification/v4/tcb", "fmspc=00606a000000&update=standard"),
        ("intel-tcb-info/tdx/90c06f000000/early", "/tdx/certification/v4/tcb", "fmspc=90c06f000000&update=early"),
        ("intel-tcb-info/tdx/90c06f000000/18", "/tdx/certification/v4/tcb", "fmspc=90c06f000000&tcbEvaluationDataNumber=18"),
        ("intel-enclave-identity/sgx/standard", "/sgx/certification/v4/qe/identity", "update=standard"),
        ("intel-enclave-identity/tdx/19", "/tdx/certification/v4/qe/identity", "tcbEvaluationDataNumber=19"),
        ("intel-evaluations/tdx", "/tdx/certification/v4/tcbevaluationdatanumbers", ""),
        ("intel-pck-crl/platform", "/sgx/certification/v4/pckcrl", "ca=platform&encoding=der"),
        ("intel-root-crl/root", "/IntelSGXRootCA.der", ""),
        ("snp-chain/Genoa/vlek", "/vlek/v1/Genoa/cert_chain", ""),
        ("snp-chain/Milan/vcek", "/vcek/v1/Milan/cert_chain", ""),
        ("snp-crl/Turin/vcek", "/vcek/v1/Turin/crl", ""),
        (
            f"snp-vcek/Milan/{'ab' * 64}/db18000000000004",
            f"/vcek/v1/Milan/{'ab' * 64}",
            "blSPL=04&teeSPL=00&snpSPL=24&ucodeSPL=219",
        ),
        (
            "snp-vcek/Turin/6bb1229b7692b710/5200000004010101",
            "/vcek/v1/Turin/6bb1229b7692b710",
            "fmcSPL=01&blSPL=01&teeSPL=01&snpSPL=04&ucodeSPL=82",
        ),
    ],
)
def test_requests_are_those_of_the_vendors_interfaces(text, path, params):
    asked = (intel_request if text.startswith("intel") else amd_request)(name(text))
    assert (asked[0], "&".join(f"{key}={value}" for key, value in asked[1].items())) == (path, params)


def test_each_vendor_has_only_its_own():
    with pytest.raises(Misconfigured, match="endorser.not_here"):
        amd_request(name("intel-root-crl/root"))
    with pytest.raises(Misconfigured, match="endorser.not_here"):
        intel_request(name("snp-crl/Milan/vcek"))
    with pytest.raises(Unavailable, match="endorser.none"):
        asyncio.run(Endorsers({}).fetch(name("intel-root-crl/root")))


# ---------------------------------------------------------------- good answers


async def test_every_item_comes_as_it_is_judged(world, served, intel, amd):
    for one in world.asked():
        fetched = await (amd if str(one).startswith("snp-") else intel).fetch(one)
        assert fetched.source.startswith(served.url)
        found = judge(one, fetched.data, anchors=world.anchors, held=Held(root_crl=world.root_crl), now=world.now)
        assert found.name == one


async def test_collecting_asks_for_the_root_crl_first_and_reports_each(world, served, intel, amd, clock, tmp_path):
    store, told = DirectoryStore(tmp_path / "store"), []
    names = [one for one in world.asked() if not str(one).startswith("intel-root")]
    by_kind = {one.kind: amd if str(one).startswith("snp-") else intel for one in world.asked()}
    outcomes = await collect(names, Endorsers(by_kind), store, anchors=world.anchors, clock=clock, told=told.append)
    assert [outcome.taken.value for outcome in outcomes] == ["stored"] * len(world.asked())
    assert str(outcomes[0].name) == "intel-root-crl/root"
    assert told == list(outcomes)
    assert set(store.names()) == set(world.asked())
    assert world.amd.vcek_name not in settled(world.asked(), store.names())


async def test_one_absent_item_does_not_stop_the_others(world, served, intel, clock, tmp_path):
    names = [world.name("intel-tcb-info/sgx/000000000001/standard"), world.name("intel-pck-crl/platform")]
    by_kind = {one.kind: intel for one in world.asked()}
    outcomes = await collect(
        names, Endorsers(by_kind), DirectoryStore(tmp_path), anchors=world.anchors, clock=clock, told=lambda _: None
    )
    assert [(str(one.name).partition("/")[0], one.taken.value) for one in outcomes] == [
        ("intel-root-crl", "stored"),
        ("intel-pck-crl", "stored"),
        ("intel-tcb-info", "undecided"),
    ]
    assert outcomes[2].error.code == "endorser.not_found"


async def test_an_item_that_somebody_swapped_on_the_way_is_refused(world, served, vendor, intel, clock, tmp_path, tools):
    headers = {"TCB-Info-Issuer-Chain": quote(world.intel.signer_chain)}
    vendor.replies["/sgx/certification/v4/tcb"] = tools.Reply(body=world.intel.tcb_info("tdx"), headers=headers)
    outcomes = await collect(
        [world.name("intel-tcb-info/sgx/FMSPC/standard")],
        intel,
        DirectoryStore(tmp_path),
        anchors=world.anchors,
        clock=clock,
        told=lambda _: None,
    )
    assert outcomes[1].error.code == "collateral.other_item"
    assert outcomes[1].taken.value == "refused"


# ---------------------------------------------------------------- wrong answers


@pytest.mark.parametrize(
    ("text", "body", "headers", "code"),
    [
        ("intel-tcb-info/sgx/00606a000000/standard", b"<html>maintenance</html>", True, "endorser.answer_malformed"),
        ("intel-tcb-info/sgx/00606a000000/standard", b"", True, "endorser.answer_malformed"),
        ("intel-tcb-info/sgx/00606a000000/standard", b"{}", False, "endorser.issuer_chain_missing"),
        ("intel-pck-crl/platform", b"-----BEGIN X509 CRL-----", True, "endorser.answer_malformed"),
        ("intel-root-crl/root", b"3082", True, "endorser.answer_malformed"),
        ("snp-crl/Milan/vcek", b"<html>", True, "endorser.answer_malformed"),
        ("snp-chain/Milan/vcek", b"-----BEGIN CERTIFICATE-----", True, "endorser.answer_malformed"),
        (f"snp-vcek/Milan/{'ab' * 64}/db18000000000004", b"\x30\x03\x02\x01\x01", True, "endorser.answer_malformed"),
    ],
)
async def test_answers_that_are_not_the_item(vendor, intel, amd, tools, text, body, headers, code):
    chain = quote("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    names = ("TCB-Info-Issuer-Chain", "SGX-PCK-CRL-Issuer-Chain") if headers else ()
    client, request = (amd, amd_request) if text.startswith("snp") else (intel, intel_request)
    vendor.replies[request(name(text))[0]] = tools.Reply(body=body, headers=dict.fromkeys(names, chain))
    with pytest.raises(Malformed) as malformed:
        await client.fetch(name(text))
    assert malformed.value.code == code
    assert len(vendor.requests) == 1


@pytest.mark.parametrize("chain", ["not a chain", "%FF%FE", "x" * 40000])
async def test_an_issuer_chain_that_is_none(world, served, vendor, intel, tools, chain):
    headers = {"TCB-Info-Issuer-Chain": chain}
    vendor.replies["/sgx/certification/v4/tcb"] = tools.Reply(body=world.intel.tcb_info("sgx"), headers=headers)
    with pytest.raises(Malformed, match="endorser.answer_malformed"):
        await intel.fetch(world.name("intel-tcb-info/sgx/FMSPC/standard"))


@pytest.mark.parametrize(
    ("status", "kind", "code"),
    [
        (204, Malformed, "endorser.answer_malformed"),
        (302, Malformed, "endorser.answer_malformed"),
        (400, Misconfigured, "endorser.request_refused"),
        (401, Misconfigured, "endorser.request_refused"),
        (404, Unavailable, "endorser.not_found"),
        (410, Unavailable, "endorser.gone"),
    ],
)
async def test_refusals_are_told_once_and_not_asked_again(vendor, http, clock, tools, status, kind, code):
    headers = {"Location": "https://elsewhere.test/"} if status == 302 else {"Error-Code": "InvalidRequest"}
    vendor.replies["/x"] = tools.Reply(status=status, headers=headers)
    with pytest.raises(kind) as refused:
        await http.get("/x", {})
    assert refused.value.code == code
    assert len(vendor.requests) == 1
    assert clock.slept == []


async def test_an_answer_that_is_too_large_is_dropped_where_it_is(vendor, clock, tools):
    small = VendorHttp(vendor.url, surroundings=clock.around(), pacing=PATIENT, limits=Limits(answer_cap=1000))
    vendor.replies["/x"] = tools.Reply(body=bytes(1001))
    with pytest.raises(Malformed, match="endorser.answer_too_large"):
        await small.get("/x", {})
    vendor.replies["/x"] = tools.Reply(body=bytes(1000))
    assert len((await small.get("/x", {})).body) == 1000


async def test_a_compressed_answer_is_refused(vendor, http, tools):
    vendor.replies["/x"] = tools.Reply(body=bytes(10), headers={"Content-Encoding": "gzip"})
    with pytest.raises(Malformed, match="endorser.answer_malformed"):
        await http.get("/x", {})


# ---------------------------------------------------------------- limited, slow, absent


async def test_a_vendor_that_asks_for_patience_is_taken_at_its_word(vendor, http, clock, tools):
    limited = tools.Reply(status=429, headers={"Retry-After": "17"})
    later = tools.Reply(status=503, headers={"Retry-After": format_datetime(to_datetime(Instant(NOW + 47)))})
    vendor.replies["/x"] = [limited, later, tools.Reply(body=b"yes")]
    assert (await http.get("/x", {})).body == b"yes"
    assert clock.slept == [17.0, 30.0]


async def test_a_vendor_without_an_hour_to_name_is_asked_ever_more_slowly(vendor, http, clock, tools):
    vendor.replies["/x"] = [
        tools.Reply(status=429),
        tools.Reply(status=500),
        tools.Reply(status=503),
        tools.Reply(body=b"yes"),
    ]
    assert (await http.get("/x", {})).body == b"yes"
    assert clock.slept == [1.5, 3.0, 6.0]


async def test_patience_ends(vendor, http, clock, tools):
    vendor.replies["/x"] = tools.Reply(status=429)
    with pytest.raises(Unavailable, match="endorser.rate_limited"):
        await http.get("/x", {})
    assert len(vendor.requests) == PATIENT.attempts
    vendor.replies["/y"] = tools.Reply(status=429, headers={"Retry-After": "3600"})
    with pytest.raises(Unavailable) as limited:
        await http.get("/y", {})
    assert (limited.value.code, limited.value.retry_after_s) == ("endorser.rate_limited", 3600.0)
    assert vendor.requests.count("/y") == 1
    vendor.replies["/z"] = tools.Reply(status=502)
    with pytest.raises(Unavailable, match="endorser.unavailable"):
        await http.get("/z", {})


@pytest.mark.parametrize("slow", [{"drip_s": 0.02, "body": bytes(1000)}, {"hang": True}])
async def test_a_server_that_is_slow_is_one_that_does_not_answer(vendor, clock, tools, slow):
    once = Pacing(interval_s=0.0, attempts=1)
    http = VendorHttp(vendor.url, surroundings=clock.around(), pacing=once, limits=Limits(deadline_s=0.2))
    vendor.replies["/x"] = tools.Reply(**slow)
    with pytest.raises(Unavailable, match="endorser.timeout"):
        await http.get("/x", {})


async def test_an_answer_that_breaks_off_is_asked_for_again(vendor, http, tools):
    vendor.replies["/x"] = [tools.Reply(body=b"whole answer", cut=True), tools.Reply(body=b"whole answer")]
    assert (await http.get("/x", {})).body == b"whole answer"


async def test_nobody_there(vendor, clock):
    vendor.stop()
    http = VendorHttp(vendor.url, surroundings=clock.around(), pacing=PATIENT)
    with pytest.raises(Unavailable, match="endorser.unreachable"):
        await http.get("/x", {})
    assert len(clock.slept) == PATIENT.attempts - 1


async def test_requests_to_one_vendor_keep_their_distance(vendor, clock, tools):
    http = VendorHttp(vendor.url, surroundings=clock.around(), pacing=Pacing(interval_s=5.0))
    vendor.replies["/x"] = tools.Reply(body=b"yes")
    for _ in range(3):
        await http.get("/x", {})
    assert clock.slept == [5.0, 5.0]
    clock.at += 100
    await http.get("/x", {})
    assert len(clock.slept) == 2


# ---------------------------------------------------------------- TLS and URLs


@pytest.fixture
def tls(tmp_path):
    """A certificate for 127.0.0.1, as its own root."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a mirror")])
    import ipaddress
    from datetime import UTC, datetime

    start = datetime.now(UTC) - timedelta(days=1)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(start)
        .not_valid_after(start + timedelta(days=3))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    secret = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (tmp_path / "server.pem").write_bytes(secret + pem)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.pem")
    return context, pem


async def test_a_mirror_is_trusted_under_its_own_roots_only(tls, clock, tools):
    context, pem = tls
    server = tools.Vendor(context)
    try:
        server.replies["/x"] = tools.Reply(body=b"yes")
        mirror = VendorHttp(server.url, surroundings=clock.around(), pacing=PATIENT, roots_pem=pem)
        assert (await mirror.get("/x", {})).body == b"yes"
        stranger = VendorHttp(server.url, surroundings=clock.around(), pacing=PATIENT)
        with pytest.raises(NotAuthentic, match="endorser.not_trusted"):
            await stranger.get("/x", {})
    finally:
        server.stop()


@pytest.mark.parametrize(
    "url", ["http://kdsintf.amd.com", "ftp://x", "https://", "kds", "https://user:pw@x", "https://x?y", "http://[::"]
)
def test_urls_that_are_not_asked(clock, url):
    with pytest.raises(Misconfigured, match="endorser.url"):
        VendorHttp(url, surroundings=clock.around())


def test_roots_that_are_none(clock):
    with pytest.raises(Misconfigured, match="endorser.roots"):
        VendorHttp("https://x.test", surroundings=clock.around(), roots_pem=b"\xff")


# ---------------------------------------------------------------- pacing


@given(attempt=st.integers(0, 500), jitter=st.floats(0, 1, exclude_max=True), asked=st.none() | st.floats(0, 1e9))
def test_a_pause_is_never_longer_than_was_agreed(attempt, jitter, asked):
    pause = PATIENT.pause_s(attempt, jitter=jitter, retry_after_s=asked)
    if attempt + 1 >= PATIENT.attempts:
        assert pause is None
    elif asked is not None:
        assert pause == (asked if asked <= PATIENT.longest_wait_s else None)
    else:
        assert 0 < pause <= PATIENT.cap_s


@given(st.none() | st.text(max_size=60))
def test_any_retry_after_is_seconds_or_nothing(value):
    found = retry_after(value, NOW)
    assert found is None or found >= 0


def test_a_retry_after_in_the_past_is_now():
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT", NOW) == 0.0
    assert retry_after("Wed, 21 Oct 2015 07:28:00", NOW) == 0.0
    assert retry_after("-5", NOW) is None


# ---------------------------------------------------------------- recorded answers


async def test_recorded_answers_of_intels_service_are_replayed(shared, vendor, intel, tools):
    """The service's real answers of May 2025, with their headers, through client and judgement."""
    from moorline.verification.anchors import production_anchors
    from moorline.verification.collateral_judging import Anchors
    from moorline.verification.intel_pck import production_intel_anchors

    at = Instant(1_750_377_600)  # 2025-06-20
    anchors = Anchors(snp=production_anchors(), intel=production_intel_anchors(), tpm=())
    root_crl = (shared / "vectors/tdx/tdx-v4-phala-uptodate/root_ca_crl.der").read_bytes()
    recorded = {
        "intel-tcb-info/sgx/00906ed50000/standard": ("sgx", "sgx_tcb_info_00906ED50000", "tcb_info_json"),
        "intel-tcb-info/sgx/00906ed50000/early": ("sgx", "sgx_tcb_info_early", "tcb_info_json"),
        "intel-tcb-info/tdx/00806f050000/17": ("tdx", "tdx_tcb_info_eval17", "tcb_info_json"),
        "intel-enclave-identity/sgx/standard": ("sgx", "sgx_qe_identity", "enclave_identity_json"),
        "intel-enclave-identity/tdx/standard": ("tdx", "tdx_qe_identity", "enclave_identity_json"),
        "intel-evaluations/sgx": ("sgx", "sgx_tcb_eval_nums", "tcb_evaluation_data_numbers_json"),
        "intel-evaluations/tdx": ("tdx", "tdx_tcb_eval_nums", "tcb_evaluation_data_numbers_json"),
        "intel-pck-crl/processor": ("sgx", "pck_crl_processor_der", "crl_data_base64"),
    }
    vendor.replies["/IntelSGXRootCA.der"] = tools.Reply(body=root_crl)
    header = {
        "tcb_info_json": "TCB-Info-Issuer-Chain",
        "enclave_identity_json": "SGX-Enclave-Identity-Issuer-Chain",
        "tcb_evaluation_data_numbers_json": "TCB-Evaluation-Data-Numbers-Issuer-Chain",
        "crl_data_base64": "SGX-PCK-CRL-Issuer-Chain",
    }
    evaluations = {}
    for text, (family, file, member) in recorded.items():
        answer = json.loads((shared / f"vectors/{family}/pcs-api-responses-teepot/{file}.json").read_bytes())
        body = base64.b64decode(answer[member]) if member == "crl_data_base64" else answer[member].encode()
        path = intel_request(name(text))[0]
        vendor.replies[path] = tools.Reply(body=body, headers={header[member]: quote(answer["issuer_chain"])})
        fetched = await intel.fetch(name(text))
        found = judge(name(text), fetched.data, anchors=anchors, held=Held(root_crl=root_crl), now=at)
        assert found.root.value == "hardware"
        evaluations[text] = found.evaluation
    assert evaluations["intel-tcb-info/sgx/00906ed50000/standard"] == 17
    assert evaluations["intel-tcb-info/sgx/00906ed50000/early"] == 19
    crl = await intel.fetch(name("intel-root-crl/root"))
    assert judge(crl.name, crl.data, anchors=anchors, held=Held(root_crl=None), now=at).root.value == "hardware"


def test_amds_real_chains_and_chips_are_judged(shared):
    from moorline.evidence.snp import Product, TcbVersion
    from moorline.verification.anchors import production_anchors
    from moorline.verification.collateral import vcek_name
    from moorline.verification.collateral_judging import Anchors
    from moorline.verification.intel_pck import production_intel_anchors
    from moorline.verification.snp import SnpEndorsements, verify_snp_chain

    anchors = Anchors(snp=production_anchors(), intel=production_intel_anchors(), tpm=())
    roots = {
        "snp-chain/Milan/vcek": "amd_kds_ask_ark_milan",
        "snp-chain/Milan/vlek": "amd_kds_ask_ark_milan_vlek",
        "snp-chain/Genoa/vcek": "amd_kds_ask_ark_genoa",
        "snp-chain/Genoa/vlek": "amd_kds_ask_ark_genoa_vlek",
        "snp-chain/Turin/vcek": "amd_kds_ask_ark_turin_vcek",
        "snp-chain/Turin/vlek": "amd_kds_ask_ark_turin_vlek",
    }
    at = Instant(1_780_000_000)
    for text, file in roots.items():
        data = (shared / f"vectors/roots/{file}.pem").read_bytes()
        swapped = text[:-4] + ("vlek" if text.endswith("vcek") else "vcek")
        assert judge(name(text), data, anchors=anchors, held=Held(root_crl=None), now=at).root.value == "hardware"
        with pytest.raises(NotAuthentic, match="collateral.other_item"):
            judge(name(swapped), data, anchors=anchors, held=Held(root_crl=None), now=at)
    for case in ("milan-v2-trustee-vcek", "genoa-v5-live", "turin-vcek-chain-only"):
        der = (shared / f"vectors/snp/{case}/vcek.der").read_bytes()
        leaf = verify_snp_chain(SnpEndorsements(leaf=der, intermediates=(), crl=None), anchors=anchors.snp, now=at).leaf
        assert isinstance(leaf.tcb, TcbVersion)
        assert leaf.product in set(Product)
        named = vcek_name(leaf.product, leaf.hwid, leaf.tcb.raw())
        assert judge(named, der, anchors=anchors, held=Held(root_crl=None), now=at).root.value == "hardware"
