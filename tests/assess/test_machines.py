"""Whole machines: what an assessment says of a server, a laptop, a guest, a container, and of trees that lie or bite.

verifies that: every capability is there once; what cannot be read is never met; nothing a tree says is above `asserted`.
"""

import json
import os
import stat

import machines
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moorline.attesters.probes import machine
from moorline.attesters.probes.tree import State, Tree
from moorline.policy.sec009.assessment import Observation, Status, assess, measure_rules
from moorline.policy.sec009.catalogue import capabilities
from moorline.rats import Assurance, CapabilityLevel, EvidenceRoot

NOW = 1_795_000_000


def assessed(root, attested=()):
    tree = Tree(root)
    return assess(machine.observe(tree, NOW), host=machine.host_name(tree), at=NOW, privileged=False, attested=attested)


def status(found):
    return {one.id: one.status.value for one in found.capabilities}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    return assessed(machines.write(tmp_path_factory.mktemp("server"), machines.server()))


def test_every_capability_of_the_model_has_a_probe_but_the_one_that_is_derived():
    spoken = [name for probe in machine.PROBES for name in probe.capabilities]
    assert sorted(spoken) == sorted(set(capabilities()) - {machine.DERIVED})


@pytest.mark.parametrize("make", [machines.server, machines.laptop, machines.guest, machines.container, dict])
def test_a_probe_speaks_about_what_it_says_it_speaks_about(make, tmp_path):
    tree = Tree(machines.write(tmp_path, make()))
    for probe in machine.PROBES:
        assert sorted({one.capability for one in probe.run(tree, NOW)}) == sorted(probe.capabilities), probe.noun


def test_a_well_configured_server(server):
    found = status(server)
    expected = {
        "root.tpm20.hardware", "boot.measured", "boot.secure.enforced", "boot.kernel.identity", "kernel.lockdown",
        "kernel.module_signing", "ima.measurement", "ima.appraisal.enforced", "cpu.vulnerabilities.mitigated", "hmee.sev",
        "hmee.sev_es", "hmee.sev_snp", "hmee.slots.free", "dma.iommu.isolation", "net.sriov", "osac.lsm",
        "fs.root.readonly",
        "auth.admin.mfa", "posture.score", "storage.encryption.host", "storage.type.*", "cleanup.memory",
        "cleanup.storage.method.*", "entropy.hw_source", "location.logical", "hsm.virtual", "phys.access_control",
        "pool.type",
    }  # fmt: skip
    assert {name for name, said in found.items() if said == "met"} == expected
    assert {name for name, said in found.items() if said == "declared"} == {"people.vetted.*", "location.jurisdiction"}
    assert server.approach == "7.2.2.1"
    assert server.capability("hmee.slots.free").value == "sev_es 96, sev 410"


def test_nothing_a_tree_says_is_above_asserted(server):
    assert max(one.assurance for one in server.capabilities) is Assurance.ASSERTED
    for one in server.capabilities:
        if one.status in (Status.NOT_MET, Status.NOT_PROBED):
            assert one.assurance is Assurance.NONE
        if one.status is Status.DECLARED:
            assert one.assurance is Assurance.DECLARED


def test_a_tree_alone_may_host_nothing_and_says_that_an_authority_is_what_is_missing(server):
    for case in server.use_cases:
        assert not case.may_host
        assert "enrol" in {change.id for change in case.roadmap}
    assert [change.id for change in server.use_case("4.4").roadmap] == ["enrol", "reference-values", "location-tag"]


def test_a_verified_result_lifts_what_it_is_about(tmp_path):
    root = machines.write(tmp_path, machines.server())
    names = ("boot.measured", "boot.kernel.identity", "ima.measurement", "integrity.runtime")
    levels = [CapabilityLevel(capability=name, level=Assurance.MEASURED) for name in names]
    levels.append(CapabilityLevel(capability="location.geo", level=Assurance.ASSERTED, value="EU/DE"))
    found = assessed(root, levels)
    assert found.use_case("4.7").may_host
    assert found.use_case("4.7").roadmap == ()
    assert found.use_case("4.5").missing
    assert "enrol" not in {change.id for change in found.use_case("4.5").roadmap}
    assert found.capability("location.geo").status is Status.MET


def test_a_laptop(tmp_path):
    found = assessed(machines.write(tmp_path, machines.laptop()))
    reasons = {one.id: one.reason for one in found.capabilities}
    assert "setup mode" in reasons["boot.secure.enforced"]
    assert "not locked down" in reasons["kernel.lockdown"]
    assert "enforces no profile" in reasons["osac.lsm"]
    assert "one factor" in reasons["auth.admin.mfa"]
    assert "2 of 2 are open" in reasons["cpu.vulnerabilities.mitigated"]
    assert "/dev/mem" in found.capability("mem.inspection.host_blocked").value
    assert "/proc/kcore" in found.capability("mem.inspection.host_blocked").value
    assert found.approach == "none"


def test_the_tpm_of_a_guest_is_virtual(tmp_path):
    found = assessed(machines.write(tmp_path, machines.guest()))
    assert found.capability("root.tpm20.hardware").status is Status.NOT_MET
    virtual = found.capability("root.tpm20.virtual")
    assert (virtual.status, virtual.root, virtual.assurance) == (Status.MET, EvidenceRoot.VIRTUAL, Assurance.ASSERTED)


def test_a_container_does_not_see_and_says_so(tmp_path):
    found = assessed(machines.write(tmp_path, machines.container()))
    for name in ("kernel.lockdown", "osac.lsm", "ima.measurement"):
        assert found.capability(name).status is Status.NOT_PROBED
        assert "securityfs" in found.capability(name).reason


REAL_LOGS = ("gce-ubuntu-2404-amd-sevsnp", "gce-rhel8-uefi", "coreos36-no-secure-boot", "keylime-mb-secureboot", "gdc-host")


@pytest.mark.parametrize("name", REAL_LOGS)
def test_the_boot_logs_of_real_machines_are_read(name, tmp_path, shared):
    case = shared / "vectors" / "eventlog" / name
    told = json.loads((case / "case.json").read_text())
    data = (case / told["evidence"][0]["file"]).read_bytes()
    files = machines.laptop() | {"/sys/kernel/security/tpm0/binary_bios_measurements": data}
    found = assessed(machines.write(tmp_path, files))
    for capability in ("boot.measured", "boot.kernel.identity"):
        assert found.capability(capability).status is Status.MET
        assert found.capability(capability).assurance is Assurance.ASSERTED


def test_an_empty_tree_meets_nothing(tmp_path):
    found = assessed(tmp_path)
    assert {one.status for one in found.capabilities} <= {Status.NOT_MET, Status.NOT_PROBED}
    assert {one.status for one in found.measures} <= {Status.NOT_MET, Status.NOT_PROBED, Status.SERVICE}
    assert found.approach == "none"
    assert all(one.reason for one in found.capabilities)


def test_hostile_contents_meet_nothing_and_keep_nobody_waiting(tmp_path):
    found = assessed(machines.hostile(tmp_path))
    said = status(found)
    for name in (
        "kernel.lockdown", "osac.lsm", "boot.measured", "hmee.sev_snp", "auth.admin.mfa", "people.vetted.*",
        "root.tpm20.hardware",
        "cpu.vulnerabilities.mitigated", "fs.root.readonly", "storage.encryption.host", "net.sriov", "hmee.slots.free",
    ):  # fmt: skip
        assert said[name] in ("not_met", "not_probed"), name
    everything = repr(found.capabilities)
    assert "\\x1b" not in everything
    assert "\\x07" not in everything
    assert not [one for one in found.capabilities if "the probe '" in (one.reason or "")]


def test_a_link_leads_nowhere_but_below_the_root(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("outside")
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    (root / "inside").write_text("inside")
    for name, target in (("absolute", str(secret)), ("up", "../../secret"), ("fine", "/inside"), ("far", "../../../inside")):
        (root / "etc" / name).symlink_to(target)
    tree = Tree(root)
    assert tree.read("/etc/absolute").state is State.ABSENT
    assert tree.read("/etc/up").state is State.ABSENT
    assert tree.read("/etc/fine").text == "inside"
    assert tree.read("/etc/far").text == "inside"
    assert tree.read("/etc/../../../../secret").state is State.ABSENT


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_what_may_not_be_read_is_not_probed(tmp_path):
    denied(tmp_path)


def denied(root):
    machines.write(root, machines.server())
    for name in ("/sys/kernel/security/lockdown", "/sys/module/kvm_amd/parameters/sev_snp", "/etc/ssh/sshd_config"):
        (root / name.lstrip("/")).chmod(0)
    found = assessed(root)
    for name in ("kernel.lockdown", "hmee.sev_snp", "auth.admin.mfa"):
        assert found.capability(name).status is Status.NOT_PROBED
        assert "root only" in found.capability(name).reason


def test_a_denied_file_is_not_probed_for_an_unprivileged_user_too(tmp_path):
    """As root the same is tried in a child that gave its rights away."""
    if os.geteuid() != 0:
        pytest.skip("this process is unprivileged itself")
    for path in (tmp_path, *tmp_path.parents):
        if path.stat().st_uid == 0 and len(path.parts) > 2 and not path.stat().st_mode & stat.S_IXOTH:
            path.chmod(path.stat().st_mode | stat.S_IXOTH | stat.S_IROTH)
    tree = tmp_path / "tree"
    tree.mkdir(mode=0o777)
    tree.chmod(0o777)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setgid(65534)
            os.setuid(65534)
            denied(tree)
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("path", sorted(machines.server()))
def test_taking_any_file_away_never_adds_anything(path, tmp_path, server):
    files = machines.server()
    del files[path]
    found = assessed(machines.write(tmp_path, files))
    before, after = status(server), status(found)
    gained = {name for name in after if after[name] == "met" and before[name] != "met"}
    # Where the hardware says nothing of being a machine of its own, it is still no guest; no other file may add.
    assert gained <= {"kernel.module_signing", "fs.root.readonly"}, gained


CONTENTS = st.one_of(st.binary(max_size=300), st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_contents_of_any_file_break_no_probe(data, tmp_path_factory):
    files = machines.server()
    for path in data.draw(st.lists(st.sampled_from(sorted(files)), min_size=1, max_size=6, unique=True)):
        files[path] = data.draw(CONTENTS)
    found = assessed(machines.write(tmp_path_factory.mktemp("odd"), files))
    assert not [one.reason for one in found.capabilities if "the probe '" in (one.reason or "")]
    assert max(one.assurance for one in found.capabilities) <= Assurance.ASSERTED
    for one in found.capabilities:
        assert all(line.isprintable() for line in (*one.evidence, one.value or "", one.reason or ""))


def test_a_probe_that_breaks_costs_its_own_answer_only(tmp_path, monkeypatch):
    def broken(tree, now):
        raise ZeroDivisionError

    probes = tuple(
        machine.Probe(noun=one.noun, capabilities=one.capabilities, run=broken) if one.noun == "boot" else one
        for one in machine.PROBES
    )
    monkeypatch.setattr(machine, "PROBES", probes)
    found = assessed(machines.write(tmp_path, machines.server()))
    assert found.capability("boot.measured").status is Status.NOT_PROBED
    assert "broke" in found.capability("boot.measured").reason
    assert found.capability("kernel.lockdown").status is Status.MET


def test_a_probe_that_claims_more_is_capped():
    claimed = [
        Observation(capability=name, status=Status.MET, seen=Assurance.HW_ATTESTED, root=root)
        for name, root in (("boot.measured", EvidenceRoot.SOFTWARE), ("location.jurisdiction", EvidenceRoot.HARDWARE))
    ]
    found = assess(claimed, host="h", at=NOW, privileged=True)
    assert found.capability("boot.measured").assurance is Assurance.ASSERTED
    assert found.capability("location.jurisdiction").assurance is Assurance.DECLARED


def test_a_statement_needs_two_people_and_an_end(tmp_path):
    good = machines.server()["/etc/moorline/statements.toml"]
    for name, text in {
        "one person twice": good.replace('"B. Berg"', '"a. ahn "'),
        "past its end": good.replace("2031", "2020"),
        "no zone": good.replace("T00:00:00Z", "T00:00:00"),
        "no end": good.replace("not_after", "until"),
        "no toml": good + "[[[",
    }.items():
        root = machines.write(tmp_path / name.replace(" ", "_"), {"/etc/moorline/statements.toml": text})
        assert assessed(root).capability("people.vetted.*").status is Status.NOT_MET, name
    root = machines.write(tmp_path / "good", {"/etc/moorline/statements.toml": good})
    assert assessed(root).capability("people.vetted.*").status is Status.DECLARED


@pytest.mark.parametrize(
    ("config", "met"),
    [
        ("AuthenticationMethods publickey,password\n", True),
        ("authenticationmethods=publickey,keyboard-interactive:pam\n", True),
        ("AuthenticationMethods publickey,password publickey\n", False),
        ("AuthenticationMethods publickey,publickey\n", False),
        ("AuthenticationMethods any\n", False),
        ("AuthenticationMethods publickey,password\nMatch User root\nAuthenticationMethods publickey\n", False),
        ("Match User x\nAuthenticationMethods publickey,password\n", False),
        ("AuthenticationMethods publickey\nAuthenticationMethods publickey,password\n", False),
        ("# AuthenticationMethods publickey,password\n", False),
    ],
)
def test_what_sshd_asks_for(config, met, tmp_path):
    root = machines.write(tmp_path, {"/etc/ssh/sshd_config": config})
    assert (assessed(root).capability("auth.admin.mfa").status is Status.MET) is met


def test_included_files_count_where_they_are_included(tmp_path):
    files = {
        "/etc/ssh/sshd_config": "Include sshd_config.d/*.conf\nAuthenticationMethods publickey,password\n",
        "/etc/ssh/sshd_config.d/10.conf": "AuthenticationMethods publickey\n",
    }
    assert assessed(machines.write(tmp_path, files)).capability("auth.admin.mfa").status is Status.NOT_MET


def test_measures_are_table_11_and_name_who_meets_them(server):
    assert [one.id for one in server.measures] == [f"6.{number}" for number in range(1, 22)]
    for one in server.measures:
        rule = measure_rules()[one.id]
        if one.status is Status.SERVICE:
            assert one.by == tuple(f"service:{name}" for name in rule.services)
            assert rule.services
        elif one.status in (Status.MET, Status.DECLARED):
            for clause in rule.clauses:
                assert set(clause) & set(one.by), one.id
