"""Measuring what a model gets right."""

from .accuracy import Accuracy, exact_match_accuracy

__all__ = ["Accuracy", "exact_match_accuracy"]
