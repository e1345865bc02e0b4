"""Intel under a false root: a PCK authority, a TCB signer, a platform and its quoting enclave, which sign, chain and expire.

A test changes one attribute of `FakeIntel` and asks for evidence: the bad twin is always one line away from the good one.
"""

import hashlib
import json
from datetime import timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.x509.oid import NameOID

from moorline.clock import Instant, to_datetime
from moorline.evidence.dcap_quote import CertificationData, EnclaveReport, QuoteHeader, QuoteSignature, TeeType
from moorline.evidence.intel_collateral import SignedDocument
from moorline.evidence.sgx_quote import SgxQuote
from moorline.evidence.tdx_quote import TdReport, TdxQuote
from moorline.rats import EvidenceRoot
from moorline.verification.intel_collateral import Collateral, IntelEndorsements
from moorline.verification.intel_pck import IntelAnchor, IntelAnchors
from moorline.verification.intel_quote import INTEL_QE_VENDOR
from moorline.verification.sgx import verify_sgx
from moorline.verification.tdx import verify_tdx

NOW = Instant(1_800_000_000)
DAY = 86400
SGX_OID = "1.2.840.113741.1.13.1"
QE_SIGNER = hashlib.sha256(b"false Intel").digest()
REPORT_DATA = hashlib.sha512(b"challenge").digest()


def der(tag, *contents):
    body = b"".join(contents)
    size = len(body)
    length = (
        bytes([size])
        if size < 0x80
        else bytes([0x80 + (size.bit_length() + 7) // 8]) + size.to_bytes((size.bit_length() + 7) // 8, "big")
    )
    return bytes([tag]) + length + body


def der_int(value, tag=0x02):
    return der(tag, value.to_bytes(value.bit_length() // 8 + 1, "big"))


def der_oid(dotted):
    first, second, *rest = (int(arc) for arc in dotted.split("."))
    out = b""
    for arc in (first * 40 + second, *rest):
        groups = [arc & 0x7F]
        while arc := arc >> 7:
            groups.append(arc & 0x7F | 0x80)
        out += bytes(reversed(groups))
    return der(0x06, out)


def part(number, value, prefix=SGX_OID):
    return der(0x30, der_oid(f"{prefix}.{number}"), value)


def raw_signature(key, data):
    r, s = decode_dss_signature(key.sign(data, ec.ECDSA(hashes.SHA256())))
    return r.to_bytes(32, "big") + s.to_bytes(32, "big")


def raw_point(key):
    numbers = key.public_key().public_numbers()
    return numbers.x.to_bytes(32, "big") + numbers.y.to_bytes(32, "big")


def new_key():
    return ec.generate_private_key(ec.SECP256R1())


def spki(key):
    return key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def stamp(at):
    return to_datetime(at).strftime("%Y-%m-%dT%H:%M:%SZ")


class FakeIntel:
    """See the module. Everything is public and meant to be changed before evidence is asked for."""

    def __init__(self, keys, tee="tdx"):
        self.keys = dict(keys)
        self.tee = tee
        self.version = 5 if tee == "tdx" else 3
        self.now = NOW
        self.not_before, self.not_after = NOW - 100 * DAY, NOW + 100 * DAY
        self.names = {
            "root": "Intel SGX Root CA",
            "ca": "Intel SGX PCK Platform CA",
            "pck": "Intel SGX PCK Certificate",
            "signer": "Intel SGX TCB Signing",
        }
        self.issuers = {"root": "root", "ca": "root", "pck": "ca", "signer": "root"}
        self.is_ca = {"root": True, "ca": True, "pck": False, "signer": False}
        self.serials = {"root": 1, "ca": 2, "pck": 3, "signer": 4}
        self.revoked = {"root": [], "ca": []}
        self.components = [5] * 16
        self.pce_svn = 11
        self.fmspc, self.pce_id = bytes.fromhex("00A1B2C3D4E5"), b"\x00\x00"
        self.ppid = bytes(range(16))
        self.vendor = INTEL_QE_VENDOR
        self.certification = None
        self.attestation_public = None
        self.qe_report_data = None
        self.qe = {"mr_signer": QE_SIGNER, "isv_prod_id": 2, "isv_svn": 7, "attributes": 0x11, "misc_select": 0}
        self.debug = False
        self.report = {}
        self.td15 = True
        self.levels = [self.level(), self.level(svn=4, status="OutOfDate", advisories=["INTEL-SA-00001"])]
        self.modules = [self.module(1, 3), self.module(3, 3)]
        self.qe_levels = [self.isv(7), self.isv(5, "OutOfDate", ["INTEL-SA-00002"])]
        self.tcb_info, self.qe_identity = {}, {}
        self.issued, self.next_update = NOW - DAY, NOW + DAY
        self.crl_next = {"root": NOW + DAY, "ca": NOW + DAY}
        self.crl_last = {"root": NOW - DAY, "ca": NOW - DAY}
        self.roots = ("root",)

    # ---- statements

    def level(self, svn=5, pce=11, tdx=3, status="UpToDate", advisories=()):
        tcb = {"sgxtcbcomponents": [{"svn": svn}] * 16, "pcesvn": pce}
        if self.tee == "tdx":
            tcb["tdxtcbcomponents"] = [{"svn": tdx}] * 3 + [{"svn": 0}] * 13
        return {"tcb": tcb, "tcbDate": stamp(NOW), "tcbStatus": status, "advisoryIDs": list(advisories)}

    def isv(self, svn, status="UpToDate", advisories=()):
        return {"tcb": {"isvsvn": svn}, "tcbDate": stamp(NOW), "tcbStatus": status, "advisoryIDs": list(advisories)}

    def module(self, version, *svns):
        levels = [self.isv(svns[0])] + [self.isv(svn, "OutOfDate") for svn in svns[1:]]
        return {
            "id": f"TDX_{version:02X}",
            "mrsigner": "00" * 48,
            "attributes": "00" * 8,
            "attributesMask": "FF" * 8,
            "tcbLevels": levels,
        }

    def tcb_info_body(self):
        body = {
            "id": self.tee.upper(),
            "version": 3,
            "issueDate": stamp(self.issued),
            "nextUpdate": stamp(self.next_update),
            "fmspc": self.fmspc.hex(),
            "pceId": self.pce_id.hex(),
            "tcbType": 0,
            "tcbEvaluationDataNumber": 17,
            "tcbLevels": self.levels,
        }
        if self.tee == "tdx":
            body["tdxModule"] = {name: value for name, value in self.module(0, 0).items() if name not in ("id", "tcbLevels")}
            body["tdxModuleIdentities"] = self.modules
        return json.dumps(body | self.tcb_info).encode()

    def qe_identity_body(self):
        body = {
            "id": "TD_QE" if self.tee == "tdx" else "QE",
            "version": 2,
            "issueDate": stamp(self.issued),
            "nextUpdate": stamp(self.next_update),
            "tcbEvaluationDataNumber": 17,
            "miscselect": "00000000",
            "miscselectMask": "FFFFFFFF",
            "attributes": "11" + "00" * 15,
            "attributesMask": "FBFFFFFFFFFFFFFF" + "00" * 8,
            "mrsigner": QE_SIGNER.hex(),
            "isvprodid": 2,
            "tcbLevels": self.qe_levels,
        }
        return json.dumps(body | self.qe_identity).encode()

    def signed(self, body):
        return SignedDocument(body=body, signature=raw_signature(self.keys["signer"], body), chain=self.chain("signer"))

    def endorsements(self, **changes):
        given = {
            "tcb_info": self.signed(self.tcb_info_body()),
            "qe_identity": self.signed(self.qe_identity_body()),
            "pck_crl": self.crl("ca"),
            "root_crl": self.crl("root"),
        }
        return IntelEndorsements(**given | changes)

    # ---- certificates

    def name(self, who):
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, self.names[who])])

    def certificate(self, who):
        issuer = self.issuers[who]
        ca = self.is_ca[who]
        builder = (
            x509.CertificateBuilder()
            .subject_name(self.name(who))
            .issuer_name(self.name(issuer))
            .public_key(self.keys[who].public_key())
            .serial_number(self.serials[who])
            .not_valid_before(to_datetime(self.not_before))
            .not_valid_after(
                to_datetime(self.not_after)
                if who in ("pck", "signer")
                else to_datetime(self.not_after) + timedelta(days=900)
            )
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(usage(ca=ca), critical=True)
        )
        if who == "pck":
            builder = builder.add_extension(
                x509.UnrecognizedExtension(x509.ObjectIdentifier(SGX_OID), self.sgx_extension()), critical=False
            )
        signing = self.keys.get(f"{who} signed by", self.keys[issuer])
        return builder.sign(signing, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def sgx_extension(self):
        tcb = [part(number + 1, der_int(value), f"{SGX_OID}.2") for number, value in enumerate(self.components)]
        tcb += [
            part(17, der_int(self.pce_svn), f"{SGX_OID}.2"),
            part(18, der(0x04, bytes(value & 0xFF for value in self.components).ljust(16)), f"{SGX_OID}.2"),
        ]
        configuration = [part(number, der(0x01, b"\xff"), f"{SGX_OID}.7") for number in (1, 2, 3)]
        return der(
            0x30,
            part(1, der(0x04, self.ppid)),
            part(2, der(0x30, *tcb)),
            part(3, der(0x04, self.pce_id)),
            part(4, der(0x04, self.fmspc)),
            part(5, der_int(1, 0x0A)),
            part(6, der(0x04, bytes(16))),
            part(7, der(0x30, *configuration)),
        )

    def chain(self, who):
        return b"".join(self.certificate(one) for one in ((who, "ca", "root") if who == "pck" else (who, "root")))

    def crl(self, who):
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.name(who))
            .last_update(to_datetime(self.crl_last[who]))
            .next_update(to_datetime(self.crl_next[who]))
            .add_extension(x509.CRLNumber(1), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.keys[who].public_key()), critical=False)
        )
        for serial in self.revoked[who]:
            entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(to_datetime(NOW)).build()
            builder = builder.add_revoked_certificate(entry)
        key = self.keys.get(f"{who} crl", self.keys[who])
        return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)

    @property
    def anchors(self):
        return IntelAnchors(
            anchors=tuple(IntelAnchor(public_key=spki(self.keys[one]), root=EvidenceRoot.TEST) for one in self.roots)
        )

    # ---- evidence

    def quote(self):
        sgx = self.tee == "sgx"
        header = QuoteHeader(
            version=self.version,
            attestation_key_type=2,
            tee_type=TeeType.SGX if sgx else TeeType.TDX,
            qe_svn=9 if sgx else 0,
            pce_svn=14 if sgx else 0,
            qe_vendor_id=self.vendor,
            user_data=bytes(20),
        )
        unsigned = self.sgx_quote(header, None) if sgx else self.tdx_quote(header, None)
        public = self.attestation_public or raw_point(self.keys["attestation"])
        auth = bytes(range(32))
        bound = self.qe_report_data or hashlib.sha256(public + auth).digest() + bytes(32)
        qe_report = enclave_report(report_data=bound, **self.qe)
        signature = QuoteSignature(
            signature=raw_signature(self.keys.get("quote signed by", self.keys["attestation"]), unsigned.signed()),
            attestation_key=public,
            qe_report=qe_report,
            qe_report_signature=raw_signature(self.keys.get("qe signed by", self.keys["pck"]), qe_report.serialized()),
            qe_auth_data=auth,
            certification=self.certification or CertificationData(kind=5, data=self.chain("pck") + b"\x00"),
        )
        return self.sgx_quote(header, signature) if sgx else self.tdx_quote(header, signature)

    def sgx_quote(self, header, signature):
        attributes = 0x7 if self.debug else 0x5
        report = enclave_report(**{"attributes": attributes, "report_data": REPORT_DATA} | self.report)
        return SgxQuote(header=header, report=report, signature=signature)

    def tdx_quote(self, header, signature):
        fields = {
            "tee_tcb_svn": bytes([3, 1, 3]) + bytes(13),
            "mr_seam": b"\x5e" * 48,
            "mr_signer_seam": bytes(48),
            "seam_attributes": bytes(8),
            "td_attributes": 1 << 28 | (1 if self.debug else 0),
            "xfam": 0xE7,
            "mr_td": b"\x7d" * 48,
            "mr_config_id": bytes(48),
            "mr_owner": bytes(48),
            "mr_owner_config": bytes(48),
            "rtmrs": tuple(bytes([number]) * 48 for number in range(4)),
            "report_data": REPORT_DATA,
            "tee_tcb_svn_2": bytes([3, 1, 3]) + bytes(13) if self.td15 else None,
            "mr_service_td": bytes(48) if self.td15 else None,
        }
        return TdxQuote(header=header, report=TdReport(**fields | self.report), signature=signature, trailing_zeros=0)

    def verify(
        self, quote=None, endorsements=None, *, report_data=REPORT_DATA, collateral=Collateral.FULL, anchors=None, now=None
    ):
        verify = verify_sgx if self.tee == "sgx" else verify_tdx
        return verify(
            quote or self.quote(),
            endorsements or self.endorsements(),
            report_data=report_data,
            collateral=collateral,
            anchors=self.anchors if anchors is None else anchors,
            now=now or self.now,
        )


def enclave_report(**changes):
    fields = {
        "cpu_svn": bytes(16),
        "misc_select": 0,
        "isv_ext_prod_id": bytes(16),
        "attributes": 5,
        "xfrm": 3,
        "mr_enclave": b"\x0e" * 32,
        "mr_signer": b"\x05" * 32,
        "config_id": bytes(64),
        "isv_prod_id": 1,
        "isv_svn": 1,
        "config_svn": 0,
        "isv_family_id": bytes(16),
        "report_data": bytes(64),
    }
    return EnclaveReport(**fields | changes)


def usage(*, ca):
    return x509.KeyUsage(
        digital_signature=not ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=ca,
        encipher_only=False,
        decipher_only=False,
    )


@pytest.fixture(scope="session")
def keys():
    return {name: new_key() for name in ("root", "other root", "ca", "pck", "signer", "attestation", "stranger")}


@pytest.fixture
def tdx(keys):
    return FakeIntel(keys)


@pytest.fixture
def sgx(keys):
    return FakeIntel(keys, "sgx")


@pytest.fixture(params=["sgx", "tdx"])
def intel(keys, request):
    return FakeIntel(keys, request.param)


@pytest.fixture(scope="session")
def tools():
    """What tests need of this file: it is no module they could import."""

    class Tools:
        pass

    tools = Tools()
    tools.NOW, tools.DAY, tools.REPORT_DATA, tools.SGX_OID = NOW, DAY, REPORT_DATA, SGX_OID
    for one in (der, der_int, der_oid, part, raw_signature, raw_point, new_key, spki, enclave_report, FakeIntel, stamp):
        setattr(tools, one.__name__, one)
    return tools
