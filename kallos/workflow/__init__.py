"""The run notebooks, executed: papermill reports."""

from kallos import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "preparation": ("Prepared", "prepare_bars", "prepare_features", "register_once", "source_of"),
        "checks": ("BAD", "Check", "Status", "as_records", "attempt", "checks_text"),
        "kernels": ("own_kernel",),
        "machine": (
            "ENOUGH",
            "Needs",
            "disk_check",
            "find_constraints",
            "free_memory_mb",
            "machine_checks",
            "memory_check",
            "packages_check",
            "python_check",
            "study_check",
            "torch_check",
            "write_check",
        ),
        "services": ("built_at", "clock_check", "database_check", "exchange_check", "storage_check"),
        "doctor": ("doctor_record", "run_doctor", "worst_of"),
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
