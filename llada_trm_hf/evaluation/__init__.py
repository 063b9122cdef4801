"""Measuring what a model gets right."""

from .answer_extraction import extract_answer
from .answer_values import answers_match
from .code_execution import ExecutionLimits, run_tests, sandbox_protections
from .refiner_calibration import CalibrationPoint, RefinerCalibration, calibrate_refiner
from .scoring import Accuracy, exact_match_accuracy

__all__ = [
    "Accuracy",
    "CalibrationPoint",
    "ExecutionLimits",
    "RefinerCalibration",
    "answers_match",
    "calibrate_refiner",
    "exact_match_accuracy",
    "extract_answer",
    "run_tests",
    "sandbox_protections",
]
