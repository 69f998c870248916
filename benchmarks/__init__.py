"""Benchmarks, and the peers that they are compared with; run from the repository root."""
