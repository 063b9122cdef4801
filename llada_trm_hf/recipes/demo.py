"""The demo: the whole journey on generated arithmetic, from scratch, in a few minutes on two cores."""

import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from datasets import disable_progress_bars
from transformers import PreTrainedModel, ProgressCallback
from transformers.utils import logging

from ..data import byte_tokenizer, load_reasoning_dataset, tokenize_reasoning
from ..evaluation import Accuracy, exact_match_accuracy
from ..hub.files import output_dir_lock, write_atomically, write_text
from ..models import LLaDAConfig, LLaDAForMaskedDiffusion, LLaDATRMForMaskedDiffusion, TRMRefinerConfig
from ..training import MaskedDiffusionTrainer, MaskedDiffusionTrainingArguments, set_trainable
from .run_setup import vocabulary_settings


@dataclass
class DemoSize:
    """How much the demo trains."""

    problems: int = 100_000
    held_out: int = 1_000
    backbone_steps: int = 2_000
    refiner_steps: int = 1_800


SMOKE_TEST = DemoSize(problems=2_000, held_out=50, backbone_steps=20, refiner_steps=10)
NUM_TERMS = 8
STEPS_COMPARED = (1, 2, 4)
DEPTHS_COMPARED = (1, 2, 4, 8, 16, 32)  # recursion steps
STEPS_SHOWN = 1  # in the trace: with more, there is hardly anything left for the refiner to fix
_LOCK = ".demo.lock"  # stays in the folder, and so tells that a demo that was killed is one
# Loads a checkpoint with transformers alone, as on a machine without this package.
REMOTE_CODE_SCRIPT = """
import json, sys, torch
sys.modules["llada_trm_hf"] = None
from transformers import AutoModelForMaskedLM
model = AutoModelForMaskedLM.from_pretrained(sys.argv[1], trust_remote_code=True)
print(json.dumps(model.generate(torch.tensor(json.loads(sys.argv[2]))).tolist()))
"""


def run_demo(output_dir: str, seed: int = 0, smoke_test: bool = False) -> None:
    """
    Trains a backbone, then a refiner on it, compares them with a control, and saves checkpoint, trace and results in
    `output_dir`: a new folder, or one with an earlier demo (else ValueError; RuntimeError while that still runs).
    `smoke_test` takes a few steps only.
    """
    found = os.listdir(output_dir) if os.path.isdir(output_dir) else []
    if found and not {"results.json", _LOCK} & set(found):
        raise ValueError(f"{output_dir} is not empty and holds no earlier demo: choose another --output_dir.")
    logging.set_verbosity_error()
    logging.disable_progress_bar()  # of loading and saving
    disable_progress_bars()
    with output_dir_lock(output_dir, _LOCK):
        Demo(output_dir, seed, SMOKE_TEST if smoke_test else DemoSize()).run()


class Demo:
    """The stages of the demo, each timed."""

    def __init__(self, folder: str, seed: int, size: DemoSize):
        self.folder, self.seed, self.size = folder, seed, size
        self.tokenizer = byte_tokenizer()
        self.seconds: dict[str, float] = {}

    def run(self) -> None:
        torch.manual_seed(self.seed)
        train, test = self.timed("make the data", self.make_data)
        backbone = LLaDAForMaskedDiffusion(self.backbone_config())
        example = self.tokenizer.decode(train[0]["input_ids"], skip_special_tokens=True)
        size = backbone.num_parameters()
        print(f"\n1. A masked-diffusion model of {size:,} parameters learns to fill in, e.g., {example}")
        self.timed("train the backbone", lambda: self.train(backbone, train, "backbone", self.size.backbone_steps))

        hybrid = self.make_hybrid(backbone)
        print(f"\n2. A TRM refiner of {hybrid.refiner.num_parameters():,} parameters learns on a frozen backbone")
        set_trainable(hybrid, ["refiner"])
        self.timed("train the refiner", lambda: self.train(hybrid, train, "refiner", self.size.refiner_steps))

        control_steps = self.steps_in_the_same_time()
        print(f"\n3. Control: a copy of the backbone trains on for as long as the refiner, {control_steps:,} steps")
        control = copy.deepcopy(backbone).requires_grad_(True)
        self.timed("train the control", lambda: self.train(control, train, "control", control_steps))

        print("\n4. All three answer the same held-out problems")
        results = self.timed("compare", lambda: compare(hybrid, control, test))
        curve = self.timed("recursion steps", lambda: accuracy_by_depth(hybrid, test))
        steps = fewest_steps_of_the_best(results["refined"])
        example, reloaded = self.timed("save and reload", lambda: self.save(hybrid, test, steps))
        self.report(results, curve, example, reloaded)

    def timed(self, name: str, stage: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = stage()
        self.seconds[name] = time.perf_counter() - start
        return result

    def make_data(self) -> tuple[Any, Any]:
        samples = []
        for split in (f"train[:{self.size.problems}]", f"test[:{self.size.held_out}]"):
            problems, response = load_reasoning_dataset("arithmetic", split, num_terms=NUM_TERMS, seed=self.seed)
            samples.append(tokenize_reasoning(problems, self.tokenizer, response))
        return samples[0], samples[1]

    def backbone_config(self) -> LLaDAConfig:
        return LLaDAConfig(
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
            initializer_range=0.1,  # about 1 / sqrt(width): so narrow a model hardly starts to learn at 0.02
            **vocabulary_settings(self.tokenizer),
        )

    def make_hybrid(self, backbone: LLaDAForMaskedDiffusion) -> LLaDATRMForMaskedDiffusion:
        # The prompt is one chunk, the response another.
        refiner = TRMRefinerConfig(hidden_size=64, chunk_size=NUM_TERMS + 1, initializer_range=0.1)
        # A toy this small is overconfident: at the default 0.5 hardly any chunk would count as unsure.
        return LLaDATRMForMaskedDiffusion.from_backbone(
            copy.deepcopy(backbone), refiner, min_confidence=0.95, deep_supervision_weight=1.0
        )

    def steps_in_the_same_time(self) -> int:
        seconds_per_step = self.seconds["train the backbone"] / self.size.backbone_steps
        return max(round(self.seconds["train the refiner"] / seconds_per_step), 1)

    def train(self, model: PreTrainedModel, samples: Any, name: str, steps: int) -> None:
        arguments = MaskedDiffusionTrainingArguments(
            output_dir=os.path.join(self.folder, "training", name),
            max_steps=steps,
            per_device_train_batch_size=128,
            learning_rate=3e-3,
            use_muon=True,
            lr_scheduler_type="linear",
            warmup_steps=min(100, steps // 2),
            weight_decay=0.01,
            adam_beta2=0.98,
            logging_steps=max(steps // 20, 1),
            save_strategy="no",
            disable_tqdm=False,
            use_cpu=True,
            dataloader_pin_memory=False,
            seed=self.seed,
            data_seed=self.seed + (name == "control"),  # not the same order of problems once more
        )
        trainer = MaskedDiffusionTrainer(model, arguments, train_dataset=samples, processing_class=self.tokenizer)
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(_LossProgressCallback)
        trainer.train()
        model.eval()

    def save(self, hybrid: LLaDATRMForMaskedDiffusion, test: Any, steps: int) -> tuple[torch.Tensor, bool]:
        """
        Saves checkpoint and trace. A problem with its answer `[L]`, one that the checkpoint's own settings get right
        if there is any; and whether a process without this package generates the same.
        """
        checkpoint = os.path.join(self.folder, "checkpoint")
        hybrid.generation_config.update(max_new_tokens=NUM_TERMS + 1, num_diffusion_steps=steps)
        hybrid.save_pretrained(checkpoint)
        self.tokenizer.save_pretrained(checkpoint)
        problems = problems_the_refiner_fixes(hybrid, test)
        prompts = problems[:, : NUM_TERMS + 1]
        output = hybrid.generate(
            prompts, num_diffusion_steps=STEPS_SHOWN, output_refinement_trace=True, return_dict_in_generate=True
        )
        page, trace = os.path.join(self.folder, "trace.html"), output.refinement_trace
        trace.expected = problems
        write_atomically(page, lambda path: trace.to_html(path, self.tokenizer))
        with tempfile.TemporaryDirectory() as cache:
            process = subprocess.run(
                [sys.executable, "-c", REMOTE_CODE_SCRIPT, checkpoint, json.dumps(prompts.tolist())],
                env={**os.environ, "HF_MODULES_CACHE": cache, "HF_HUB_OFFLINE": "1"},
                capture_output=True,
                text=True,
            )
        if process.returncode:
            raise RuntimeError(f"The checkpoint does not load as remote code: {process.stderr[-2000:]}")
        answers = hybrid.generate(prompts)
        right = (answers == problems).all(-1)
        return problems[int(right.int().argmax())], json.loads(process.stdout.splitlines()[-1]) == answers.tolist()

    def report(
        self, results: dict[str, list[Accuracy]], curve: dict[int, Accuracy], example: torch.Tensor, reloaded: bool
    ) -> None:
        width = max(map(len, results))
        print(f"\nWhole response right, of {self.size.held_out} held-out problems (95% interval)\n")
        print(" " * width + "".join(f"{f'{n} diffusion step' + 's' * (n > 1):>26}" for n in STEPS_COMPARED))
        for name, accuracies in results.items():
            print(f"{name:<{width}}" + "".join(f"{accuracy!s:>26}" for accuracy in accuracies))
        depths = "   ".join(f"{depth}: {100 * accuracy.value:.1f}%" for depth, accuracy in curve.items())
        print(f"\nRefined, 1 diffusion step, by recursion steps (trained with 4, and up to 8 before them): {depths}")
        print("\n" + "   ".join(f"{name}: {seconds:.0f} s" for name, seconds in self.seconds.items()))
        print(f"\n{self.folder}/checkpoint: loaded without this package, it generates the same: {reloaded}")
        print(f"{self.folder}/trace.html: three problems that the refiner fixes, for a browser")
        prompt, answer = self.tokenizer.batch_decode([example[: NUM_TERMS + 1], example[NUM_TERMS + 1 : -1]])
        print(f'llada-trm generate --checkpoint {self.folder}/checkpoint --prompt "{prompt}"  # {answer} is right')
        table = {name: [asdict(accuracy) for accuracy in row] for name, row in results.items()}
        by_depth = {depth: asdict(accuracy) for depth, accuracy in curve.items()}
        content = {"steps": STEPS_COMPARED, "accuracy": table, "recursion_steps": by_depth, "seconds": self.seconds}
        write_text(os.path.join(self.folder, "results.json"), json.dumps(content, indent=2))


def compare(hybrid: PreTrainedModel, control: PreTrainedModel, test: Any) -> dict[str, list[Accuracy]]:
    """How many responses are right all through, of three models after 1, 2 and 4 steps."""

    def accuracies(model: PreTrainedModel, **settings: Any) -> list[Accuracy]:
        return [exact_match_accuracy(model, test, num_diffusion_steps=n, **settings) for n in STEPS_COMPARED]

    return {
        "bare backbone": accuracies(hybrid, enable_refinement=False),
        "control: backbone trained on": accuracies(control),
        "refined": accuracies(hybrid),
    }


def accuracy_by_depth(hybrid: LLaDATRMForMaskedDiffusion, test: Any) -> dict[int, Accuracy]:
    """The accuracy in one diffusion step if every chunk takes so many recursion steps."""
    config = hybrid.refiner.config
    own = config.max_recursive_steps, config.convergence_threshold
    accuracies = {}
    for depth in DEPTHS_COMPARED:
        config.max_recursive_steps, config.convergence_threshold = depth, 0.0
        accuracies[depth] = exact_match_accuracy(hybrid, test, num_diffusion_steps=1)
    config.max_recursive_steps, config.convergence_threshold = own
    return accuracies


def fewest_steps_of_the_best(accuracies: list[Accuracy]) -> int:
    """The number of diffusion steps, of those compared, with the highest accuracy; the smallest of several."""
    values = [accuracy.value for accuracy in accuracies]
    return STEPS_COMPARED[values.index(max(values))]


def problems_the_refiner_fixes(hybrid: LLaDATRMForMaskedDiffusion, test: Any, number: int = 3) -> torch.Tensor:
    """
    Held-out problems with their answers `[number, L]` that the refiner gets right and the bare backbone wrong, if any.
    """
    expected = torch.tensor(test["input_ids"])
    prompts = expected[:, : NUM_TERMS + 1]
    bare, refined = (
        (hybrid.generate(prompts, num_diffusion_steps=STEPS_SHOWN, enable_refinement=on) == expected).all(-1)
        for on in (False, True)
    )
    return expected[(refined & ~bare).int().argsort(descending=True, stable=True)[:number]]


class _LossProgressCallback(ProgressCallback):
    """A progress bar that shows the loss, instead of lines of logs."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is not None and "loss" in (logs or {}):
            self.training_bar.set_postfix(loss=f"{logs['loss']:.3f}")
