"""The SNP firmware of a SIMULATED chip: launch, launch digest, attestation report. Spec-exact, under a false root.

It keeps to what the real firmware does and refuses (56860): the launch digest is the PAGE_INFO chain of SNP_LAUNCH_UPDATE
(verification.snp_launch) over the pages of the image, starting from zero; a report can be asked for only by the guest that
it is about; policy, HOST_DATA and digest are fixed at the end of the launch. What it lacks: memory encryption. A host that
reads this guest's memory succeeds; that is what SIMULATED means.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from moorline.evidence import snp as evidence
from moorline.evidence.snp import CertificateTable, GuestPolicy, Product, SnpReport
from moorline.simulators.manufacturer import Chip
from moorline.wire.silicon import ReportAnswer

IMAGE_GPA: Final = 0x0010_0000
"""Guest-physical address at which the image's pages are measured."""

_BASE_POLICY: Final = (1 << 17) | (1 << 16) | (1 << 8)  # reserved-one, SMT allowed, ABI at least 1.0
_DEBUG: Final = 1 << 19
_CPUID: Final = {Product.MILAN: (0x19, 0x01, 1), Product.GENOA: (0x19, 0x11, 1), Product.TURIN: (0x1A, 0x02, 1)}
_FIRMWARE: Final = (1, 55, 25)


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestContext:
    """What the firmware keeps of a launched guest (56860 4.1.3): fixed for the guest's life."""

    measurement: bytes
    host_data: bytes
    policy: GuestPolicy
    report_id: bytes


def guest_policy(*, debug: bool) -> GuestPolicy:
    """The policy of a launch here: SMT allowed, no migration agent, ABI 1.0, debug as asked."""
    return GuestPolicy(raw=_BASE_POLICY | (_DEBUG if debug else 0))


class Silicon:
    """The firmware of one chip. It signs reports about guests whose context it is handed, and nothing else."""

    def __init__(self, chip: Chip, *, report_version: int = 3) -> None:
        self.chip = chip
        self._version = report_version

    def report(self, guest: GuestContext, report_data: bytes) -> ReportAnswer:
        """What SNP_GUEST_REQUEST(MSG_REPORT_REQ) and the host's certificates give a guest through configfs-tsm."""
        return ReportAnswer(
            provider="sev_guest",
            outblob=evidence.serialize_report(self.signed(self.unsigned_report(guest, report_data))),
            auxblob=self.certificates(),
        )

    def certificates(self) -> bytes:
        """The GHCB certificate table that the host would hand out: VCEK, ASK, ARK."""
        chip = self.chip
        entries = ((evidence.VCEK_GUID, chip.vcek), (evidence.ASK_GUID, chip.ask), (evidence.ARK_GUID, chip.ark))
        return evidence.serialize_certificate_table(CertificateTable(entries=entries))

    def unsigned_report(self, guest: GuestContext, report_data: bytes) -> SnpReport:
        """The report without its signature; tests change fields of it before they sign, to make bad twins."""
        tcb = self.chip.tcb.raw()
        family, model, stepping = _CPUID[self.chip.product]
        named, vectors = self._version >= 3, self._version >= 5
        return SnpReport(
            version=self._version,
            guest_svn=0,
            policy=guest.policy,
            family_id=bytes(16),
            image_id=bytes(16),
            vmpl=0,
            signature_algo=evidence.ECDSA_P384_SHA384,
            current_tcb=tcb,
            platform_info=0b10_0101 if named else 0b101,  # SMT, ECC, and from version 3 on the alias check
            signer_info=0,
            report_data=report_data,
            measurement=guest.measurement,
            host_data=guest.host_data,
            id_key_digest=bytes(48),
            author_key_digest=bytes(48),
            report_id=guest.report_id,
            report_id_ma=b"\xff" * 32,
            reported_tcb=tcb,
            cpuid_fam_id=family if named else None,
            cpuid_mod_id=model if named else None,
            cpuid_step=stepping if named else None,
            chip_id=self.chip.chip_id,
            committed_tcb=tcb,
            current_version=_FIRMWARE,
            committed_version=_FIRMWARE,
            launch_tcb=tcb,
            launch_mit_vector=0 if vectors else None,
            current_mit_vector=0 if vectors else None,
            signature_r=0,
            signature_s=0,
        )

    def signed(self, report: SnpReport) -> SnpReport:
        """`report` under the chip's VCEK."""
        signed = evidence.serialize_report(report)[: evidence.SIGNED_BYTES]
        r, s = decode_dss_signature(self.chip.key.sign(signed, ec.ECDSA(hashes.SHA384())))
        return replace(report, signature_r=r, signature_s=s)
