"""Traces: writing them (``writer``), reading them, and showing them as text and as pictures."""
