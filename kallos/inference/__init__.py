"""Self-contained bundles, batch inference, the HTTP service, drift; a module is loaded when one of its names is first used."""

from kallos import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "onnx_wire": (
            "Field",
            "GRAMMAR",
            "MOST_FIELDS",
            "MOST_LETTERS",
            "MOST_LIST_BYTES",
            "read_message",
        ),
        "onnx_nodes": (
            "ALLOWED",
            "MOST_AXES",
            "MOST_DEPTH",
            "MOST_SIZE",
            "MOST_WINDOW",
            "check_node",
            "check_sizes",
            "check_tensor",
            "check_trees",
            "refusal",
        ),
        "onnx_guard": (
            "IR_VERSION",
            "MOST_BYTES",
            "MOST_MEMORY",
            "MOST_NAMES",
            "MOST_NODES",
            "OPSETS",
            "check_onnx",
            "open_session",
            "runtime_faults",
        ),
        "onnx_folding": (
            "BATCHES",
            "fold_shapes",
            "observe",
            "reached_by_data",
            "take_branches",
        ),
        "onnx_trees": (
            "Graph",
            "Tree",
            "boosting_graph",
            "estimator_graph",
            "forest_graph",
            "round_down",
            "tree_node",
        ),
        "onnx_export": (
            "INPUTS",
            "OUTPUT",
            "export_onnx",
            "merge_onnx",
        ),
    },
)
