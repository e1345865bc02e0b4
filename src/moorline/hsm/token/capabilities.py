"""What a token can do for Moorline, asked of the token itself at the start, and what follows from what it lacks.

Mechanism lists are claims: modules list mechanisms that their sessions then refuse, and the other way round. So the list is
shown, and each capability that matters is tried on a throw-away session object, or on the mechanism's own flags where a try
would leave something in the token. A lack never stops the start by itself: the operation that needs it is refused
("token.lacks"), and the table says beforehand which one that will be.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from pkcs11 import Attribute, KeyType, Mechanism, MechanismFlag, ObjectClass
from pkcs11.constants import DEFAULT
from pkcs11.exceptions import PKCS11Error
from pkcs11.util.ec import encode_named_curve_parameters

from moorline.errors import Unavailable
from moorline.hsm.token.local import LocalToken
from moorline.hsm.token.sessions import Lane

_UNSAID: Final = dict.fromkeys(
    (
        *(Attribute.SIGN, Attribute.VERIFY, Attribute.ENCRYPT, Attribute.DECRYPT),
        *(Attribute.WRAP, Attribute.UNWRAP, Attribute.DERIVE),
    ),
    DEFAULT,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Capability:
    """Something Moorline uses, whether the token has it, and what follows if not."""

    name: str
    needs: str
    present: bool
    consequence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MechanismFacts:
    """A mechanism as the token lists it, with key sizes in bits or bytes as the mechanism counts them."""

    name: str
    smallest: int
    largest: int
    uses: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What the probe found."""

    manufacturer: str
    model: str
    serial: str
    firmware: str
    mechanisms: tuple[MechanismFacts, ...]
    table: tuple[Capability, ...]

    @property
    def lacking(self) -> tuple[Capability, ...]:
        """What is not there."""
        return tuple(each for each in self.table if not each.present)


_CONSEQUENCES: Final = {
    "sign": ("CKM_ECDSA, P-256 key pairs", "it holds neither HSM identity nor issuing CA: it cannot serve a broker"),
    "agree": (
        "CKM_ECDH1_DERIVE into a secret key",
        "no pair keys with peer HSMs: no profile without forward secrecy",
    ),
    "seal": ("AES-256 keys, CKM_AES_GCM", "no pools, no sealed-storage keys, no launch epochs: it cannot serve a broker"),
    "hmac": ("imported generic secrets, CKM_SHA256_HMAC", "launch tokens cannot be recomputed: no function is admitted"),
    "counter": ("private data objects", "a restored database is noticed by the ledger anchor only, not by a counter"),
    "session-objects": (
        "P-256 pairs as session objects",
        "pools are not made in the token, but with its generator",
    ),
    "wrap": ("CKM_AES_KEY_WRAP_PAD", "no backup: after a loss all keys are made and registered anew"),
    "trusted-wrap": ("CKA_WRAP_WITH_TRUSTED", "no backup: recoverable keys could be wrapped by anybody with the PIN"),
}


def probe(token: LocalToken) -> Capabilities:
    """Ask and try. Leaves nothing behind. Raises Unavailable if the token is away."""
    with token.module.in_use():
        found = token.module.find(token.location)
        slot = found.slot
        listed = {}
        for mechanism in slot.get_mechanisms():
            info = slot.get_mechanism_info(mechanism)
            listed[mechanism] = info
    tried = {name: _present(token, name, listed) for name in _CONSEQUENCES}
    return Capabilities(
        manufacturer=found.manufacturer_id,
        model=found.model,
        serial=found.serial.decode("ascii", "replace").strip(),
        firmware=".".join(str(part) for part in found.firmware_version),
        mechanisms=tuple(sorted((_mechanism(name, info) for name, info in listed.items()), key=lambda each: each.name)),
        table=tuple(
            Capability(name=name, needs=needs, present=tried[name], consequence=consequence)
            for name, (needs, consequence) in _CONSEQUENCES.items()
        ),
    )


def _present(token: LocalToken, name: str, listed: dict[Any, Any]) -> bool:
    if name == "sign":
        return Mechanism.ECDSA in listed and Mechanism.EC_KEY_PAIR_GEN in listed
    attempt = _ATTEMPTS[name]

    def tried(lane: Lane) -> bool:
        del lane  # it is logged in, which a session of the probe's own needs: what is made in that one ends with it
        session = token.module.find(token.location).open(rw=True)
        try:
            attempt(session)
        except (PKCS11Error, ValueError):
            return False
        finally:
            session.close()
        return True

    try:
        return token.sessions.run(tried)
    except Unavailable:
        return False


def _agree(session: Any) -> None:  # noqa: ANN401 - python-pkcs11 is untyped here
    from pkcs11.mechanisms import KDF

    public, private = _pair(session, derive=True)
    point = bytes(public[Attribute.EC_POINT])[2:]
    private.derive_key(
        KeyType.GENERIC_SECRET,
        256,
        capabilities=MechanismFlag.SIGN,
        mechanism=Mechanism.ECDH1_DERIVE,
        mechanism_param=(KDF.NULL, None, point),
        template={Attribute.SENSITIVE: True, Attribute.EXTRACTABLE: False},
    )


def _pair(session: Any, *, derive: bool = False, trust: bool = False) -> tuple[Any, Any]:  # noqa: ANN401 - as above
    parameters = session.create_domain_parameters(
        KeyType.EC, {Attribute.EC_PARAMS: encode_named_curve_parameters("secp256r1")}, local=True
    )
    uses: dict[Attribute, object] = {Attribute.DERIVE: True} if derive else {Attribute.SIGN: True}
    if trust:
        uses |= {Attribute.EXTRACTABLE: True, Attribute.WRAP_WITH_TRUSTED: True}
    made: tuple[Any, Any] = parameters.generate_keypair(
        store=False,
        capabilities=MechanismFlag(0),
        mechanism=Mechanism.EC_KEY_PAIR_GEN,
        public_template={**_UNSAID},
        private_template={**_UNSAID, **uses},
    )
    return made


def _aes(session: Any, uses: MechanismFlag) -> Any:  # noqa: ANN401 - as above
    return session.generate_key(KeyType.AES, 256, store=False, capabilities=uses)


def _seal(session: Any) -> None:  # noqa: ANN401 - as above
    from pkcs11 import GCMParams

    key = _aes(session, MechanismFlag.ENCRYPT | MechanismFlag.DECRYPT)
    key.encrypt(b"probe", mechanism=Mechanism.AES_GCM, mechanism_param=GCMParams(bytes(12), b"", 128))


def _hmac(session: Any) -> None:  # noqa: ANN401 - as above
    key = session.create_object(
        {
            Attribute.CLASS: ObjectClass.SECRET_KEY,
            Attribute.KEY_TYPE: KeyType.GENERIC_SECRET,
            Attribute.TOKEN: False,
            Attribute.SIGN: True,
            Attribute.VALUE: bytes(32),
        }
    )
    key.sign(b"probe", mechanism=Mechanism.SHA256_HMAC)


def _counter(session: Any) -> None:  # noqa: ANN401 - as above
    template = {Attribute.CLASS: ObjectClass.DATA, Attribute.PRIVATE: True, Attribute.LABEL: "probe", Attribute.VALUE: b"1"}
    try:
        made = session.create_object({**template, Attribute.TOKEN: False})
    except PKCS11Error:  # no session objects at all
        made = session.create_object({**template, Attribute.TOKEN: True})
    made.destroy()  # tpm2-pkcs11 keeps session objects for good


def _wrap(session: Any) -> None:  # noqa: ANN401 - as above
    _, private = _pair(session)
    key = _aes(session, MechanismFlag.WRAP | MechanismFlag.UNWRAP)
    target = session.generate_key(
        KeyType.AES, 256, store=False, capabilities=MechanismFlag.ENCRYPT, template={Attribute.EXTRACTABLE: True}
    )
    key.wrap_key(target, mechanism=Mechanism.AES_KEY_WRAP_PAD)
    del private


def _trusted_wrap(session: Any) -> None:  # noqa: ANN401 - as above
    """The token must refuse a wrapping key that nobody trusts; one that wraps does not enforce the attribute."""
    _, private = _pair(session, trust=True)
    key = _aes(session, MechanismFlag.WRAP)
    try:
        key.wrap_key(private, mechanism=Mechanism.AES_KEY_WRAP_PAD)
    except PKCS11Error:
        return
    raise ValueError("wrapped without trust")


_ATTEMPTS: Final[dict[str, Callable[[Any], None]]] = {
    "agree": _agree,
    "seal": _seal,
    "hmac": _hmac,
    "counter": _counter,
    "session-objects": lambda session: (_pair(session), None)[1],
    "wrap": _wrap,
    "trusted-wrap": _trusted_wrap,
}


def _mechanism(mechanism: Any, info: Any) -> MechanismFacts:  # noqa: ANN401 - as above
    flags = MechanismFlag(info.flags)
    uses = tuple(sorted(flag.name.lower() for flag in MechanismFlag if flag.name and flag in flags and flag.name != "HW"))
    return MechanismFacts(
        name=getattr(mechanism, "name", f"0x{int(mechanism):x}"),
        smallest=int(info.min_key_length),
        largest=int(info.max_key_length),
        uses=uses,
    )
