"""Vendor roots as AMD publishes them (KDS `cert_chain`): facts, one file a certificate, DER.

SHA-256 of every file is pinned in `verification.anchors`, so that a changed file is noticed before it is trusted.
"""
