"""Model cards, and uploading a checkpoint's folder to the Hub."""

from .model_card import custom_generate_card, model_card
from .publishing import files_to_publish, publish
from .training_record import TRAINING_SETTINGS_FILE, training_settings

__all__ = [
    "TRAINING_SETTINGS_FILE",
    "custom_generate_card",
    "files_to_publish",
    "model_card",
    "publish",
    "training_settings",
]
