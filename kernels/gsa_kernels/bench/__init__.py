"""Parts of benchmarks: inputs, oracle checks, work counted, time and memory of one process."""
