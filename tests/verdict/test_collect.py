"""Verifies that what is collected on a machine is what can be appraised about it: on swtpm, and on trees of fake files."""

import ctypes
import json
import struct
import time
from pathlib import Path

import pytest
from verdict_desk import document, pem

from moorline.attesters import nitro
from moorline.attesters.gramine import GramineReports
from moorline.attesters.tpm import Tpm
from moorline.clock import Instant
from moorline.errors import Malformed, Unavailable
from moorline.evidence import nitro as nitro_format
from moorline.evidence import tpm_structures
from moorline.evidence.ima import parse_ima, serialize_binary
from moorline.evidence.tpm_envelopes import parse_tpm2_tools_pcrs
from moorline.policy import reference_sets
from moorline.simulators import firmware
from moorline.simulators.tpm import SimulatedTpm, SimulatedTpmManufacturer
from moorline.wire import cbor, keys

NONCE = "7a" * 32
REPORT_DATA = "3c" * 64


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    maker = SimulatedTpmManufacturer.create(tmp_path_factory.mktemp("maker"), now=Instant(int(time.time())))
    return SimulatedTpm.manufacture(tmp_path_factory.mktemp("t") / "a", maker)


def test_a_machine_is_collected_and_appraised_by_the_same_command(desk, simulated):
    """verifies that: quote, boot log and IMA list collected from a booted TPM make an affirming verdict against signed
    reference values, and a refusal with the code of the rule when one program more has run."""
    root, out = desk.folder / "root", desk.folder / "out"
    logs = {"event_log.bin": "tpm0/binary_bios_measurements", "ima.txt": "ima/ascii_runtime_measurements"}
    with simulated:
        with Tpm.open(simulated.tcti) as tpm:
            firmware.boot(tpm, simulated.directory, firmware.GOOD)
        for name, place in logs.items():
            path = root / "sys/kernel/security" / place
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(simulated.directory / name)
        words = ("--tcti", simulated.tcti, "--root", root, "--nonce", NONCE)
        code, said = desk.moor("collect", "--out", out, *words, "--json")
        assert code == 0
        files = json.loads(said)["files"]
        assert sorted(Path(one).name for one in files) == [
            "ak.tpmt-public",
            "boot.log",
            "ima.txt",
            "quote.attest",
            "quote.pcrs",
            "quote.signature",
        ]
        written = document("tpm", root={"exact": "software"}, bank={"exact": "sha256"}, selection={"exact": 0xFFFFFF})
        written["demands"]["host"] |= {"secure_boot": {"exact": True}, "boot_anomalies": {"exact": 0}}
        policy = desk.folder / "host.json"
        policy.write_text(json.dumps(written))
        code, said = desk.moor("appraise", *files, "--nonce", NONCE, "--policy", policy, "--json")
        assert (code, json.loads(said)["status"]) == (0, "affirming"), said
        written["demands"]["host"]["unlisted_files"] = {"exact": 0}
        policy.write_text(json.dumps(written))
        code, said = desk.moor("appraise", *files, "--nonce", NONCE, "--policy", policy, "--json")
        refused = [one["code"] for one in json.loads(said)["findings"] if one["outcome"] == "not_met"]
        assert (code, refused) == (1, ["host.file_not_in_reference_values"])  # no reference values: nothing is listed
        assert desk.moor("collect", "--out", out, *words)[0] == 2  # never over what was collected before

        refs = desk.folder / "files.cose"
        refs.write_bytes(reference_sets.sign(listed(out), keys.KeySigner(desk.signer)))
        written["references"] = {"machines": {"serial": 1, "signers": [pem(desk.signer)]}}
        written["demands"]["pcr0"] = {"reference": "machines"}
        policy.write_text(json.dumps(written))
        judged = ("--nonce", NONCE, "--policy", policy, "--refs", refs, "--json")
        code, said = desk.moor("appraise", *files, *judged)
        assert (code, json.loads(said)["status"]) == (0, "affirming"), said
        binary = desk.folder / "ima.bin"
        binary.write_bytes(serialize_binary(parse_ima((out / "ima.txt").read_bytes())))
        code, said = desk.moor("appraise", *(one for one in files if not one.endswith("ima.txt")), binary, *judged)
        assert (code, json.loads(said)["files"][str(binary)]) == (0, "ima-binary"), said
        with Tpm.open(simulated.tcti) as tpm:
            firmware.execute(tpm, simulated.directory, "/usr/bin/stranger", b"unknown")
        again = desk.folder / "again"
        assert desk.moor("collect", "--out", again, *words)[0] == 0
        code, said = desk.moor("appraise", *sorted(again.iterdir()), *judged)
        refused = [one["code"] for one in json.loads(said)["findings"] if one["outcome"] == "not_met"]
        assert (code, refused) == (1, ["host.file_not_in_reference_values"])


def listed(out):
    """Reference values of what ran on this machine, and of PCR 0."""
    entries = parse_ima((out / "ima.txt").read_bytes())
    pcrs = parse_tpm2_tools_pcrs((out / "quote.pcrs").read_bytes())[tpm_structures.ALG_SHA256]
    release = reference_sets.Release(
        name="1",
        not_before=0,
        not_after=1 << 33,
        values={"pcr0": (json.dumps(pcrs[0].hex()),)},
        files={one.path.decode(): (one.digest,) for one in entries if one.path != b"boot_aggregate"},
    )
    return reference_sets.ReferenceSet(
        name="machines", family="tpm", serial=1, not_before=0, not_after=1 << 33, releases=(release,)
    )


def test_where_nothing_attests_the_answer_is_undecided_with_the_reasons(desk):
    code, out = desk.moor("collect", "--out", desk.folder / "out", "--root", desk.folder / "empty", "--json")
    found = json.loads(out)
    assert (code, found["files"]) == (2, [])
    assert set(found["without"]) == {"configfs-tsm", "gramine", "nitro", "tpm"}
    code, out = desk.moor("collect", "--out", desk.folder / "more", "--root", desk.folder / "empty")
    assert (code, out.splitlines()[0]) == (2, "nothing here attests anything that is known")


def test_a_tpm_that_is_not_there_does_not_keep_others_from_being_asked(desk):
    code, out = desk.moor(
        "collect", "--out", desk.folder / "out", "--root", desk.folder, "--tcti", "swtpm:path=/none", "--json"
    )
    assert code == 2
    assert "tpm" in json.loads(out)["without"]
    assert desk.moor("collect", "--out", desk.folder / "other", "--root", desk.folder, "--bank", "md5")[0] == 2


# ---------------------------------------------------------------- trees of fake files


class Kernel:
    """A configfs-tsm folder that answers as the kernel does: attributes appear with the folder, a write makes a report."""

    def __init__(self, monkeypatch, root, provider, report):
        self.folder = root / "sys/kernel/config/tsm/report"
        self.folder.mkdir(parents=True)
        mkdir, write_bytes, rmdir = Path.mkdir, Path.write_bytes, Path.rmdir

        def acting_mkdir(path, *arguments, **named):
            mkdir(path, *arguments, **named)
            if path.parent == self.folder:
                (path / "generation").write_text("3\n")
                (path / "provider").write_text(f"{provider}\n")

        def acting_write(path, data):
            if path.name != "inblob":
                return write_bytes(path, data)
            write_bytes(path.parent / "outblob", report)
            (path.parent / "generation").write_text("4\n")
            return len(data)

        def acting_rmdir(path):
            for attribute in path.iterdir():
                attribute.unlink()
            rmdir(path)

        monkeypatch.setattr(Path, "mkdir", acting_mkdir)
        monkeypatch.setattr(Path, "write_bytes", acting_write)
        monkeypatch.setattr(Path, "rmdir", acting_rmdir)


@pytest.mark.parametrize(
    ("provider", "vector", "name", "kind"),
    [
        ("sev_guest", "snp/*/report.bin", "snp-report.bin", "snp-report"),
        ("tdx_guest", "tdx/*/quote.bin", "tdx-quote.bin", "tdx-quote"),
        ("arm_cca_guest", "cca/tf-rmm-token/token.cbor", "cca-token.cbor", "cca-token"),
    ],
)
def test_reports_of_the_kernel_are_kept_by_what_they_are(desk, monkeypatch, shared, provider, vector, name, kind):
    report = min((shared / "vectors").glob(vector)).read_bytes()
    root = desk.folder / "root"
    Kernel(monkeypatch, root, provider, report)
    log = root / "sys/firmware/acpi/tables/data/CCEL"
    log.parent.mkdir(parents=True)
    log.write_bytes(b"a log")
    code, out = desk.moor("collect", "--out", desk.folder / "out", "--root", root, "--json", "--report-data", REPORT_DATA)
    names = [Path(one).name for one in json.loads(out)["files"]]
    assert (code, names) == (0, [name, "ccel.bin"] if provider == "tdx_guest" else [name])
    assert (desk.folder / "out" / name).read_bytes() == report
    code, out = desk.moor("inspect", desk.folder / "out" / name, "--json")
    assert json.loads(out)["files"][0]["kind"] == kind


@pytest.fixture
def enclave(tmp_path, shared):
    """Gramine's files, with a real quote whose report data is known."""
    quote = min((shared / "vectors" / "sgx").glob("*/quote.bin")).read_bytes()
    folder = tmp_path / "dev" / "attestation"
    folder.mkdir(parents=True)
    (folder / "attestation_type").write_text("dcap\n")
    (folder / "quote").write_bytes(quote)
    (folder / "user_report_data").write_bytes(b"")
    return folder, quote


def test_gramine_gives_a_quote_over_what_was_written(enclave):
    folder, quote = enclave
    report_data = quote[48 + 320 : 48 + 384]
    report = GramineReports(folder).report(report_data)
    assert (report.outblob, report.provider) == (quote, "gramine_dcap")
    assert (folder / "user_report_data").read_bytes() == report_data


def test_gramine_refusals_have_their_codes(enclave):
    folder, quote = enclave
    report_data = quote[48 + 320 : 48 + 384]
    with pytest.raises(Unavailable, match=r"report\.contended"):
        GramineReports(folder).report(bytes(64))
    with pytest.raises(Malformed, match=r"report\.data_size"):
        GramineReports(folder).report(b"short")
    (folder / "quote").write_bytes(quote[:200])
    with pytest.raises(Unavailable, match=r"report\.gramine\b"):
        GramineReports(folder).report(report_data)
    (folder / "attestation_type").write_text("epid")
    with pytest.raises(Unavailable, match=r"report\.gramine_type"):
        GramineReports(folder).report(report_data)
    with pytest.raises(Unavailable, match=r"report\.gramine\b"):
        GramineReports(folder / "nothing").report(report_data)


class SecurityModule:
    """AWS's module at the kernel's structure: reads the request at its address, writes the answer at the other."""

    def __init__(self, answer):
        self.answer, self.asked = answer, None

    def __call__(self, _descriptor, request, raw):
        assert request == 0xC0200A00
        address, size, room, limit = struct.unpack("=4Q", raw)
        self.asked = cbor.decode(ctypes.string_at(address, size))
        answer = self.answer(**self.asked["Attestation"])
        assert len(answer) <= limit
        ctypes.memmove(room, answer, len(answer))
        struct.pack_into("=Q", raw, 24, len(answer))


def given(data, **values):
    """What the module of a real document was once asked, and its answer to that."""
    held = nitro_format.parse_document(data)
    told = {"nonce": held.nonce, "user_data": held.user_data, "public_key": held.public_key} | values
    return told, lambda **_: cbor.encode({"Attestation": {"document": data}})


@pytest.fixture
def nsm(tmp_path):
    (tmp_path / "nsm").touch()
    return tmp_path / "nsm"


@pytest.fixture
def real(shared):
    return (shared / "vectors/nitro/evervault-2022-nonce/attestation.cbor").read_bytes()


def test_a_nitro_module_is_asked_for_a_document_over_the_challenge(nsm, real):
    told, answer = given(real)
    module = SecurityModule(answer)
    assert nitro.document(**told, path=nsm, ioctl=module) == real
    assert module.asked == {"Attestation": told}


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (cbor.encode({"Error": "InvalidArgument"}), "nitro.module"),
        (cbor.encode({"Attestation": {"document": b"none"}}), "nitro.module"),
        (cbor.encode({"Attestation": {}}), "nitro.module"),
        (cbor.encode([]), "nitro.module"),
        (b"", "nitro.module"),
        (b"\xff" * 64, "nitro.module"),
    ],
)
def test_a_nitro_module_that_gives_no_document(nsm, real, answer, code):
    told, _ = given(real)
    with pytest.raises(Unavailable) as told_so:
        nitro.document(**told, path=nsm, ioctl=SecurityModule(lambda **_: answer))
    assert told_so.value.code == code


@pytest.mark.parametrize("name", ["nonce", "user_data", "public_key"])
def test_a_document_over_other_values_is_none(nsm, real, name):
    told, answer = given(real, **{name: b"another challenge"})
    with pytest.raises(Unavailable, match=r"nitro\.contended"):
        nitro.document(**told, path=nsm, ioctl=SecurityModule(answer))


def test_outside_of_an_enclave_and_before_a_file_that_is_no_module(tmp_path, nsm):
    told = {"nonce": bytes(32), "user_data": bytes(64)}
    with pytest.raises(Unavailable, match=r"nitro\.no_module"):
        nitro.document(**told, path=tmp_path / "elsewhere")
    with pytest.raises(Unavailable, match=r"nitro\.module"):
        nitro.document(**told, path=nsm)  # the real ioctl, on a file
    with pytest.raises(Malformed, match=r"nitro\.request_size"):
        nitro.document(nonce=bytes(0x1000), user_data=b"", path=nsm)
