"""Self-contained bundles, batch inference, the HTTP service, drift; a module is loaded when one of its names is first used."""

from kallos import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "onnx_export": (
            "INPUTS",
            "IR_VERSION",
            "ML_OPSET",
            "OPSET",
            "OUTPUT",
            "export_onnx",
            "merge_onnx",
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
    },
)
