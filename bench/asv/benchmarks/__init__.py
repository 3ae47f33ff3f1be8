"""llamacrab across its own commits; see docs/benchmarks.md."""
