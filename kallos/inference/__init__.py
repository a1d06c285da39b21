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
        "scaling": (
            "CURVES",
            "Scaling",
            "describe_scaling",
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
        "service_settings": (
            "ServiceSettings",
            "is_loopback",
        ),
        "api_keys": (
            "KeyRing",
            "new_key",
            "read_keys",
            "revoke_key",
        ),
        "shelf": (
            "Entry",
            "Shelf",
            "speaking",
            "watch",
        ),
        "request_bodies": (
            "Gone",
            "Question",
            "Refusal",
            "read_body",
            "read_question",
        ),
    },
)
