"""The SEC009 catalogue as data, and what follows from it: use case -> requirements -> capabilities -> what a host lacks.

The data files, all in our own words: `catalogue.json` (requirements, measures, use cases, tables 9 to 12),
`capabilities.json` (the capability model with levels and evidence), `requirement_capabilities.json` (which capability, at
which level, meets which requirement, and whether a host must show it before placement or a service of this system shows it
at another moment), `measure_capabilities.json` (the same for measures) and `changes.json` (what can be done to a host).
`assessment` judges what probes saw of one machine, `roadmap` finds the fewest changes, `report` is the form that travels.
"""

from moorline.policy.sec009.catalogue import Capability, Catalogue, Requirement, UseCase, capabilities, catalogue
from moorline.policy.sec009.profile import Gap, Need, ServiceNeed, fulfilled_by_services, gap, profile, requirements_of

__all__ = [
    "Capability",
    "Catalogue",
    "Gap",
    "Need",
    "Requirement",
    "ServiceNeed",
    "UseCase",
    "capabilities",
    "catalogue",
    "fulfilled_by_services",
    "gap",
    "profile",
    "requirements_of",
]
