"""MANO: packages, placement, launch."""
