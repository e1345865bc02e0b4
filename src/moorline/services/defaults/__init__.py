"""Configuration that is shipped."""
