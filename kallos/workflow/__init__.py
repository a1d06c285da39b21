"""The run notebooks, executed: papermill reports."""

from kallos import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "data_fingerprints": (
            "Asked",
            "changed_tables",
            "data_fingerprints",
        ),
        "run_records": (
            "KIND",
            "LOCK",
            "Run",
            "begun_at",
            "find_run_folder",
            "find_runs",
            "flatten",
            "is_running",
            "open_run",
            "part_folder",
            "read_run",
        ),
        "run_comparison": (
            "Comparison",
            "GROUPS",
            "HIGHER",
            "LOWER",
            "compare_runs",
            "differing_settings",
            "figures_of",
            "shared_figures",
        ),
        "run_differences": (
            "COMPARED",
            "Difference",
            "Place",
            "VOLATILE",
            "compare_folders",
        ),
        "reproduction": (
            "Reproduction",
            "reproduce",
            "surroundings_notes",
        ),
        "pruning": (
            "Pruned",
            "SHOWCASE",
            "gone_runs",
            "prune_runs",
        ),
        "reports": (
            "Report",
            "ReportEngine",
            "check_kernel",
            "check_parameters",
            "find_notebook",
            "run_notebook",
            "to_page",
        ),
    },
)
