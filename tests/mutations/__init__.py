"""Mistakes that void the privacy guarantee, each put in to see that a test finds it: ``python -m tests.mutations``."""
