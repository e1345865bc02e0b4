"""Authentic, fresh, bound? From facts, endorsements, challenge and time to `Verified[...]`, or an exception. No I/O."""
