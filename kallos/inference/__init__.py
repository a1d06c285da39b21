"""Self-contained bundles, batch inference, the HTTP service, drift; a module is loaded when one of its names is first used."""

from kallos import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
    },
)
