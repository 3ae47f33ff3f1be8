"""llamacrab across its own commits; see docs/bench.md."""
