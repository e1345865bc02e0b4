"""On the NFVI node: attests the host, starts guests, relays their few connections. Trusted for nothing it cannot prove."""
