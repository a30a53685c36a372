"""First-party benchmarks: attention and indexer, and capturing their inputs from a checkpoint."""
