"""Whether a hardware security module is at hand (SEC009 6.20)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from moorline.attesters.probes.saying import met, not_met, not_probed
from moorline.attesters.probes.tree import State, Tree
from moorline.policy.sec009.assessment import Observation

_MODULES: Final = ("/usr/share/p11-kit/modules", "/etc/pkcs11/modules")
_SOFTWARE: Final = ("softhsm", "p11-kit", "opencryptoki", "gnome-keyring", "opensc", "tpm2")
"""Words in the names of modules that are no HSM: software, card readers, the TPM, helpers."""
_TOKENS: Final = "/var/lib/softhsm/tokens"
CAPABILITIES: Final = ("hsm.physical", "hsm.virtual")


def probe(tree: Tree) -> Iterator[Observation]:
    """PKCS#11 modules that are registered on this machine; software tokens are virtual at best."""
    modules = [f"{folder}/{name}" for folder in _MODULES for name in tree.names(folder) if name.endswith(".module")]
    hardware = [one for one in modules if not any(word in one for word in _SOFTWARE)]
    said = f"{' and '.join(_MODULES)}: {len(modules)} modules"
    if hardware:
        yield not_probed(
            "hsm.physical",
            "a module is registered; only the maker's attestation of a key in it shows that it is one",
            *hardware[:8],
        )
    else:
        yield not_met("hsm.physical", "no module of a hardware maker is registered", said)
    tokens = tree.names(_TOKENS)
    if tokens:
        yield met("hsm.virtual", f"{len(tokens)} software tokens", f"{_TOKENS}: {len(tokens)} tokens")
    elif tree.state(_TOKENS) is State.DENIED:
        yield not_probed("hsm.virtual", f"{_TOKENS} may be read by its owner only")
    else:
        yield not_met("hsm.virtual", "no software token is initialised", f"{_TOKENS}: absent, empty or not readable")
