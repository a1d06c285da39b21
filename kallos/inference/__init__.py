"""Self-contained bundles, batch inference, the HTTP service, drift; a module is loaded when one of its names is first used."""

from kallos import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "bar_files": (
            "GivenFile",
            "SeriesFiles",
            "files_of",
            "given_files",
        ),
        "bar_feeds": (
            "CHUNK",
            "closed_bars",
            "file_chunks",
            "in_steps",
            "store_chunks",
        ),
        "forecast_files": (
            "Stored",
            "append_forecasts",
            "check_continues",
            "stored_forecasts",
        ),
        "batch": (
            "BatchReport",
            "Feed",
            "batch_table",
            "predict_chunks",
            "write_forecasts",
        ),
    },
)
