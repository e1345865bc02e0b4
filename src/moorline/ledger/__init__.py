"""The registry of the consortium: transactions, state machine, proofs, light client; engines in a folder of their own."""
