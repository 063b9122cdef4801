"""GRPO for latent thoughts."""

import copy
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Sampler
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, TrainerCallback
from trl import GRPOTrainer
from trl.trainer import utils as trl_utils

from ..data import latent_thinking_prompt
from ..data.rows import fingerprint
from ..inspection.non_finite import non_finite_weights
from ..models import LatentThinkingForCausalLM
from ..models.latent_thinking.thinking_chat_template import tokenizer_to_save
from ..training.base_trainer import BaseTrainer
from .arguments import LatentGRPOTrainingArguments
from .rewards import PassRates


class LatentGRPOTrainer(BaseTrainer, GRPOTrainer):
    """
    TRL's `GRPOTrainer` (arXiv 2402.03300) for a model that thinks in latent space: the thinker learns from the answers
    that the frozen backbone gives after its thoughts. Problems are plain prompts, each followed by a thought.

    Answers are sampled, and their probabilities computed, in evaluation mode: both without dropout and with the same
    halting, so before the first update on a batch of answers the ratio of new and old probability is 1. Gradients
    reach compressor, SequenceTRM and projector through the last latent recursion of each thought. The latent token,
    which is never sampled, keeps its share of the probabilities.

    With `beta`, the reference of the KL term is a copy of the initial thinker on the same backbone. Checkpoints hold
    the answers that later steps still learn from, so a resumed run goes on exactly.

    Args:
        model: with a frozen backbone, and without `noise_std`.
        reward_funcs: one or several, as in TRL, such as [`correctness_reward`].
        train_dataset, eval_dataset: problems, with a column `prompt` (text) and the columns that rewards read.

    Raises:
        ValueError: for a backbone that trains, noisy thoughts, fewer problems than a batch takes, or checkpoints that
            would leave out a backbone that nobody could find again.
    """

    args: LatentGRPOTrainingArguments
    train_dataset: Dataset

    def __init__(
        self,
        model: LatentThinkingForCausalLM,
        reward_funcs: Any,
        args: LatentGRPOTrainingArguments,
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ):
        if any(parameter.requires_grad for parameter in model.backbone.parameters()):
            raise ValueError("GRPO trains the thinker: freeze the backbone, model.backbone.requires_grad_(False).")
        if model.config.noise_std:
            raise ValueError(
                f"With noise_std={model.config.noise_std} answers have no probability of their own, since thoughts "
                f"differ from pass to pass: set model.config.noise_std = 0."
            )
        if processing_class is not None:
            processing_class = tokenizer_to_save(processing_class, model.config)
        # TRL would load the reference from the model's name, with a second backbone.
        beta, args.beta = args.beta, 0.0
        super().__init__(
            model=model,
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
        )
        self.beta = args.beta = beta
        if beta:
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise ValueError("The reference shares the backbone, FSDP and DeepSpeed shard it: use beta=0, or DDP.")
            reference = LatentThinkingForCausalLM(model.config, model.backbone, copy.deepcopy(model.thinker))
            self.ref_model = reference.requires_grad_(False).eval()
            if hasattr(trl_utils, "add_fused_lm_head"):  # since TRL 1.15, which needs Python 3.11
                trl_utils.add_fused_lm_head(self.ref_model, temperature=args.temperature)
        self._check_number_of_problems()

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As in `Trainer`; with `args.curriculum`, orders the problems first."""
        if self.args.curriculum:
            self._order_problems(resume_from_checkpoint)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in `Trainer`; `eval_reward` is the mean reward. The same weights get the same samples."""
        with torch.random.fork_rng():
            torch.manual_seed(self.args.seed)
            return super().evaluate(*args, **kwargs)

    @torch.no_grad()
    def pass_rates(self, problems: Dataset, num_samples: int) -> list[float]:
        """
        The mean reward of `num_samples` answers to each problem; with [`correctness_reward`], the share of right ones.
        Processes divide the problems among them; their number does not change the result.
        """
        size = max(1, self.args.per_device_eval_batch_size // num_samples)
        starts = list(range(0, len(problems), size))
        local_starts = starts[self.args.process_index :: self.args.world_size]
        local_rates: list[tuple[int, list[float]]] = []
        for start in tqdm(local_starts, desc="Pass rates", disable=self.args.disable_tqdm):
            batch = problems.select(range(start, min(start + size, len(problems))))
            rows = [row for row in batch for _ in range(num_samples)]
            with torch.random.fork_rng():
                torch.manual_seed(self.args.seed + start)
                rewards = self._rewards_of_samples(rows)
            local_rates.append((start, rewards.view(-1, num_samples).mean(1).tolist()))
        return [rate for _, rates in sorted(gather_object(local_rates)) for rate in rates]

    def _rewards_of_samples(self, rows: list[dict[str, Any]]) -> torch.Tensor:
        """The reward of a sampled answer to each problem, `[rows]`."""
        prompts = [row["prompt"] for row in rows]
        answers, _ = self._generate_single_turn(self._tokenize_prompts(prompts)[0], None, {}, 1)
        texts = self.processing_class.batch_decode(answers, skip_special_tokens=True)
        columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
        arguments = {**columns, "prompts": prompts, "completions": texts, "completion_ids": answers}
        rewards = [torch.tensor(reward(**arguments)) for reward in self.reward_funcs]
        return (torch.stack(rewards, dim=1) * self.reward_weights).sum(1)

    def _order_problems(self, resume_from: str | bool | None) -> None:
        args = self.args
        problems = self.train_dataset.shuffle(seed=args.seed)
        if resume_from:
            folder = os.path.dirname(os.path.abspath(resume_from)) if isinstance(resume_from, str) else args.output_dir
            pass_rates = PassRates.load(folder, problems)
        else:
            if args.max_steps > 0:
                steps = args.max_steps * args.gradient_accumulation_steps
                batches = math.ceil(steps / (args.steps_per_generation * args.num_iterations))
                problems = problems.select(range(min(len(problems), batches * self._problems_per_batch)))
            num_samples = args.curriculum_samples or args.num_generations
            pass_rates = PassRates(self.pass_rates(problems, num_samples), num_samples, fingerprint(problems))
        if self.is_world_process_zero():
            print(f"Before training: {pass_rates}.")
            pass_rates.save(args.output_dir)
        self.train_dataset = pass_rates.easy_to_hard(problems, args.drop_uninformative)
        self._check_number_of_problems()

    @property
    def _problems_per_batch(self) -> int:
        return self.args.generation_batch_size // self.args.num_generations

    def _check_number_of_problems(self) -> None:
        if len(self.train_dataset) < self._problems_per_batch:
            raise ValueError(
                f"There are {len(self.train_dataset)} problems to train on, and a batch takes "
                f"{self._problems_per_batch}, with num_generations={self.args.num_generations} samples of each: use "
                f"more problems, or a smaller batch."
            )

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler:
        return _EpochSampler(
            data_source=self.train_dataset if dataset is None else dataset,
            mini_repeat_count=self.num_generations,
            batch_size=self._problems_per_batch,
            repeat_count=self.num_iterations * self.args.steps_per_generation,
            shuffle=self.shuffle_dataset and not self.args.curriculum,
            seed=self.args.seed,
        )

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[Any], None, dict[str, Any]]:
        """The tokens of each problem and the thought after it; TRL repeats each problem several times."""
        tokenizer, config = self.processing_class, self.model.config
        tokens = {prompt: latent_thinking_prompt(prompt, tokenizer, config) for prompt in set(prompts)}
        return [tokens[prompt] for prompt in prompts], None, {}

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        """As in TRL; a FloatingPointError if weights have become NaN, so that there is nothing to sample from."""
        try:
            with _evaluation_mode(self.model):
                return super()._generate_single_turn(*args, **kwargs)
        except RuntimeError as error:
            if "probability tensor" not in str(error):
                raise
            broken = len(non_finite_weights(self.accelerator.unwrap_model(self.model)))
            raise FloatingPointError(
                f"After step {self.state.global_step} the probabilities of the answers are NaN or infinite, and so "
                f"are {broken} of the parameters and buffers. {self._advice_on_non_finite()}"
            ) from error

    def _get_per_token_logps_and_entropies(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _evaluation_mode(model):
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)

    def create_model_card(self, model_name: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Only once the model is in the output folder: TRL asks for a card before every checkpoint."""
        if os.path.isfile(os.path.join(self.args.output_dir, "config.json")):
            super().create_model_card(model_name, *args, **kwargs)

    def _origin_of_non_finite(self, *batch: Any) -> str:
        return "Look at the rewards: the answers were sampled from finite probabilities."

    def _save_rng_state(self, output_dir: str) -> None:
        """Also the answers: the Trainer calls this on every process for every checkpoint."""
        super()._save_rng_state(output_dir)
        state = {"step": torch.tensor(self._step)}
        for number, batch in enumerate(self._buffered_inputs or ()):
            state |= {f"{number}.{name}": value.clone() for name, value in batch.items()}
        save_file(state, self._answers_file(output_dir))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is not None:
            state = load_file(self._answers_file(checkpoint))
            self._step = int(state.pop("step"))
            self._buffered_inputs: Any = [{} for _ in range(self.args.steps_per_generation)]
            for name, value in state.items():
                number, _, field = name.partition(".")
                self._buffered_inputs[int(number)][field] = value.to(self.args.device)

    def _answers_file(self, folder: str) -> str:
        return os.path.join(folder, f"answers_{self.args.process_index}.safetensors")


class _EpochSampler(trl_utils.RepeatSampler):
    """TRL's, with an order that depends on the epoch, not on the number of calls, so that resuming keeps it."""

    def set_epoch(self, epoch: int) -> None:
        if self.shuffle:
            self.generator.manual_seed(self.seed + epoch)


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
