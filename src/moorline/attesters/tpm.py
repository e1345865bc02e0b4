"""The TPM of this machine through tpm2-pytss (extra `tpm`): /dev/tpmrm0 and swtpm are the same code, told apart by a string.

The endorsement key follows the TCG EK profile (template L-1, RSA-2048, or L-2, P-256) so that it is the key the maker's
certificate is for. The attestation key is a restricted ECDSA P-256 primary key of the endorsement hierarchy, without
dictionary-attack protection (`noda`), since a TPM that loses power without shutdown counts that as a failed attempt. Both
are persistent, so that of the three transient slots a TPM has, none stays taken between calls. A host that answers to
several verifiers has a further key for each (`for_verifier`): it is made from the verifier's name each time it is used and
put away again, so that it is always the same and takes no slot. Each call opens the TPM,
takes a lock and gives the TPM back, since one without a resource manager (swtpm) serves one client at a time.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self

from moorline.digest import tagged_hash
from moorline.errors import Misconfigured, Refused, Unavailable
from moorline.evidence.tpm_structures import ALG_NULL, ALG_SHA256, HASH_NAMES, LOCATION_NV, NV_WRITTEN

EK_HANDLE: Final = 0x81010001
AK_HANDLE: Final = 0x81018001
EK_CERTIFICATES: Final = (("EK-RSA2048", 0x01C00002), ("EK-ECC256", 0x01C0000A))
_QUOTE_TRIES: Final = 5
_NV_FIRST: Final = 0x01000000
_PERSISTENT_FIRST: Final = 0x81000000
_HANDLES_AT_ONCE: Final = 64
EK_CHAIN_INDEX: Final = 0x01C00100
_CHAIN_INDICES: Final = range(EK_CHAIN_INDEX, EK_CHAIN_INDEX + 0x100)
_MAX_CHAIN: Final = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Endorsement:
    """The endorsement key as TPMT_PUBLIC, and its certificate (DER) with any intermediates the TPM holds, leaf first."""

    public: bytes
    certificates: tuple[bytes, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Quoted:
    """TPMS_ATTEST, TPMT_SIGNATURE and the PCR values read next to it, by index."""

    attest: bytes
    signature: bytes
    pcrs: dict[int, bytes]


class Tpm:
    """One TPM, named by its TCTI string. Made by `open`; nothing stays open between calls."""

    def __init__(self, tcti: str, *, verifier: str | None = None, lock: threading.Lock | None = None) -> None:
        self._tcti, self._verifier = tcti, verifier
        self._lock = threading.Lock() if lock is None else lock
        self._esys: Any = None

    @classmethod
    def open(cls, tcti: str) -> Self:
        """The TPM behind a TCTI string, `swtpm:path=/x/tpm.sock` or `device:/dev/tpmrm0`.

        Raises Misconfigured("tpm.no_library") without the extra, Unavailable("tpm.unreachable") if it does not answer.
        """
        tpm = cls(tcti)
        with tpm._using():
            return tpm

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Nothing is held between calls; this waits for a call in progress."""
        with self._lock:
            self._esys = None

    def for_verifier(self, name: str) -> Tpm:
        """The same TPM with an attestation key for one further verifier, whose certificate carries this DNS name."""
        return Tpm(self._tcti, verifier=name, lock=self._lock)

    # Identity -------------------------------------------------------------------------------------------------------

    def endorsement(self) -> Endorsement:
        """The endorsement key and its certificate. Raises Refused("tpm.no_ek_certificate") if the maker put none in."""
        with self._using() as esys:
            certificate, template = self._ek_template()
            present = self._handles(_NV_FIRST)
            handle = self._persistent(EK_HANDLE, template)
            public, _, _ = esys.read_public(handle)
            chain = b"".join(self._nv_read(index) for index in _CHAIN_INDICES if index in present)
            certificates = (*_certificates(certificate)[:1], *_certificates(chain)[:_MAX_CHAIN])
            return Endorsement(public=bytes(public.publicArea.marshal()), certificates=certificates)

    def attestation_key(self) -> bytes:
        """TPMT_PUBLIC of the attestation key; the same key each time, made on first use."""
        with self._using() as esys, self._ak() as ak:
            public, _, _ = esys.read_public(ak)
            return bytes(public.publicArea.marshal())

    def activate(self, credential_blob: bytes, secret: bytes) -> bytes:
        """Open what `verification.tpm_identity.make_credential` sealed. Raises Refused("tpm.activation_failed")."""
        from tpm2_pytss import ESYS_TR, TPM2_SE, TPMT_SYM_DEF, TSS2_Exception
        from tpm2_pytss.constants import TPM2_ALG
        from tpm2_pytss.types import TPM2B_ENCRYPTED_SECRET, TPM2B_ID_OBJECT

        with self._using() as esys:
            _, template = self._ek_template()
            ek = self._persistent(EK_HANDLE, template)
            session = esys.start_auth_session(
                ESYS_TR.NONE, ESYS_TR.NONE, TPM2_SE.POLICY, TPMT_SYM_DEF(algorithm=TPM2_ALG.NULL), TPM2_ALG.SHA256
            )
            try:
                esys.policy_secret(ESYS_TR.ENDORSEMENT, session, b"", b"", b"", 0)
                with self._ak() as ak:
                    opened = esys.activate_credential(
                        ak,
                        ek,
                        TPM2B_ID_OBJECT(credential=credential_blob),
                        TPM2B_ENCRYPTED_SECRET(secret=secret),
                        session2=session,
                    )
                return bytes(opened)
            except TSS2_Exception as error:
                raise Refused(
                    "tpm.activation_failed", "the TPM did not open the credential: it is for other keys", got=error
                ) from None
            finally:
                esys.flush_context(session)

    # Evidence -------------------------------------------------------------------------------------------------------

    def quote(self, qualifying: bytes, bank: int, selection: tuple[int, ...]) -> Quoted:
        """A quote over `selection` of `bank`, and the values it covers.

        PCR 10 grows while files are measured, so it is tried again until values read before and after are the same.
        """
        from tpm2_pytss.types import TPMT_SIG_SCHEME

        with self._using() as esys, self._ak() as ak:
            chosen = _selection(bank, selection)
            for _ in range(_QUOTE_TRIES):
                before = self._pcrs(bank, selection)
                attest, signature = esys.quote(ak, chosen, qualifying, TPMT_SIG_SCHEME(scheme=ALG_NULL))
                if self._pcrs(bank, selection) == before:
                    return Quoted(attest=bytes(attest), signature=bytes(signature.marshal()), pcrs=before)
        raise Unavailable("tpm.pcrs_in_motion", "PCRs changed during every attempt to quote them")

    def read_pcrs(self, bank: int, selection: tuple[int, ...]) -> dict[int, bytes]:
        """The values of PCRs, unproven."""
        with self._using():
            return self._pcrs(bank, selection)

    def extend(self, pcr: int, digest: bytes) -> None:
        """Extend one PCR of the SHA-256 bank with a digest of 32 bytes."""
        from tpm2_pytss.constants import TPM2_ALG
        from tpm2_pytss.types import TPML_DIGEST_VALUES, TPMT_HA, TPMU_HA

        with self._using() as esys:
            value = TPMT_HA(hashAlg=TPM2_ALG.SHA256, digest=TPMU_HA(sha256=digest))
            esys.pcr_extend(_handle(pcr), TPML_DIGEST_VALUES([value]))

    # Location -------------------------------------------------------------------------------------------------------

    def write_location(self, digest: bytes) -> None:
        """Define the NV index of the location tag, if it is not there, and write the tag's digest (32 bytes)."""
        from tpm2_pytss import ESYS_TR
        from tpm2_pytss.types import TPM2B_NV_PUBLIC, TPMS_NV_PUBLIC

        with self._using() as esys:
            if LOCATION_NV.index in self._handles(_NV_FIRST):
                index = esys.tr_from_tpmpublic(LOCATION_NV.index)
            else:
                public = TPMS_NV_PUBLIC(
                    nvIndex=LOCATION_NV.index,
                    nameAlg=ALG_SHA256,
                    attributes=LOCATION_NV.attributes & ~NV_WRITTEN,
                    dataSize=LOCATION_NV.size,
                )
                index = esys.nv_define_space(b"", TPM2B_NV_PUBLIC(nvPublic=public))
            esys.nv_write(index, digest, 0, auth_handle=ESYS_TR.OWNER)

    def certify_location(self, qualifying: bytes) -> tuple[bytes, bytes] | None:
        """TPMS_ATTEST and TPMT_SIGNATURE over the whole location index; None if it was never written."""
        from tpm2_pytss.types import TPMT_SIG_SCHEME

        with self._using() as esys:
            if LOCATION_NV.index not in self._handles(_NV_FIRST):
                return None
            index = esys.tr_from_tpmpublic(LOCATION_NV.index)
            with self._ak() as ak:
                attest, signature = esys.nv_certify(
                    ak, index, qualifying, TPMT_SIG_SCHEME(scheme=ALG_NULL), LOCATION_NV.size, 0
                )
            return bytes(attest), bytes(signature.marshal())

    def random(self, size: int) -> bytes:
        """Random bytes of the TPM's own: as many as were asked for, or as it gives at once (TPM2_GetRandom)."""
        with self._using() as esys:
            return bytes(esys.get_random(size))

    # A device's signing key --------------------------------------------------------------------------------------------

    def signing_point(self, name: str) -> bytes:
        """The uncompressed point (65 bytes) of the P-256 signing key that follows from a name; always the same key."""
        with self._using() as esys, self._signing(name) as handle:
            public, _, _ = esys.read_public(handle)
            point = public.publicArea.unique.ecc
            return b"\x04" + _coordinate(point.x) + _coordinate(point.y)

    def sign(self, name: str, digest: bytes) -> bytes:
        """The ECDSA signature r | s (64 bytes) of that key over a SHA-256 digest, which the caller made."""
        from tpm2_pytss.constants import TPM2_ALG, TPM2_RH, TPM2_ST
        from tpm2_pytss.types import TPM2B_DIGEST, TPMT_SIG_SCHEME, TPMT_TK_HASHCHECK

        scheme = TPMT_SIG_SCHEME(scheme=TPM2_ALG.ECDSA)
        scheme.details.any.hashAlg = TPM2_ALG.SHA256
        unneeded = TPMT_TK_HASHCHECK(tag=TPM2_ST.HASHCHECK, hierarchy=TPM2_RH.NULL)  # the key is not restricted
        with self._using() as esys, self._signing(name) as handle:
            made = esys.sign(handle, TPM2B_DIGEST(digest), scheme, unneeded)  # its parts live only as long as it does
            return _coordinate(made.signature.ecdsa.signatureR) + _coordinate(made.signature.ecdsa.signatureS)

    @contextlib.contextmanager
    def _signing(self, name: str) -> Iterator[Any]:
        from tpm2_pytss import ESYS_TR
        from tpm2_pytss.types import TPM2B_PUBLIC, TPM2B_SENSITIVE_CREATE, TPMT_PUBLIC

        attributes = "sign|fixedtpm|fixedparent|sensitivedataorigin|userwithauth|noda"
        template = TPMT_PUBLIC.parse("ecc256:ecdsa-sha256:null", objectAttributes=attributes)
        template.unique.ecc.x.buffer = tagged_hash("tpm-device-key", name.encode())
        made, *_ = self._esys.create_primary(TPM2B_SENSITIVE_CREATE(), TPM2B_PUBLIC(publicArea=template), ESYS_TR.OWNER)
        try:
            yield made
        finally:
            self._esys.flush_context(made)

    # ----------------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _using(self) -> Iterator[Any]:
        try:
            from tpm2_pytss import ESAPI, TSS2_Exception
        except ImportError:
            raise Misconfigured(
                "tpm.no_library", "the TPM library is not installed", remedy="install moorline[tpm]"
            ) from None
        with self._lock:
            try:
                self._esys = ESAPI(self._tcti)
            except TSS2_Exception as error:
                raise Unavailable(
                    "tpm.unreachable", "the TPM does not answer", got=f"{self._tcti}: {error}", remedy="check that it runs"
                ) from None
            try:
                yield self._esys
            except TSS2_Exception as error:
                raise Unavailable("tpm.command_failed", "the TPM refused a command", got=error) from None
            finally:
                self._esys.close()
                self._esys = None

    def _pcrs(self, bank: int, selection: tuple[int, ...]) -> dict[int, bytes]:
        """TPM2_PCR_Read gives eight values at most, so it is asked until nothing is missing."""
        values: dict[int, bytes] = {}
        while missing := [index for index in selection if index not in values]:
            _, got, digests = self._esys.pcr_read(_selection(bank, missing))
            read = [index for part in got for index in _indices(bytes(part.pcrSelect)[: part.sizeofSelect])]
            if not read:
                raise Unavailable("tpm.no_such_bank", "the TPM has no such PCR bank", got=hex(bank))
            values.update(zip(read, (bytes(digest) for digest in digests), strict=False))
        return values

    def _ek_template(self) -> tuple[bytes, Any]:
        from tpm2_pytss.utils import NoSuchIndex, NVReadEK, create_ek_template

        present = self._handles(_NV_FIRST)
        read = NVReadEK(self._esys)

        def reader(index: int) -> bytes:
            if index not in present:
                raise NoSuchIndex(index)
            return bytes(read(index))

        for kind, index in EK_CERTIFICATES:
            if index in present:
                return create_ek_template(kind, reader)  # type: ignore[no-any-return] # the library has no types
        raise Refused(
            "tpm.no_ek_certificate",
            "this TPM holds no endorsement certificate",
            expected=" or ".join(f"{index:#x}" for _, index in EK_CERTIFICATES),
            remedy="use a TPM whose maker certified it",
        )

    @contextlib.contextmanager
    def _ak(self) -> Iterator[Any]:
        """The attestation key for this verifier, for as long as it is needed."""
        from tpm2_pytss import ESYS_TR
        from tpm2_pytss.types import TPM2B_PUBLIC, TPM2B_SENSITIVE_CREATE, TPMT_PUBLIC

        template = TPMT_PUBLIC.parse(
            "ecc256:ecdsa-sha256:null",
            objectAttributes="restricted|sign|fixedtpm|fixedparent|sensitivedataorigin|userwithauth|noda",
        )
        if self._verifier is None:
            yield self._persistent(AK_HANDLE, TPM2B_PUBLIC(publicArea=template))
            return
        # A primary key follows from the hierarchy's seed and its template: another `unique` is another key, and stays it.
        template.unique.ecc.x.buffer = tagged_hash("tpm-attestation-key", self._verifier.encode())
        made, *_ = self._esys.create_primary(
            TPM2B_SENSITIVE_CREATE(), TPM2B_PUBLIC(publicArea=template), ESYS_TR.ENDORSEMENT
        )
        try:
            yield made
        finally:
            self._esys.flush_context(made)

    def _persistent(self, where: int, template: Any) -> Any:  # noqa: ANN401 - tpm2_pytss types
        """The object at `where`; made in the endorsement hierarchy and put there if there is none."""
        from tpm2_pytss import ESYS_TR
        from tpm2_pytss.types import TPM2B_SENSITIVE_CREATE

        if where in self._handles(_PERSISTENT_FIRST):
            return self._esys.tr_from_tpmpublic(where)
        made, *_ = self._esys.create_primary(TPM2B_SENSITIVE_CREATE(), template, ESYS_TR.ENDORSEMENT)
        try:
            return self._esys.evict_control(ESYS_TR.OWNER, made, where)
        finally:
            self._esys.flush_context(made)

    def _handles(self, first: int) -> set[int]:
        """The handles the TPM has from `first` on. Asking is quieter than probing: the library logs every miss."""
        from tpm2_pytss.constants import TPM2_CAP

        found: set[int] = set()
        more: object = True
        while more:
            more, listed = self._esys.get_capability(TPM2_CAP.HANDLES, max(found, default=first - 1) + 1, _HANDLES_AT_ONCE)
            batch = {int(handle) for handle in listed.data.handles}
            found |= batch
            more = bool(more) and bool(batch)
        return found

    def _nv_read(self, index: int) -> bytes:
        from tpm2_pytss.utils import NVReadEK

        return bytes(NVReadEK(self._esys)(index))


def _coordinate(value: object) -> bytes:
    """32 bytes: a TPM may leave leading zeros out."""
    return bytes(value).rjust(32, b"\0")  # type: ignore[call-overload, no-any-return] # the library has no types


def _handle(pcr: int) -> Any:  # noqa: ANN401 - ESYS_TR
    from tpm2_pytss import ESYS_TR

    return getattr(ESYS_TR, f"PCR{pcr}")


def _selection(bank: int, indices: Sequence[int]) -> Any:  # noqa: ANN401 - TPML_PCR_SELECTION
    from tpm2_pytss.types import TPML_PCR_SELECTION

    return TPML_PCR_SELECTION.parse(f"{HASH_NAMES[bank]}:{','.join(map(str, indices))}")


def _indices(bitmap: bytes) -> list[int]:
    return [index for index in range(len(bitmap) * 8) if bitmap[index // 8] >> (index % 8) & 1]


def _certificates(data: bytes) -> list[bytes]:
    """The DER certificates at the beginning of `data`, without the padding makers leave after them in NV.

    The chain indices hold certificates one after the other, as if the indices were one area (TCG EK profile 2.2.1.5.2).
    """
    found: list[bytes] = []
    while data[:2] == b"\x30\x82":
        size = 4 + int.from_bytes(data[2:4], "big")
        found.append(data[:size])
        data = data[size:]
    return found
