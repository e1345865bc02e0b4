"""Fake trees of machines: what their kernels would show, file by file."""

import os
from pathlib import Path

from moorline.evidence.ima import ImaEntry, serialize_line
from moorline.simulators import firmware

GLOBAL = "8be4df61-93ca-11d2-aa0d-00e098032b8c"
MOUNT = "{number} 1 {device} / {point} {options} shared:1 - {kind} {source} rw\n"


def mounts(*rows):
    return "".join(
        f"{20 + number} 1 {device} / {point} {options},relatime shared:1 - {kind} {source} rw\n"
        for number, (device, point, options, kind, source) in enumerate(rows)
    )


def ima_list(count=5):
    import hashlib

    lines = []
    for number in range(count):
        digest = hashlib.sha256(str(number).encode()).digest()
        path = b"boot_aggregate" if number == 0 else f"/usr/bin/tool{number}".encode()
        fields = (
            len(b"sha256:\0" + digest).to_bytes(4, "little")
            + b"sha256:\0"
            + digest
            + (len(path) + 1).to_bytes(4, "little")
            + path
            + b"\0"
        )
        lines.append(
            serialize_line(
                ImaEntry(
                    pcr=10,
                    template_hash=hashlib.sha1(fields).digest(),
                    template="ima-ng",
                    algorithm="sha256",
                    digest=digest,
                    path=path,
                    extra=b"",
                )
            )
        )
    return b"\n".join(lines) + b"\n"


VULNERABILITIES = {
    "meltdown": "Not affected",
    "spectre_v2": "Mitigation: Enhanced / Automatic IBRS",
    "mds": "Not affected",
}

HARDENED = {
    "kernel/kptr_restrict": "2",
    "kernel/dmesg_restrict": "1",
    "kernel/kexec_load_disabled": "1",
    "kernel/unprivileged_bpf_disabled": "1",
    "net/core/bpf_jit_harden": "2",
    "kernel/yama/ptrace_scope": "3",
    "kernel/randomize_va_space": "2",
    "fs/suid_dumpable": "0",
    "fs/protected_hardlinks": "1",
    "fs/protected_symlinks": "1",
    "fs/protected_fifos": "2",
    "fs/protected_regular": "2",
    "kernel/sysrq": "0",
    "kernel/perf_event_paranoid": "3",
}


def server():
    """A server as well configured as files can show: SEV-SNP, TPM, Secure Boot, lockdown, verity root, two factors."""
    word = "lockdown=confidentiality module.sig_enforce=1 ima_policy=tcb|appraise_tcb ima_appraise=enforce init_on_free=1"
    return {
        "/proc/sys/kernel/hostname": "server-1\n",
        "/proc/sys/kernel/osrelease": "6.1.0-40-amd64\n",
        "/proc/cmdline": f"BOOT_IMAGE=/vmlinuz root=/dev/dm-0 roothash=ab12 {word} amd_iommu=on\n",
        "/proc/cpuinfo": "processor\t: 0\nflags\t\t: fpu sev sev_es sev_snp rdseed rdrand\n",
        "/proc/modules": "kvm 1 0 - Live 0x0\n",
        "/proc/swaps": "Filename\tType\tSize\tUsed\tPriority\n",
        "/proc/self/mountinfo": mounts(
            ("253:0", "/", "ro", "ext4", "/dev/mapper/root"),
            ("253:1", "/var", "rw", "ext4", "/dev/mapper/var"),
        ),
        **{f"/proc/sys/{name}": f"{value}\n" for name, value in HARDENED.items()},
        "/sys/class/dmi/id/sys_vendor": "Supermicro\n",
        "/sys/kernel/security/tpm0/binary_bios_measurements": firmware.serialize_log(firmware.boot_events(firmware.GOOD)),
        "/sys/kernel/security/lockdown": "none integrity [confidentiality]\n",
        "/sys/kernel/security/lsm": "lockdown,capability,selinux\n",
        "/sys/kernel/security/ima/ascii_runtime_measurements": ima_list(),
        "/sys/kernel/security/ima/runtime_measurements_count": "5\n",
        "/sys/kernel/security/ima/policy": "measure func=BPRM_CHECK\nappraise func=BPRM_CHECK\n",
        "/sys/fs/selinux/enforce": "1",
        "/sys/module/module/parameters/sig_enforce": "Y\n",
        "/sys/module/kvm_amd/parameters/sev": "Y\n",
        "/sys/module/kvm_amd/parameters/sev_es": "Y\n",
        "/sys/module/kvm_amd/parameters/sev_snp": "Y\n",
        "/sys/fs/cgroup/misc.capacity": "sev 410\nsev_es 99\n",
        "/sys/fs/cgroup/misc.current": "sev 0\nsev_es 3\n",
        f"/sys/firmware/efi/efivars/SecureBoot-{GLOBAL}": b"\x06\0\0\0\x01",
        f"/sys/firmware/efi/efivars/SetupMode-{GLOBAL}": b"\x06\0\0\0\x00",
        "/sys/firmware/acpi/tables/IVRS": b"IVRS",
        "/sys/class/tpm/tpm0/tpm_version_major": "2\n",
        "/sys/class/tpm/tpm0/device/description": "TPM 2.0 Device\n",
        **{f"/sys/devices/system/cpu/vulnerabilities/{name}": f"{said}\n" for name, said in VULNERABILITIES.items()},
        "/sys/devices/system/cpu/smt/control": "off\n",
        "/sys/devices/system/cpu/smt/active": "0\n",
        "/sys/kernel/iommu_groups/0/devices/0000:00:01.0/uevent": "",
        "/sys/class/net/ens1/device/sriov_totalvfs": "64\n",
        "/sys/dev/block/253:0/dm/uuid": "CRYPT-VERITY-0123-root\n",
        "/sys/dev/block/253:0/slaves/dm-2": "",
        "/sys/block/dm-2/dm/uuid": "CRYPT-LUKS2-0123-crypt\n",
        "/sys/dev/block/253:1/dm/uuid": "CRYPT-LUKS2-4567-var\n",
        "/sys/block/nvme0n1/queue/rotational": "0\n",
        "/sys/block/nvme0n1/queue/discard_max_bytes": "2199023255040\n",
        "/sys/class/misc/hw_random/rng_current": "ccp-1-rng\n",
        "/sys/class/misc/hw_random/rng_quality": "1024\n",
        "/sys/class/hwmon/hwmon0/intrusion0_alarm": "0\n",
        "/sys/kernel/kexec_crash_loaded": "0\n",
        "/sys/kernel/mm/ksm/run": "0\n",
        "/sys/fs/resctrl/schemata": "L3:0=fff\n",
        "/run/systemd/netif/lldp/2": b"\x02lldp",
        "/usr/share/p11-kit/modules/softhsm2.module": "module: libsofthsm2.so\n",
        "/var/lib/softhsm/tokens/a/token.object": b"",
        "/etc/ssh/sshd_config": (
            "Include /etc/ssh/sshd_config.d/*.conf\nAuthenticationMethods publickey,keyboard-interactive\n"
            "PermitRootLogin no\n"
        ),
        "/etc/moorline/statements.toml": "".join(
            f'[[statement]]\ncapability = "{name}"\nvalue = "{value}"\n'
            'by = ["A. Ahn", "B. Berg"]\nnot_after = "2031-01-01T00:00:00Z"\n'
            for name, value in (("people.vetted.host_admin", "vetted, level 2"), ("location.jurisdiction", "DE"))
        ),
    }


def laptop():
    """A laptop as it is sold: Secure Boot and a TPM, and nothing else turned on."""
    return {
        "/proc/sys/kernel/hostname": "laptop\n",
        "/proc/sys/kernel/osrelease": "6.1.0-40-amd64\n",
        "/proc/sys/kernel/core_pattern": "core\n",
        "/proc/cmdline": "BOOT_IMAGE=/vmlinuz root=UUID=1 ro quiet splash\n",
        "/proc/cpuinfo": "processor\t: 0\nflags\t\t: fpu vmx rdseed\n",
        "/proc/modules": "i915 1 0 - Live 0x0\n",
        "/proc/swaps": "Filename\tType\tSize\tUsed\tPriority\n/dev/nvme0n1p3 partition 1 0 -2\n",
        "/proc/kcore": b"",
        "/proc/self/mountinfo": mounts(("259:2", "/", "rw", "ext4", "/dev/nvme0n1p2")),
        "/dev/mem": b"",
        "/sys/class/dmi/id/sys_vendor": "LENOVO\n",
        "/sys/kernel/security/lockdown": "[none] integrity confidentiality\n",
        "/sys/kernel/security/lsm": "lockdown,capability,apparmor\n",
        "/sys/kernel/security/apparmor/profiles": "cupsd (complain)\n",
        "/sys/module/apparmor/parameters/enabled": "Y\n",
        "/sys/module/module/parameters/sig_enforce": "N\n",
        f"/sys/firmware/efi/efivars/SecureBoot-{GLOBAL}": b"\x06\0\0\0\x01",
        f"/sys/firmware/efi/efivars/SetupMode-{GLOBAL}": b"\x06\0\0\0\x01",
        "/sys/class/tpm/tpm0/tpm_version_major": "2\n",
        "/sys/devices/system/cpu/vulnerabilities/mds": "Mitigation: Clear CPU buffers; SMT vulnerable\n",
        "/sys/devices/system/cpu/vulnerabilities/tomorrow": "A word nobody knows yet\n",
        "/sys/block/nvme0n1/queue/rotational": "0\n",
        "/etc/ssh/sshd_config": "PasswordAuthentication yes\n",
    }


def guest():
    """A guest: its TPM is its hypervisor's."""
    return {
        **laptop(),
        "/proc/sys/kernel/hostname": "guest\n",
        "/proc/cpuinfo": "processor\t: 0\nflags\t\t: fpu hypervisor rdseed\n",
        "/sys/class/dmi/id/sys_vendor": "QEMU\n",
        "/sys/class/misc/hw_random/rng_current": "virtio_rng.0\n",
    }


def container():
    """A container: the host's kernel behind a curtain, no securityfs, an overlay as root."""
    return {
        "/.dockerenv": "",
        "/proc/sys/kernel/hostname": "3f2a\n",
        "/proc/sys/kernel/osrelease": "6.1.0-40-cloud-amd64\n",
        "/proc/cmdline": "root=/dev/vda1 ro\n",
        "/proc/cpuinfo": "processor\t: 0\nflags\t\t: fpu hypervisor\n",
        "/proc/modules": "overlay 1 0 - Live 0x0\n",
        "/proc/self/mountinfo": mounts(("0:52", "/", "rw", "overlay", "overlay")),
        "/sys/kernel/uevent_seqnum": "1\n",
    }


def write(root: Path, files) -> Path:
    for name, content in files.items():
        path = root / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def hostile(root: Path) -> Path:
    """Where files are expected there are FIFOs, devices, rings of links, huge files, binary, names that lie."""
    write(root, server())

    def instead(name, make):
        path = root / name.lstrip("/")
        path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        make(path)

    instead("/sys/kernel/security/lockdown", os.mkfifo)
    instead("/sys/fs/selinux/enforce", lambda path: path.symlink_to("enforce"))
    instead("/proc/cpuinfo", lambda path: path.write_bytes(os.urandom(1 << 16)))
    instead("/sys/kernel/security/tpm0/binary_bios_measurements", lambda path: path.write_bytes(os.urandom(4096)))
    instead("/sys/module/kvm_amd/parameters/sev_snp", lambda path: path.symlink_to("/dev/zero"))
    instead("/etc/ssh/sshd_config", lambda path: path.write_text("Include /etc/ssh/sshd_config\n" * 3))
    instead("/etc/moorline/statements.toml", lambda path: path.write_bytes(b"[[statement]]\n" * 20000))
    instead("/sys/class/tpm/tpm0/tpm_version_major", lambda path: path.symlink_to("/etc/hostname"))
    instead(
        "/sys/class/misc/hw_random/rng_current",
        lambda path: path.write_text("\x1b]0;owned\x07\x1b[2J<script>alert(1)</script>"),
    )
    instead("/proc/sys/kernel/hostname", lambda path: path.write_text("</title><script>x</script>\x1b[31m"))
    instead("/sys/devices/system/cpu/vulnerabilities/huge", lambda path: path.write_bytes(b"Not affected " * (1 << 20)))
    instead("/sys/kernel/security/ima/runtime_measurements_count", lambda path: path.write_text("9" * 5000))
    instead("/proc/self/mountinfo", lambda path: path.write_text("not a mount\n - - -\n1 2 3\n" + "x" * 70000))
    instead("/sys/fs/cgroup/misc.capacity", lambda path: path.write_text("sev " + "9" * 400 + "\nsev_es -1\ntdx\n"))
    instead("/sys/class/net/ens1/device/sriov_totalvfs", lambda path: path.write_text("٣"))  # a digit, but not ours
    return root
