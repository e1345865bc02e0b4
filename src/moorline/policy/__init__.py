"""Acceptable? From verified facts, reference values and policy to an `AttestationResult`, and release decisions. No I/O."""
