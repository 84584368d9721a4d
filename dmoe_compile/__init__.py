"""Mixture-of-experts routing for diffusion language models, as torch.compile passes.

``torch.compile(model, backend="dmoe", options={"passes": ["dmoe"]})`` is the whole interface; the
names below are the rest of it. They load on first use, so that importing the package stays cheap:
the backend entry point is looked up by torch whenever anything lists its backends.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

_here = Path(__file__).parent
# In a checkout passes/ and kernels/ lie beside this package. So does the package itself: once is enough for those who
# walk its modules, as torch does for TORCH_LOGS=dmoe_compile.
if not (_here / "kernels").is_dir() and "." not in __name__:
    __path__.append(str(_here.parent))

if TYPE_CHECKING:
    from dmoe_compile.backend import compile as compile
    from dmoe_compile.capture import PrepareReport as PrepareReport
    from dmoe_compile.capture import prepare as prepare
    from dmoe_compile.capture import unprepare as unprepare
    from dmoe_compile.config import Config as Config
    from dmoe_compile.context import Denoising as Denoising
    from dmoe_compile.context import denoising as denoising
    from dmoe_compile.generation import Generated as Generated
    from dmoe_compile.generation import generate as generate
    from dmoe_compile.loading import load_demo_model as load_demo_model
    from dmoe_compile.passes.policies import register_policy as register_policy
    from dmoe_compile.pipelines import StepCallback as StepCallback
    from dmoe_compile.report import Report as Report
    from dmoe_compile.report import explain as explain
    from dmoe_compile.runtime import RoutingStats as RoutingStats
    from dmoe_compile.runtime import routing_stats as routing_stats

    __version__: str

_HOME = {
    "Config": "config",
    "Denoising": "context",
    "Generated": "generation",
    "PrepareReport": "capture",
    "Report": "report",
    "RoutingStats": "runtime",
    "StepCallback": "pipelines",
    "compile": "backend",
    "denoising": "context",
    "explain": "report",
    "generate": "generation",
    "load_demo_model": "loading",
    "prepare": "capture",
    "register_policy": "passes.policies",
    "routing_stats": "runtime",
    "unprepare": "capture",
}
__all__ = [
    "Config",
    "Denoising",
    "Generated",
    "PrepareReport",
    "Report",
    "RoutingStats",
    "StepCallback",
    "compile",
    "denoising",
    "explain",
    "generate",
    "load_demo_model",
    "prepare",
    "register_policy",
    "routing_stats",
    "unprepare",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("dmoe-compile")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


if "transformers.integrations.moe" in sys.modules:  # so that set_experts_implementation("dmoe") works at once;
    importlib.import_module(f"{__name__}.experts").register()  # where it is loaded later, the backend registers
