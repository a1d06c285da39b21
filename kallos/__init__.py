"""Reproducible research on forecasting crypto prices; a module is loaded when one of its names is first used."""

from importlib import import_module

__version__ = "0.1.0"


def lazy(package: str, modules: dict[str, tuple[str, ...]]) -> tuple:
    """Returns the `__getattr__`, `__dir__` and `__all__` of a folder whose modules load when first used (PEP 562)."""
    home = {name: module for module, names in modules.items() for name in names}
    public = sorted({*modules, *home})

    def load(name: str):
        if name in home:
            return getattr(import_module(f"{package}.{home[name]}"), name)
        if name in modules:
            return import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}; it has {', '.join(public)}")

    return load, lambda: public, public


def load_ipython_extension(shell) -> None:
    """`%load_ext kallos`: frames of bars and studies say what they are; everything else looks as before."""
    import_module("kallos.workflow.notebook_displays").show_in(shell)


def unload_ipython_extension(shell) -> None:
    """`%unload_ext kallos`: everything looks as before."""
    import_module("kallos.workflow.notebook_displays").hide_in(shell)


__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "core": (),
        "data": (),
        "models": (),
        "evaluation": (),
        "inference": (),
        "workflow": (),
        "option_kinds": (
            "flag",
            "many",
            "option",
        ),
        "completions": ("COMPLETIONS",),
        "answers": (
            "Answer",
            "Rows",
            "speaking",
            "tell",
        ),
        "inference_options": ("INFERENCE",),
        "runs_options": ("RUNS_OPTIONS",),
        "options": (
            "Interrupted",
            "OPTIONS",
            "command",
            "flattered",
            "same_database",
        ),
        "data_commands": (
            "column_mapping",
            "data",
            "data_app",
            "features",
            "fetch",
            "ingest",
            "register_own",
            "sample",
        ),
        "audit_commands": (
            "LeakFound",
            "audit",
            "audit_app",
        ),
        "config_commands": (
            "config",
            "config_app",
        ),
        "dashboard_commands": ("dashboard", "dashboard_app"),
        "run_commands": (
            "run_app",
            "train",
            "tune",
        ),
        "validation_commands": (
            "cpcv",
            "cv",
            "validation_app",
            "walk_forward",
        ),
        "evaluate_commands": (
            "evaluate",
            "evaluate_app",
        ),
        "backtest_commands": (
            "backtest",
            "backtest_app",
        ),
        "bundle_commands": (
            "bundle",
            "bundle_app",
            "verify",
        ),
        "predict_commands": (
            "Incomplete",
            "Stale",
            "predict",
            "predict_app",
        ),
        "doctor_commands": (
            "doctor",
            "doctor_app",
            "preflight",
        ),
        "drift_commands": (
            "drift",
            "drift_app",
        ),
        "ensemble_commands": (
            "ensemble",
            "ensemble_app",
        ),
        "serve_commands": (
            "serve",
            "serve_app",
        ),
        "runs_commands": (
            "NotReproduced",
            "reproduce",
            "reproduce_app",
            "runs_app",
            "runs_compare",
            "runs_list",
            "runs_prune",
        ),
        "all_commands": (
            "RunFailed",
            "all_",
            "all_app",
        ),
        "main": (
            "app",
            "main",
        ),
        "filed_settings": (
            "file_settings",
            "filed_values",
        ),
        "data_options": ("DATA",),
    },
)
