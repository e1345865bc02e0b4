"""How blocks come to be: the embedded engine here; CometBFT is another issue."""
