"""From raw files and the sample market to stored bars, features and splits."""

from kallos import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {"sources": (), "store": (), "features": (), "splits": ()},
)
