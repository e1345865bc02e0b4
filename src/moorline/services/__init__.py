"""One composition root per process; nothing else reads configuration."""
