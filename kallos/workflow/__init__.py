"""The run notebooks, executed: papermill reports."""

from kallos import lazy

__getattr__, __dir__, __all__ = lazy(__name__, {"reports": ()})
