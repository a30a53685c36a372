"""The text of ``gsa-platform --help``, with the choices that this installation offers."""

from __future__ import annotations

import textwrap

from gsa_platform import __version__, compose

_ORDER = ("experiment", "attention", "indexer", "sparsity", "gate", "objective", "model", "data")

_HEAD = """\
gsa-platform {version}: train and compare attention variants on long text.

A run is an experiment plus what you change of it, typed as key=value:

  python -m gsa_platform [experiment=NAME] [group=choice ...] [key=value ...]

Commands
  (none)                 train
  check                  compose, validate and try the combination briefly
  eval checkpoint=PATH   evaluate a checkpoint
  bench NAME             check and time an operation on this machine; bench NAME --help
  plugins list           every component, where it comes from and whether it works here
  plugins show NAME      its settings with defaults, and an example
  plugins check NAME     the contract kit on one component, as a table
  plugins matrix         every combination of components: works, or why it is refused
  plugins new NAME --slot SLOT
                         a package of your own to start from, with its tests
  runs list              every run: status, start, validation loss, folder
  runs doctor [--fix]    runs left open by a process that was killed; --fix closes them
  help                   this text

Examples
  gsa-platform experiment=gsa_128k                        the main experiment
  gsa-platform experiment=gsa_128k attention=dense        the same with dense attention
  gsa-platform experiment=gsa_128k trainer.devices=8      on eight GPUs
  gsa-platform -m experiment=smoke sparsity.k=128,256     one run per value
  gsa-platform experiment=smoke --cfg job                 show every setting, run nothing

Groups and their choices
"""

_TAIL = """
Flags of Hydra
  -m, --multirun         one run per combination of comma-separated values
  --cfg job              show the resolved configuration
  --info                 how the configuration was composed
  --hydra-help           the rest

Completion in bash
  eval "$(gsa-platform --shell-completion install=bash)"

Environment
  GSA_PLUGIN_PATH        one-off plugin files (as plugins_path=./file.py)
  GSA_DISABLE_PLUGINS    plugins to leave out, separated by commas
  GSA_STRICT_PLUGINS=1   stop at a plugin that fails to load
  GSA_FULL_ERROR=1       tracebacks of user errors
"""


def help_text() -> str:
    """Return the help text; loads the plugins, since they offer choices too."""
    groups = compose.choices()
    names = [g for g in _ORDER if g in groups] + [g for g in groups if g not in _ORDER]
    lines = []
    for group in names:
        lead = f"  {group:<12} "
        lines += textwrap.wrap(
            ", ".join(groups[group]), 92, initial_indent=lead, subsequent_indent=" " * 15
        )
    return _HEAD.format(version=__version__) + "\n".join(lines) + "\n" + _TAIL.rstrip("\n")
