"""Looking at what a model did. Importing this adds debug mode to the hybrid and drawings to a `RefinementTrace`."""

from . import debug_report as debug_report
from .non_finite import NonFiniteWatch, generate_finite
from .trace_drawing import plot_trace
from .trace_page import write_html
from .trace_story import trace_summary

__all__ = ["NonFiniteWatch", "generate_finite", "plot_trace", "trace_summary", "write_html"]
