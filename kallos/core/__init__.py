"""What every floor stands on: errors, table schemas, settings, runs, devices, metrics and plots."""

from kallos import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "errors": ("KallosError", "DataError", "ConfigError", "TrainingError", "ArtifactError"),
        "schemas": (),
        "config": (),
        "runs": (),
        "devices": (),
        "metrics": (),
        "plots": (),
    },
)
