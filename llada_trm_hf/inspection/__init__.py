"""Looking at what a model did. Importing this teaches a `RefinementTrace` to draw itself."""

from .trace import plot_trace, write_html

__all__ = ["plot_trace", "write_html"]
