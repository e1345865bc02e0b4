"""The whole story on the command line: fetch, list, carry in one signed file, import elsewhere, forecast."""

import json
from urllib.parse import quote

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from tpm_maker import der

from moorline.cli import run
from moorline.clock import rendered
from moorline.evidence.snp import serialize_report
from moorline.simulators.silicon import GuestContext, Silicon, guest_policy


class Desk:
    """A person with files and commands."""

    def __init__(self, world, served, folder, capsys):
        self.world, self.served, self.folder, self.capsys = world, served, folder, capsys
        self.at = world.now
        (folder / "root.pem").write_bytes(world.intel.root_certificate())
        key = ed25519.Ed25519PrivateKey.generate()
        pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
        (folder / "key.pem").write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
        public = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
        (folder / "public.pem").write_bytes(public)

    @property
    def roots(self):
        return ["--intel-root", str(self.folder / "root.pem"), "--snp-anchors", str(self.world.amd.maker.anchors_path)]

    def moor(self, *words, as_json=True):
        code = run(["collateral", *map(str, words), "--at", rendered(self.at), *(["--json"] if as_json else [])])
        out = self.capsys.readouterr()
        return code, json.loads(out.out) if as_json and out.out else out.out + out.err

    def fetch(self, *words, store="store", as_json=True):
        url = self.served.url
        where = ["--kds", url, "--pcs", url, "--certificates", url, "--store", self.folder / store, "--pace", "0"]
        return self.moor("fetch", *words, *where, *self.roots, as_json=as_json)

    def quote(self, tee):
        path = self.folder / f"{tee}.quote"
        path.write_bytes(self.world.intel.quote(tee))
        return path


@pytest.fixture
def desk(world, served, tmp_path, capsys):
    return Desk(world, served, tmp_path, capsys)


@pytest.fixture(params=["store", "store.sqlite"])
def store(request):
    return request.param


def test_fetch_list_export_import(desk, store):
    """Verifies that: what one machine fetched is carried in one file and judged again elsewhere."""
    code, found = desk.fetch(desk.quote("sgx"), desk.quote("tdx"), store=store)
    assert code == 0, found
    assert {item["result"] for item in found["items"]} == {"stored"}
    assert found["items"][0]["item"] == "intel-root-crl/root"

    code, listed = desk.moor("list", "--store", desk.folder / store, "--expiring-within", "0")
    assert code == 0
    assert {item["state"] for item in listed["items"]} == {"current"}
    assert {item["root"] for item in listed["items"]} == {"test"}
    assert desk.moor("list", "--store", desk.folder / store, "--expiring-within", "3")[0] == 1
    code, text = desk.moor("list", "--store", desk.folder / store, as_json=False)
    assert "intel-pck-crl/platform" in text

    bundle = desk.folder / "bundle.cose"
    code, exported = desk.moor("export", "--store", desk.folder / store, "--key", desk.folder / "key.pem", "-o", bundle)
    assert (code, exported["items"]) == (0, len(listed["items"]))

    words = ["import", bundle, "--signer", desk.folder / "public.pem", "--store", desk.folder / "offline"]
    code, imported = desk.moor(*words, *desk.roots)
    assert code == 0
    assert imported["signer"] == exported["signer"]
    assert imported["items"][0]["item"] == "intel-root-crl/root"
    assert {item["result"] for item in imported["items"]} == {"stored"}
    code, again = desk.moor(*words, *desk.roots)
    assert {item["result"] for item in again["items"]} == {"unchanged"}
    offline = desk.moor("list", "--store", desk.folder / "offline")[1]
    assert {item["item"] for item in offline["items"]} == {item["item"] for item in listed["items"]}


def test_an_old_bundle_never_leads_back(desk):
    """Verifies that: a signed bundle of yesterday, still within its dates, does not replace what is held today."""
    desk.world.intel.issued = desk.at - 2 * 86400
    desk.fetch(desk.quote("sgx"), store="old")
    desk.moor("export", "--store", desk.folder / "old", "--key", desk.folder / "key.pem", "-o", desk.folder / "old.cose")
    desk.world.intel.issued = desk.at - 3600
    assert desk.fetch(desk.quote("sgx"))[0] == 0
    words = ["import", desk.folder / "old.cose", "--signer", desk.folder / "public.pem", "--store", desk.folder / "store"]
    code, found = desk.moor(*words, *desk.roots)
    assert code == 1
    refused = {item["item"]: item["error"]["code"] for item in found["items"] if item["result"] == "refused"}
    assert refused == {
        f"intel-tcb-info/sgx/{desk.world.intel.fmspc}/standard": "collateral.rollback",
        "intel-enclave-identity/sgx/standard": "collateral.rollback",
    }
    code, text = desk.moor(*words, *desk.roots, as_json=False)
    assert "collateral.rollback" in text


def test_a_bundle_that_went_stale_on_its_way_is_refused_item_by_item(desk):
    desk.fetch(desk.quote("sgx"))
    bundle = desk.folder / "b.cose"
    desk.moor("export", "--store", desk.folder / "store", "--key", desk.folder / "key.pem", "-o", bundle)
    words = ["import", bundle, "--signer", desk.folder / "public.pem", "--store", desk.folder / "late", *desk.roots]
    desk.at += 3 * 86400
    code, found = desk.moor(*words)
    assert code == 1
    assert all(item["result"] in ("refused", "undecided") for item in found["items"])
    assert found["items"][0]["error"]["code"] == "intel.crl_expired"
    desk.at -= 30 * 86400
    code, found = desk.moor(*words)
    assert (code, found["error"]["code"]) == (2, "bundle.from_the_future")
    desk.at += 40 * 86400
    code, found = desk.moor("export", "--store", desk.folder / "store", "--key", desk.folder / "key.pem", "-o", bundle)
    assert (code, found["error"]["code"]) == (2, "collateral.nothing_current")


def test_a_bundle_of_a_stranger_imports_nothing(desk):
    desk.fetch(desk.quote("sgx"))
    desk.moor("export", "--store", desk.folder / "store", "--key", desk.folder / "key.pem", "-o", desk.folder / "b.cose")
    stranger = ed25519.Ed25519PrivateKey.generate().public_key()
    (desk.folder / "other.pem").write_bytes(
        stranger.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    words = ["import", desk.folder / "b.cose", "--signer", desk.folder / "other.pem", "--store", desk.folder / "offline"]
    code, found = desk.moor(*words, *desk.roots)
    assert (code, found["error"]["code"]) == (1, "bundle.signer_unknown")
    assert not (desk.folder / "offline").exists()


def test_without_its_test_root_nothing_is_stored(desk):
    url = desk.served.url
    where = ["--kds", url, "--pcs", url, "--certificates", url, "--store", desk.folder / "s"]
    code, found = desk.moor("fetch", desk.quote("sgx"), *where)
    assert code == 1
    assert found["items"][0]["error"]["code"] == "intel.crl_signature"
    assert not (desk.folder / "s").exists()


def test_a_chip_is_asked_for_once(desk):
    chip = desk.world.amd.chip
    guest = GuestContext(measurement=bytes(48), host_data=bytes(32), policy=guest_policy(debug=False), report_id=bytes(32))
    silicon = Silicon(chip, report_version=3)
    report = desk.folder / "report.bin"
    report.write_bytes(serialize_report(silicon.signed(silicon.unsigned_report(guest, bytes(64)))))
    code, found = desk.fetch(report)
    assert code == 0, found
    assert {item["item"].partition("/")[0] for item in found["items"]} == {"snp-vcek", "snp-chain", "snp-crl"}
    asked = len(desk.served.requests)
    code, found = desk.fetch(report)
    assert {item["item"].partition("/")[0] for item in found["items"]} == {"snp-chain", "snp-crl"}
    assert len(desk.served.requests) == asked + 2
    old = desk.folder / "v2.bin"
    old_silicon = Silicon(chip, report_version=2)
    old.write_bytes(serialize_report(old_silicon.signed(old_silicon.unsigned_report(guest, bytes(64)))))
    code, found = desk.fetch(old)
    assert (code, found["error"]["code"]) == (2, "collateral.product_needed")
    assert desk.fetch(old, "--product", "Milan")[0] == 0


def test_held_items_are_fetched_again_and_absent_ones_are_told(desk):
    desk.fetch("--item", "intel-pck-crl/platform")
    code, found = desk.fetch("--held")
    assert (code, len(found["items"])) == (0, 2)
    code, found = desk.fetch("--item", "intel-tcb-info/sgx/000000000001/standard")
    assert code == 2
    assert found["items"][-1]["error"]["code"] == "endorser.not_found"
    code, text = desk.fetch("--item", "intel-tcb-info/sgx/000000000001/standard", as_json=False)
    assert "endorser.not_found" in text


def test_a_forecast_names_who_falls_and_when(desk):
    """Verifies that: a platform that a later evaluation rates out of date is named before that is the standard."""
    fake = desk.world.intel.fakes["sgx"]
    desk.world.intel.levels["sgx", 19] = [
        fake.level(svn=6),
        fake.level(svn=5, status="OutOfDate", advisories=["INTEL-SA-09999"]),
    ]
    sgx, tdx = desk.quote("sgx"), desk.quote("tdx")
    code, found = desk.fetch(sgx, tdx, "--upcoming")
    assert code == 0, found
    tracks = {item["item"].rpartition("/")[2] for item in found["items"] if "tcb-info" in item["item"]}
    assert tracks == {"standard", "18", "19"}
    code, found = desk.moor("forecast", sgx, tdx, "--store", desk.folder / "store", "--lag-days", "180")
    assert code == 1
    rows = {row["platform"]: row for row in found["platforms"]}
    assert (rows["sgx.quote"]["prospect"], rows["sgx.quote"]["now"]) == ("falls", "UpToDate")
    assert (rows["sgx.quote"]["then"], rows["sgx.quote"]["at evaluation"]) == ("OutOfDate", 19)
    assert rows["sgx.quote"]["new advisories"] == ["INTEL-SA-09999"]
    assert rows["sgx.quote"]["expected"].endswith("Z")
    assert rows["sgx.quote"]["rated"] == ["platform", "quoting enclave"]
    assert rows["tdx.quote"]["prospect"] == "stays"
    code, text = desk.moor("forecast", tdx, "--store", desk.folder / "store", as_json=False)
    assert (code, "stays" in text) == (0, True)
    desk.at += 3 * 86400
    code, found = desk.moor("forecast", tdx, "--store", desk.folder / "store")
    assert (code, found["error"]["code"]) == (2, "collateral.not_current")


def test_a_forecast_from_intels_real_statements(desk, shared, tools):
    """Verifies that: Intel's recorded evaluations 17 to 19 of one FMSPC, fetched, tell who falls at 18 or 19."""
    folder = shared / "vectors/sgx/tcb-eval-data-number-selection"
    tracks = {"update=standard": 17, "tcbEvaluationDataNumber=18": 18, "tcbEvaluationDataNumber=19": 19}

    def tcb(path):
        raw = json.loads((folder / f"00606a000000-{tracks[path.rpartition('&')[2]]}.tcb.json").read_bytes())
        r, s = decode_dss_signature(bytes(raw["signature"]))
        signature = (r.to_bytes(32, "big") + s.to_bytes(32, "big")).hex()
        body = f'{{"tcbInfo":{raw["raw_tcb_info"]},"signature":"{signature}"}}'.encode()
        return tools.Reply(body=body, headers={"TCB-Info-Issuer-Chain": quote("".join(raw["ca_chain"]))})

    listed = json.loads((shared / "vectors/sgx/pcs-api-responses-teepot/sgx_tcb_eval_nums.json").read_bytes())
    replies = desk.served.replies
    replies["/sgx/certification/v4/tcb"] = tcb
    replies["/sgx/certification/v4/tcbevaluationdatanumbers"] = tools.Reply(
        body=listed["tcb_evaluation_data_numbers_json"].encode(),
        headers={"TCB-Evaluation-Data-Numbers-Issuer-Chain": quote(listed["issuer_chain"])},
    )
    root_crl = (shared / "vectors/tdx/tdx-v4-phala-uptodate/root_ca_crl.der").read_bytes()
    replies["/IntelSGXRootCA.der"] = tools.Reply(body=root_crl)
    desk.at = 1_750_377_600  # 2025-06-20
    code, found = desk.fetch("--item", "intel-tcb-info/sgx/00606a000000/standard", "--upcoming")
    assert code == 0, found
    assert [(item["evaluation"], item["root"]) for item in found["items"] if "tcb-info" in item["item"]] == [
        (17, "hardware"),
        (18, "hardware"),
        (19, "hardware"),
    ]
    best = json.loads(json.loads((folder / "00606a000000-17.tcb.json").read_bytes())["raw_tcb_info"])["tcbLevels"][0]["tcb"]
    facts = {
        "name": "an Ice Lake, updated in 2024",
        "tee": "sgx",
        "fmspc": "00606a000000",
        "components": [one["svn"] for one in best["sgxtcbcomponents"]],
        "pce_svn": best["pcesvn"],
    }
    (desk.folder / "fleet.json").write_text(json.dumps({"platforms": [facts]}))
    code, found = desk.moor("forecast", "--facts", desk.folder / "fleet.json", "--store", desk.folder / "store")
    (row,) = found["platforms"]
    assert (code, row["prospect"], row["standard evaluation"], row["then"]) == (1, "falls", 17, "OutOfDate")
    assert row["event"] in ("2024-11-12T00:00:00Z", "2025-05-13T00:00:00Z")
    assert row["new advisories"]


def test_a_forecast_without_later_evaluations_cannot_be_made(desk):
    tdx = desk.quote("tdx")
    desk.fetch(tdx)
    code, found = desk.moor("forecast", tdx, "--store", desk.folder / "store")
    assert (code, found["platforms"][0]["prospect"]) == (2, "unknown")


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["fetch", "--store", "S"], "collateral.nothing_asked"),
        (["fetch", "F", "--store", "S"], "collateral.no_needs"),
        (["fetch", "--item", "x/y", "--store", "S"], "collateral.name"),
        (["list", "--store", "S"], "collateral.no_store"),
        (["forecast", "--store", "S"], "collateral.no_store"),
        (["export", "--store", "S", "--key", "F", "-o", "O"], "collateral.no_store"),
        (["import", "F", "--signer", "F", "--store", "S"], "collateral.key"),
        (["import", "missing", "--signer", "F", "--store", "S"], "cli.file"),
    ],
)
def test_what_cannot_be_done_says_why(desk, words, code):
    (desk.folder / "F").write_bytes(b"no evidence")
    named = [str(desk.folder / word) if word in ("S", "F", "O", "missing") else word for word in words]
    exit_code, found = desk.moor(*named)
    assert (exit_code, found["error"]["code"]) == (2, code)


def test_wrong_use_is_64(desk):
    assert desk.moor("fetch", as_json=False)[0] == 64
    assert desk.moor("fetch", "--store", "S", "--update", "never", as_json=False)[0] == 64
    assert run(["collateral", "list", "--store", "S", "--at", "yesterday"]) == 2


def test_a_tpm_makers_list_by_hand_into_a_bundle_and_out_again(desk):
    """Verifies that: `add` names the list by its authority, a bundle carries it, and only the root's owner lets it in."""
    maker = desk.world.tpm.maker
    files = {"maker-root.der": der(maker.root), "ca.der": der(maker.ca), "ca.crl": maker.crl("ca", maker.die)}
    pem = serialization.Encoding.PEM
    files["root.crl"] = x509.load_der_x509_crl(maker.crl("root")).public_bytes(pem)
    for name, data in files.items():
        (desk.folder / name).write_bytes(data)
    root, issuer = ["--tpm-root", desk.folder / "maker-root.der"], ["--issuer", desk.folder / "ca.der"]
    words = ["add", desk.folder / "root.crl", desk.folder / "ca.crl", *issuer, "--store", desk.folder / "store"]
    code, found = desk.moor(*words)
    assert (code, found["error"]["code"]) == (1, "ek.crl_issuer")
    code, found = desk.moor(*words, *root)
    names = [str(desk.world.tpm.name(issuer)) for issuer in ("root", "ca")]
    assert (code, [item["item"] for item in found["items"]]) == (0, names)
    code, text = desk.moor(*words, *root, as_json=False)
    assert (code, text.count("unchanged")) == (0, 2)
    code, listed = desk.moor("list", "--store", desk.folder / "store")
    assert {item["number"] for item in listed["items"]} == {5}

    desk.moor("export", "--store", desk.folder / "store", "--key", desk.folder / "key.pem", "-o", desk.folder / "b.cose")
    words = ["import", desk.folder / "b.cose", "--signer", desk.folder / "public.pem", "--store", desk.folder / "offline"]
    code, found = desk.moor(*words)
    assert (code, {item["error"]["code"] for item in found["items"]}) == (1, {"ek.anchor_unknown"})
    assert desk.moor(*words, *root)[0] == 0
    (desk.folder / "ca.crl").write_bytes(maker.crl("ca", number=4))
    code, found = desk.moor("add", desk.folder / "ca.crl", *issuer, *root, "--store", desk.folder / "offline")
    assert (code, found["items"][0]["error"]["code"]) == (1, "collateral.rollback")
    (desk.folder / "ca.crl").write_bytes(b"-----BEGIN X509 CRL-----\n")
    code, found = desk.moor("add", desk.folder / "ca.crl", *root, "--store", desk.folder / "offline")
    assert (code, found["error"]["code"]) == (2, "ek.crl_malformed")


def test_fetch_does_not_ask_anybody_for_what_came_by_hand(desk):
    maker = desk.world.tpm.maker
    (desk.folder / "maker-root.der").write_bytes(der(maker.root))
    (desk.folder / "root.crl").write_bytes(maker.crl("root"))
    where = ["--store", desk.folder / "store"]
    assert desk.moor("add", desk.folder / "root.crl", "--tpm-root", desk.folder / "maker-root.der", *where)[0] == 0
    assert desk.fetch(desk.quote("sgx"))[0] == 0
    code, found = desk.fetch("--held")
    assert (code, [item["item"] for item in found["items"] if item["item"].startswith("tpm")]) == (0, [])
