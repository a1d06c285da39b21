"""The run notebooks, executed: papermill reports."""

from kallos import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
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
