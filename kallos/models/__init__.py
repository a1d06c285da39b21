"""From stored features to a tuned and trained model."""

from kallos import lazy

__getattr__, __dir__, __all__ = lazy(__name__, {})
