"""What models need on their way to and from the Hub."""

from .legacy import import_legacy, read_legacy_hidden_pairs
from .model_card import model_card
from .onnx import OnnxExport, export_onnx
from .push import export_custom_generate, push_checkpoint, push_custom_generate

__all__ = [
    "OnnxExport",
    "export_custom_generate",
    "export_onnx",
    "import_legacy",
    "model_card",
    "push_checkpoint",
    "push_custom_generate",
    "read_legacy_hidden_pairs",
]
