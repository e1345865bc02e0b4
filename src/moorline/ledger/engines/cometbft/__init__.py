"""The CometBFT engine: our state machine behind ABCI 2.0, and what its headers prove.

Pure, and without protobuf, since guests read the ledger with nothing but the base install: canonical, header, commit,
verifier, light, evidence. Nodes alone import the rest.
"""
