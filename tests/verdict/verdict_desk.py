"""A machine whose TPM is a key in a file: it boots releases of firmware, and is appraised by the command line."""

import dataclasses
import json
import typing

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from software_tpm import SoftwareTpm

from moorline.cli import run
from moorline.evidence import tpm_structures as tpm
from moorline.evidence.tpm_envelopes import serialize_tpm2_tools_pcrs
from moorline.policy import language

AT = "2026-11-23T12:00:00+00:00"
NONCE = "5c" * 24
OLD, NEW, OTHER = ("0a" * 32, "0b" * 32, "0f" * 32)


def open_demands(kind, path=""):
    """A policy with every field left open, as plain data."""
    made = {}
    for name, hint in typing.get_type_hints(kind).items():
        nested = isinstance(hint, type) and dataclasses.is_dataclass(hint)
        made[name] = open_demands(hint, f"{path}{name}.") if nested else {"not_required": "a test"}
    return made


def document(family, **demands):
    made = open_demands(language.FAMILIES[family].kind)
    return {"family": family, "supplied_keys": "software", "demands": made | demands}


def pem(key):
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_key().public_bytes(serialization.Encoding.PEM, form).decode()


class Desk:
    """Somebody with a shell, a folder and two keys."""

    def __init__(self, folder, capsys):
        self.folder, self._capsys = folder, capsys
        self.machine = SoftwareTpm()
        self.signer, self.token_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
        for name, key in (("signer.pem", self.signer), ("token.pem", self.token_key)):
            private = key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
            (folder / name).write_bytes(private)
        (folder / "ak.bin").write_bytes(self.machine.public)

    def moor(self, *words):
        code = run(["evidence", *map(str, words)])
        return code, self._capsys.readouterr().out

    def verdict(self, *words):
        code, out = self.moor("appraise", *self.files, "--nonce", NONCE, "--json", "--at", AT, *words)
        return code, json.loads(out)

    @property
    def files(self):
        return [self.folder / name for name in ("quote.pcrs", "ak.bin", "quote.sig", "quote.msg")]

    def boots(self, release, *, second=None):
        """The machine quotes PCR 4 and 8, which hold what was booted."""
        pcrs = {4: bytes.fromhex(release), 8: bytes.fromhex(second or release)}
        message, signature = self.machine.quote(bytes.fromhex(NONCE), pcrs)
        (self.folder / "quote.msg").write_bytes(message)
        (self.folder / "quote.sig").write_bytes(signature)
        (self.folder / "quote.pcrs").write_bytes(serialize_tpm2_tools_pcrs(tpm.ALG_SHA256, pcrs))

    def policy(self, name="policy.yaml", *, references=None, **demands):
        made = document("tpm", root={"exact": "software"}, **demands)
        if references is not None:
            made["references"] = references
        path = self.folder / name
        path.write_text(json.dumps(made))
        return path

    def references(self, *releases, serial=1, name="machines", family="tpm", until="2027-01-01T00:00:00Z"):
        """A signed set: releases are (name, first day, last day, value of PCR 4 and 8)."""
        text = {
            "name": name,
            "family": family,
            "serial": serial,
            "not_before": "2026-01-01T00:00:00Z",
            "not_after": until,
            "releases": [
                {
                    "name": release,
                    "not_before": f"{first}T00:00:00Z",
                    "not_after": f"{last}T23:59:59Z",
                    "values": {"pcr4": [value], "pcr8": [value]},
                    "files": {},
                }
                for release, first, last, value in releases
            ],
        }
        (self.folder / "set.json").write_text(json.dumps(text))
        out = self.folder / f"set-{serial}.cose"
        assert (
            self.moor("sign-references", self.folder / "set.json", "--key", self.folder / "signer.pem", "--out", out)[0] == 0
        )
        return out

    def asking(self, serial=1, **more):
        """A policy that asks the set for both PCRs."""
        trusted = {"machines": {"serial": serial, "signers": [pem(self.signer)]}}
        wanted = {"reference": "machines"}
        return self.policy(references=trusted, pcr4=wanted, pcr8=wanted, **more)
