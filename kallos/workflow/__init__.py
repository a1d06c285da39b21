"""One run: its settings, and the run notebooks executed as papermill reports."""

from kallos import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "setting_fields": (
            "Fault",
            "Section",
            "allowed",
            "closest",
            "faults_in",
            "pick",
            "plain_type",
            "section",
            "take",
            "unknown",
        ),
        "setting_sections": (
            "BacktestSection",
            "DataSection",
            "EvaluationSection",
            "HpoSection",
            "LabelSection",
            "ModelSection",
            "PathSection",
            "PipelineFields",
            "SplitSection",
            "TimeframeSettings",
            "TrainingSection",
            "WorkerSection",
            "of_timeframe",
        ),
        "setting_checks": ("impossible",),
        "pipeline_settings": (
            "PipelineSettings",
            "refuse",
        ),
        "settings": (
            "backtest_settings",
            "data_settings",
            "end_date_of",
            "evaluate_settings",
            "read_settings",
            "settings_of",
            "train_settings",
            "tune_settings",
        ),
        "settings_text": (
            "all_settings",
            "as_yaml",
            "setting_rows",
            "settings_table",
            "settings_text",
        ),
        "setting_words": (
            "overrides_of",
            "setting_options",
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
