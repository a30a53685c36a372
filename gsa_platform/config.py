"""Every root key of the configuration as typed dataclasses, and their registration with Hydra."""

from __future__ import annotations

from dataclasses import dataclass, field, make_dataclass
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from gsa_platform.components import SLOTS

if TYPE_CHECKING:
    from gsa_platform.registry import Registry


@dataclass
class RopeScalingConfig:
    kind: str = "none"  # none or yarn
    factor: float = 1.0  # context / original_context
    original_context: int = 4096  # tokens the base rotary frequencies were made for
    beta_fast: float = 32.0  # rotations above which a frequency is kept
    beta_slow: float = 1.0  # rotations below which a frequency is fully interpolated


@dataclass
class ModelConfig:
    name: str = MISSING
    d_model: int = MISSING
    n_layers: int = MISSING
    n_heads: int = MISSING
    n_kv_heads: int = MISSING
    head_dim: int = 0  # 0 = d_model / n_heads
    ffn_dim: int = 0  # 0 = SwiGLU 8/3 d_model, rounded up to 64
    qk_norm: bool = True  # RMSNorm on queries and keys before the rotary embedding
    tie_embeddings: bool = True
    norm_eps: float = 1e-6
    rope_theta: float = 500000.0
    rope_scaling: RopeScalingConfig = field(default_factory=RopeScalingConfig)
    # "name:count", "name" (fills the rest, last entry only) or "*" (the configured attention);
    # [] = the configured attention in every layer.
    layer_pattern: list[str] = field(default_factory=list)


@dataclass
class DataConfig:
    """What every data module reads; a plugin's settings of data are a subclass."""

    name: str = MISSING
    tokenizer: str = "bytes"  # bytes, or the path of a tokenizers JSON file
    val_fraction: float = 0.05
    cross_document: bool = True  # attention may cross document borders inside a sequence
    cache_dir: str | None = None  # null = $GSA_CACHE or ~/.cache/gsa_platform
    max_bytes: int = 0  # of raw text; 0 = all
    workers: int = 0  # loader processes


@dataclass
class OptimConfig:
    name: str = "adamw"
    lr: float = 3e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0  # gradient norm; 0 = off
    indexer_lr_multiplier: float = 1.0
    schedule: str = "cosine"  # cosine, wsd or constant
    warmup_steps: float = 0  # optimizer steps; below 1: a share of train.steps
    decay_fraction: float = 0.2  # wsd: share of the steps spent decaying
    min_lr_ratio: float = 0.1


@dataclass
class TrainConfig:
    batch_size: int = 1  # sequences per device and micro-batch
    accumulate: int = 1  # micro-batches per optimizer step
    steps: int = 100  # optimizer steps
    val_every: int = 0  # steps; 0 = only at the end
    val_batches: int = 1
    log_every: int = 1
    checkpoint_every: int = 0  # steps; 0 = only at the end
    ce_chunk: int = 4096  # tokens per chunk of the loss
    activation_checkpointing: bool = False
    compile: bool = False  # torch.compile each block for training; validation runs without
    resume: str | None = None  # checkpoint path, or auto
    dense_cost: bool = False  # also measure a dense step, for the summary
    deterministic: bool = False


@dataclass
class TrainerConfig:
    name: str = "default"
    devices: Any = 1  # per node; -1 or auto = every GPU
    num_nodes: int = 1
    accelerator: str = "auto"  # auto, cpu or cuda
    precision: str = "32-true"  # 32-true, bf16-mixed or bf16-true
    strategy: str = "auto"
    progress_bar: bool = True


@dataclass
class TrackingConfig:
    name: str = "mlflow"  # mlflow or none
    uri: str | None = None  # null = sqlite:///<output_root>/mlflow.db
    experiment: str | None = None  # null = the root key `name`
    run_name: str | None = None
    system_metrics: bool = True
    run_id: str | None = None  # set by the parent process
    parent_run_id: str | None = None
    tags: dict[str, str] = field(default_factory=dict)


@dataclass
class PickedConfig:
    hardware: str = ""  # entry of `hardware` in use; type picked.hardware=NAME to force one
    reason: str = ""
    overrides: list[str] = field(default_factory=list)


@dataclass
class SweepConfig:
    fail_fast: bool = False  # stop a sweep at its first failed job


@dataclass
class RootConfig:
    """The whole configuration. Slot nodes are typed by the component that is chosen."""

    name: str = MISSING
    seed: int = 0
    context: int = MISSING  # tokens per sequence
    model: ModelConfig = field(default_factory=ModelConfig)
    attention: Any = MISSING
    indexer: Any = MISSING
    sparsity: Any = MISSING
    gate: Any = MISSING
    objective: Any = MISSING
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    callbacks: Any = field(default_factory=dict)  # name -> settings, typed by `register`
    output_root: str = "runs"
    run_dir: str | None = None  # set by the parent process
    plugins_path: str | None = None  # one-off plugin files, separated by os.pathsep
    hardware: dict[str, list[str]] = field(default_factory=dict)  # class -> overrides
    picked: PickedConfig = field(default_factory=PickedConfig)
    notes: list[str] = field(default_factory=list)  # what composing decided


def register(registry: Registry) -> None:
    """Store the schema and every component's dataclass in Hydra's ConfigStore, and add the
    ``conf`` package of each plugin that has one to Hydra's search path."""
    from hydra.core.config_store import ConfigStore
    from hydra.core.plugins import Plugins

    from gsa_platform.searchpath import PluginSearchPath

    store = ConfigStore.instance()
    store.store(name="schema", node=root(registry), provider="gsa_platform")
    for group in (*SLOTS, "data"):
        for name, entry in registry.entries[group].items():
            provider = f"plugin {entry.plugin.distribution}"
            store.store(group=group, name=name, node=entry.component.config, provider=provider)
    Plugins.instance().register(PluginSearchPath)


def root(registry: Registry) -> type:
    """RootConfig with a typed key under ``callbacks`` for every callback that is installed."""
    settings = {n: entry.component.config for n, entry in registry.entries["callback"].items()}
    fields = [(name, kind, field(default_factory=kind)) for name, kind in settings.items()]
    callbacks = make_dataclass("CallbacksConfig", fields)
    added = [("callbacks", callbacks, field(default_factory=callbacks))]
    return make_dataclass("RootConfig", added, bases=(RootConfig,))
