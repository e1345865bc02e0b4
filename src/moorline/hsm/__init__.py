"""Keys that stay in a PKCS#11 token, and what a provider's HSM does with them."""
