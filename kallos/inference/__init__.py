"""Self-contained bundles, batch inference, the HTTP service, drift; a module is loaded when one of its names is first used."""

from kallos import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "recipes": (
            "FORMULAS",
            "Recipe",
            "as_market",
            "bars_needed",
            "column",
            "compute_recipes",
            "describe_feature",
            "newest_rows",
            "read_recipe",
        ),
        "bundle_files": (
            "BundleFiles",
            "MANIFEST",
            "MOST_BYTES",
            "SCHEMA",
            "SIGNATURE",
            "read_bundle_files",
            "read_object",
            "read_public_key",
            "read_reference",
            "seal",
            "sign_manifest",
            "zip_bytes",
        ),
        "bar_arrays": (
            "Arrays",
            "arrays_of",
            "check_arrays",
            "step_of",
        ),
        "answers": (
            "Answer",
            "MOST_WINDOWS",
            "answer_newest",
            "answer_rows",
            "by_asset",
            "check_all",
            "half_width",
        ),
        "packed_models": (
            "PackedModel",
            "read_packed_model",
        ),
        "onnx_guard": (
            "open_session",
        ),
        "bundle": (
            "Bundle",
            "golden_example",
            "load_bundle",
            "open_bundle",
        ),
        "members": (
            "Member",
            "Prepared",
            "Window",
            "deviations",
            "newest_window",
            "past_target",
            "prepare_rows",
            "read_member",
            "run_lengths",
        ),
        "scaling": (
            "CURVES",
            "Scaling",
            "describe_scaling",
            "read_scaling",
        ),
    },
)
