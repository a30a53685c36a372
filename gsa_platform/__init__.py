"""Experiment platform for attention research; plugin authors import everything from here."""

from gsa_platform.components import Capabilities, Component
from gsa_platform.extensions import BenchmarkSettings, CallbackSettings, Extension
from gsa_platform.hookspecs import PLUGIN_API, hookimpl
from gsa_platform.trial import Trial

__version__ = "0.1.0"
__all__ = [
    "hookimpl",
    "Component",
    "Capabilities",
    "Trial",
    "Extension",
    "BenchmarkSettings",
    "CallbackSettings",
    "PLUGIN_API",
    "__version__",
]
