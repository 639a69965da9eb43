"""Fuzzers: ``python -m tests.fuzz`` runs them all, see docs/testing.md."""
