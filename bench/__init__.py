"""Benches: every speed beside its quality gate, its opponents and the roofs of the same run."""
