"""Benchmarks: ``bench NAME`` checks an operation, then times it on the machine at hand."""

from gsa_platform.bench.benchmark import Benchmark, Progress, WrongResultError

__all__ = ["Benchmark", "Progress", "WrongResultError"]
