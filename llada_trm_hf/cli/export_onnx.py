"""`llada-trm export-onnx`: the forward pass of a hybrid or a backbone as an ONNX graph."""

import logging
import os

from ..evaluation.language_models import load_weights
from ..hub import export_onnx
from ..hub.onnx import TOLERANCE, check_export
from .command import CommandParser


def run(arguments: list[str]) -> None:
    parser = CommandParser(
        prog="llada-trm export-onnx",
        description="Writes the forward pass of a hybrid, refinement included, or of a backbone as an ONNX graph with "
        "dynamic batch and length, and compares it with PyTorch in onnxruntime.",
    )
    parser.add_argument("--checkpoint", required=True, help="folder or repository; loaded in float32")
    parser.add_argument("--output", required=True, help="file; weights above 1 GiB go to a second one, OUTPUT.data")
    parser.add_argument("--max_recursive_steps", type=int, help="by default the refiner's own")
    parser.add_argument(
        "--tolerance", type=float, default=TOLERANCE, help="largest difference from PyTorch that is accepted"
    )
    options = parser.parse_args(arguments)
    check_export(options.output)
    for library in ("torch.onnx", "onnx_ir"):  # warns of optional packages and of its own code
        logging.getLogger(library).setLevel(logging.ERROR)

    model = load_weights(options.checkpoint, "float32").eval()
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"Writing {type(model).__name__}, {size:,} parameters, and comparing it with PyTorch ...", flush=True)
    export = export_onnx(model, options.output, options.max_recursive_steps, options.tolerance)
    print(f"largest difference from PyTorch: {export.largest_difference:.2g}")
    if hasattr(model, "refiner"):
        print(f"chunks refined in the comparison: {export.refined_chunks}")
    for file in export.files:
        print(f"{os.path.getsize(file):>14,}  {file}")
