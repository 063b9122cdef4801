"""Measuring what a model gets right."""

from .answer_extraction import extract_answer
from .answer_values import answers_match
from .scoring import Accuracy, exact_match_accuracy

__all__ = ["Accuracy", "answers_match", "exact_match_accuracy", "extract_answer"]
