"""Formats: untrusted bytes to facts. No trust, no cryptography, no I/O; the only error is `Malformed`."""
