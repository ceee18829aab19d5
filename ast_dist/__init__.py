"""Train image classifiers on the samples that still teach the model something, and never lose work."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ast_dist.errors import UserError
    from ast_dist.own_loop import Gate
    from ast_dist.train import train

__all__ = ["Gate", "UserError", "__version__", "train"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # They bring torch with them, which looking at a run does without.
    if name == "Gate":
        return importlib.import_module("ast_dist.own_loop").Gate
    if name == "UserError":
        return importlib.import_module("ast_dist.errors").UserError
    if name == "train":
        # The module that `python -m ast_dist.train` runs; it can be called. Once it is imported, by whomever, Python
        # itself sets the attribute `train` of this package to the module, so a function could not stand here for long.
        return importlib.import_module("ast_dist.train")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
