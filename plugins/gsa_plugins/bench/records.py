"""Records of the benchmarks, with lazy targets."""

from gsa_platform import Extension, hookimpl

from .settings import AttentionBenchSettings, CaptureSettings, IndexerBenchSettings


@hookimpl
def gsa_register_benchmark() -> list[Extension]:
    return [
        Extension(
            "attention",
            "gsa_plugins.bench.attention:AttentionBench",
            AttentionBenchSettings,
            "Whole path and parts of a layer's sparse attention, beside dense attention",
        ),
        Extension(
            "indexer",
            "gsa_plugins.bench.indexer:IndexerBench",
            IndexerBenchSettings,
            "Scoring, selection and the indexer's objective, beside a torch.topk pipeline",
        ),
        Extension(
            "capture",
            "gsa_plugins.bench.capture:CaptureBench",
            CaptureSettings,
            "Saves a trained layer's q, k, v, gates and index factors, as inputs of the others",
        ),
    ]
