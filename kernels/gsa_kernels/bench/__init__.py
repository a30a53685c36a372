"""Benchmarks of the operations: correctness first, then time, memory and ratios in one process."""
