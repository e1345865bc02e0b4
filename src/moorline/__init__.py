"""Moorline: attest hosts and enclaves, place functions, release keys to attested code, federate operators.

The rooms and the direction of imports are in docs/architecture.md and are checked by import-linter.
"""

__version__ = "0.1.0"
