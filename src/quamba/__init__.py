"""Post-training quantization of Mamba and Mamba-2 language models.

import quamba

model = quamba.load("state-spaces/mamba2-130m")
small, report = quamba.quantize(model, "w4a8", "calibration.txt")
quamba.save(small, "mamba2-130m-w4a8")
print(quamba.load("mamba2-130m-w4a8").generate("Once upon a time", max_new_tokens=50))
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quamba.api import Model, convert, export_zoo, load, quantize, save
    from quamba.calibration.data import CalibrationSet, CalibrationSpec, load_calibration
    from quamba.errors import QuambaError
    from quamba.recipes.recipe import Recipe, load_recipe
    from quamba.runtime.sampling import SamplingParams

__version__ = "0.1.0"

# Imported on first use, so that `import quamba` and `quamba --help` do not wait for torch.
_HOMES = {
    "Model": "quamba.api",
    "convert": "quamba.api",
    "export_zoo": "quamba.api",
    "load": "quamba.api",
    "quantize": "quamba.api",
    "save": "quamba.api",
    "CalibrationSet": "quamba.calibration.data",
    "CalibrationSpec": "quamba.calibration.data",
    "load_calibration": "quamba.calibration.data",
    "QuambaError": "quamba.errors",
    "Recipe": "quamba.recipes.recipe",
    "load_recipe": "quamba.recipes.recipe",
    "SamplingParams": "quamba.runtime.sampling",
}

__all__ = [
    "CalibrationSet",
    "CalibrationSpec",
    "Model",
    "QuambaError",
    "Recipe",
    "SamplingParams",
    "__version__",
    "convert",
    "export_zoo",
    "load",
    "load_calibration",
    "load_recipe",
    "quantize",
    "save",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'quamba' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
