"""From raw files and the sample market to stored bars, features and splits."""

from kallos import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "bars": (
            "check_bars",
            "gap_map",
            "off_grid",
            "segment_ids",
            "to_utc",
        ),
        "sources": (
            "find_raw_files",
            "read_bars_file",
            "sample_bars",
        ),
        "store": (
            "UtcTime",
            "WriteReport",
            "connect",
            "list_assets",
            "read_bars",
            "read_features",
            "redact",
            "to_url",
            "write_bars",
            "write_features",
        ),
        "splits": (
            "FoldBounds",
            "WalkForwardSplit",
            "date_bounds",
            "layout_table",
            "walk_forward_bounds",
        ),
    },
)
