"""From stored features to a tuned and trained model."""

from kallos import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "preprocessing": ("create_feature_transformer",),
        "datasets": (
            "load_features_from_db",
            "calculate_dynamic_wf_kwargs",
            "get_walk_forward_splits",
            "prepare_darts_timeseries",
        ),
        "architectures": ("create_model",),
        "validation": (),
        "tuner": ("objective", "run_tuning"),
        "trainer": ("train_and_save_model",),
    },
)
