"""Emulators: which middle blocks stay, and what stands in for the others."""
