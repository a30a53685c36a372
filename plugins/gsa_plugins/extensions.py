"""Records of the first-party data modules, evaluation task, callback and report section, through
the hooks that anyone's use. Targets are strings: nothing heavy is imported."""

from dataclasses import dataclass, field

from gsa_platform import CallbackSettings, Capabilities, Extension, hookimpl
from gsa_platform.config import DataConfig

_TEXT = "gsa_platform.data.datamodule:TextDataModule"


@dataclass
class StdlibDataConfig(DataConfig):
    name: str = "stdlib"


@dataclass
class TextDataConfig(DataConfig):
    name: str = "text"
    paths: list[str] = field(default_factory=list)  # files, folders or globs with **


@dataclass
class HfDataConfig(DataConfig):
    name: str = "hf"
    # A name on the Hub; or a folder of jsonl, json, parquet, csv or txt files, one such file, or a
    # folder written by save_to_disk.
    path: str | None = None
    config_name: str | None = None  # subset
    split: str = "train"  # or a slice, such as train[:10%]
    column: str = "text"  # the column with the text, one document a row


@dataclass
class LossSpikesConfig(CallbackSettings):
    factor: float = 1.5  # a spike is more than this many medians of the last steps
    gradient_factor: float = 4.0  # the same for the gradient norm
    window: int = 20  # steps whose median is taken
    stop: bool = False  # end the training at a loss or gradient that is not finite


@hookimpl
def gsa_register_data() -> list[Extension]:
    return [
        Extension(
            "stdlib", _TEXT, StdlibDataConfig, "Sources of the standard library, no download"
        ),
        Extension("text", _TEXT, TextDataConfig, "Your own text files"),
        Extension(
            "hf",
            _TEXT,
            HfDataConfig,
            "A Hugging Face data set",
            Capabilities(needs=("datasets",)),
        ),
    ]


@hookimpl
def gsa_register_eval_task() -> Extension:
    return Extension(
        "perplexity",
        "gsa_platform.eval.perplexity:Perplexity",
        summary="Validation loss, overall and by position in the context",
    )


@hookimpl
def gsa_register_callback() -> Extension:
    return Extension(
        "loss_spikes",
        "gsa_plugins.callback.loss_spikes:LossSpikes",
        LossSpikesConfig,
        "Tells and counts steps whose loss or gradient norm jumps",
    )


@hookimpl
def gsa_register_report_section() -> Extension:
    return Extension(
        "attention",
        "gsa_platform.report.attention:attention_section",
        summary="Keys attended, selection recall, first-token share, gates",
    )
