"""The VNF descriptor: the part of a TOSCA service template (SOL001) that this system acts on.

The file is JSON, which YAML 1.2 contains, so TOSCA tools read it and no YAML parser faces strangers here. Node types and
property names are SOL001's; the placement policy is ours (`moorline.policies.SecurityPlacement`) because SOL001 has no word
for a SEC009 use case.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from moorline.errors import Malformed
from moorline.nfv import parse_name

MAX_DESCRIPTOR_BYTES: Final = 64 * 1024
FUNCTION_FILE: Final = "Artifacts/function.py"

_VNF: Final = "tosca.nodes.nfv.VNF"
_COMPUTE: Final = "tosca.nodes.nfv.Vdu.Compute"
_POLICY: Final = "moorline.policies.SecurityPlacement"
_USE_CASE: Final = re.compile(r"4\.[1-7]")
_JURISDICTION: Final = re.compile(r"[A-Z]{2}(?:/[A-Z0-9]{1,8}){0,3}")
_VERSION: Final = re.compile(r"[0-9A-Za-z.-]{1,32}")
_MEMORY: Final = re.compile(r"([1-9][0-9]{0,5}) MiB")


@dataclass(frozen=True, slots=True, kw_only=True)
class Descriptor:
    """What a package asks for. `jurisdiction` is a path such as `EU` or `EU/DE`; a host inside it qualifies."""

    service: str
    provider: str
    version: str
    use_case: str
    jurisdiction: str
    memory_mib: int
    pids: int
    artifact: str


def render(descriptor: Descriptor) -> bytes:
    """The TOSCA file of a descriptor."""
    compute = {
        "type": _COMPUTE,
        "properties": {"name": descriptor.service, "description": f"the function {descriptor.service}"},
        "capabilities": {
            "virtual_compute": {
                "properties": {"virtual_memory": {"virtual_mem_size": f"{descriptor.memory_mib} MiB"}},
            },
        },
        "artifacts": {"function": {"type": "tosca.artifacts.Implementation.Python", "file": f"../{descriptor.artifact}"}},
    }
    vnf = {
        "type": _VNF,
        "properties": {
            "descriptor_id": f"{descriptor.provider}-{descriptor.service}-{descriptor.version}",
            "descriptor_version": descriptor.version,
            "provider": descriptor.provider,
            "product_name": descriptor.service,
            "software_version": descriptor.version,
        },
    }
    placement = {
        "type": _POLICY,
        "properties": {
            "sec009_use_case": descriptor.use_case,
            "jurisdiction": descriptor.jurisdiction,
            "pids": descriptor.pids,
        },
    }
    template = {
        "tosca_definitions_version": "tosca_simple_yaml_1_3",
        "description": f"{descriptor.service} of {descriptor.provider}",
        "topology_template": {
            "node_templates": {"vnf": vnf, "vdu": compute},
            "policies": [{"placement": placement}],
        },
    }
    return (json.dumps(template, indent=2) + "\n").encode()


def parse(data: bytes) -> Descriptor:
    """The descriptor in a TOSCA file; raises only Malformed("package.descriptor" | "name.malformed"). No trust."""
    if len(data) > MAX_DESCRIPTOR_BYTES:
        raise _wrong("the descriptor is too large", len(data))
    try:
        template = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
        topology = template["topology_template"]
        vnf = _only(topology["node_templates"].values(), _VNF)["properties"]
        compute = _only(topology["node_templates"].values(), _COMPUTE)
        policy = _only((entry for named in topology["policies"] for entry in named.values()), _POLICY)["properties"]
        memory = compute["capabilities"]["virtual_compute"]["properties"]["virtual_memory"]["virtual_mem_size"]
        artifact = compute["artifacts"]["function"]["file"]
        return Descriptor(
            service=parse_name(vnf["product_name"], "product name"),
            provider=parse_name(vnf["provider"], "provider"),
            version=_text(_VERSION, vnf["descriptor_version"], "descriptor version"),
            use_case=_text(_USE_CASE, policy["sec009_use_case"], "SEC009 use case"),
            jurisdiction=_text(_JURISDICTION, policy["jurisdiction"], "jurisdiction"),
            memory_mib=_number(_text(_MEMORY, memory, "memory size").partition(" ")[0], 1 << 16),
            pids=_number(policy["pids"], 4096),
            artifact=_artifact(artifact),
        )
    except Malformed:
        raise
    except Exception as error:  # missing keys, wrong types, bad UTF-8, too deep nesting: all one thing to the caller
        raise _wrong("the descriptor is not a service template as expected", type(error).__name__) from None


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        # Two readers that keep different ones of two equal keys would see two different packages.
        raise _wrong("a key is repeated", [key for key, _ in pairs])
    return found


def _only(entries: Iterable[dict[str, Any]], kind: str) -> dict[str, Any]:
    found = [entry for entry in entries if entry["type"] == kind]
    if len(found) != 1:
        raise _wrong(f"exactly one {kind} is expected", len(found))
    return found[0]


def _text(pattern: re.Pattern[str], value: object, what: str) -> str:
    if not isinstance(value, str) or pattern.fullmatch(value) is None:
        raise _wrong(f"the {what} is not one", value)
    return value


def _number(value: object, most: int) -> int:
    number = int(value) if isinstance(value, str) else value
    if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number <= most:
        raise _wrong(f"a number between 1 and {most} is expected", value)
    return number


def _artifact(value: object) -> str:
    if value != f"../{FUNCTION_FILE}":
        raise _wrong("the function's code is expected in one place", value)
    return FUNCTION_FILE


def _wrong(says: str, got: object) -> Malformed:
    return Malformed("package.descriptor", says, got=got, remedy="build the package with `moor package build`")
