"""Model cards, and uploading a checkpoint's folder to the Hub."""

from .model_card import CUSTOM_GENERATE_CARD, model_card
from .publishing import files_to_publish, publish
from .training_record import TRAINING_SETTINGS_FILE, training_settings

__all__ = [
    "CUSTOM_GENERATE_CARD",
    "TRAINING_SETTINGS_FILE",
    "files_to_publish",
    "model_card",
    "publish",
    "training_settings",
]
