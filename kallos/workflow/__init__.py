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
        "bar_checks": (
            "TOLERANCES",
            "Tolerances",
            "bar_checks",
            "columns_check",
            "duplicates_check",
            "gaps_check",
            "inputs_of_features",
            "order_check",
            "stamps_check",
            "values_check",
        ),
        "row_checks": (
            "end_date_check",
            "features_check",
            "folds_check",
            "held_out_check",
            "row_checks",
            "settings_check",
            "target_check",
        ),
        "fit_costs": ("FitCost", "Measured", "measure", "measure_fit", "serve"),
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
