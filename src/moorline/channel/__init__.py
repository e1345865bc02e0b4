"""The attested session and the device channel: sans-IO machines, and the thin drivers that give them TLS."""
