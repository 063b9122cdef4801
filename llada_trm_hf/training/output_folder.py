"""The output folder of a run: what an earlier run left in it, and what this one leaves."""

import os

from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint


def train_and_save(trainer: Trainer, resume_from: str | None) -> None:
    """Trains, from the checkpoint `resume_from` if there is one, and leaves the model in the output folder."""
    trainer.train(resume_from_checkpoint=resume_from)
    trainer.save_model()
    trainer.save_state()


def checkpoint_to_resume(training: TrainingArguments) -> str | None:
    """The checkpoint to go on from; refuses to mix a new run with what an earlier one left in the folder."""
    folder, wanted = training.output_dir, training.resume_from_checkpoint
    last = get_last_checkpoint(folder) if os.path.isdir(folder) else None
    if wanted is None or str(wanted).lower() == "false":
        if last is not None or os.path.exists(os.path.join(folder, "trainer_state.json")):
            raise ValueError(
                f"{folder} holds an earlier run. Go on from it with --resume_from_checkpoint true, or choose another "
                f"--output_dir."
            )
        return None
    if str(wanted).lower() == "true":
        if last is None:
            raise ValueError(f"{folder} holds no checkpoint to resume from.")
        return last
    if not os.path.isfile(os.path.join(wanted, "trainer_state.json")):
        raise ValueError(f"{wanted} is not a checkpoint of a training run: it has no trainer_state.json.")
    return str(wanted)
