"""Two processes with half the batch each are one process with the whole batch."""

import gc
import json
import sys
import time

import pytest
import torch
from conftest import ROOT, launch_two_processes, metrics
from latent_thinking_models import CLOSE, THOUGHT, make_model, tokens
from run_programs import SECONDS, run_program
from safetensors.torch import load_file
from sharded_training import MODES, NAMES, STEPS, train_all
from tiny_training import new_hybrid, trainer
from torch import distributed, multiprocessing
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

from llada_trm_hf.cli.main import main

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


FLAGS = "--split train[:200] --num_terms 4 --chunk_size 5 --eval_strategy steps --max_steps 6"
FLAGS += " --refiner recursive_refinement_head --head_hidden_size 16"
FLAGS += " --min_confidence 1 --lr 1e-2 --warmup_steps 0 --logging_steps 1 --use_cpu --disable_tqdm true"


def compare(tmp_path, flags, evaluated):
    """Trains with `flags` in one process, and in two with half the batch: the metrics are the same, also the
    `evaluated` ones."""
    (tmp_path / "small.json").write_text(json.dumps(SIZES))
    flags = f"train --backbone {tmp_path}/small.json {FLAGS} {flags}".split()
    one, two = tmp_path / "one", tmp_path / "two"
    assert main([*flags, "--batch_size", "8", "--output_dir", str(one)]) == 0
    launch_two_processes(["-m", "llada_trm_hf.cli", *flags, "--batch_size", "4", "--output_dir", str(two)])
    for column in ("loss", "diffusion_loss", "grad_norm"):
        expected = metrics(one, "training_metrics.csv", column)
        assert metrics(two, "training_metrics.csv", column) == pytest.approx(expected, rel=1e-3), column
    for column in evaluated:
        expected = metrics(one, "validation_metrics.csv", column)
        assert len(expected) == 2 and expected[0] != expected[1]
        assert metrics(two, "validation_metrics.csv", column) == pytest.approx(expected, rel=1e-3), column


def test_two_processes_give_the_losses_of_one(tmp_path):
    flags = "--recipe warmup --eval_steps 3 --eval_split test[:32]"
    compare(tmp_path, flags, evaluated=["eval_loss", "eval_expected_calibration_error"])


def test_two_processes_train_backbone_and_head(tmp_path):
    """
    With gradient checkpointing (in the recipe) and accumulation, Muon and an average. Where the held-out samples fill
    no whole batches, the Trainer's eval_loss counts some of them twice; the calibration error does not.
    """
    flags = "--recipe finetune --eval_steps 3 --eval_split test[:37] --gradient_accumulation_steps 2"
    flags += " --use_ema --ema_decay 0.5 --use_muon --muon_learning_rate 3e-3"
    compare(tmp_path, flags, evaluated=["eval_expected_calibration_error"])


# A batch with a thought, and one without, of the same size.
THOUGHT_OR_NOT = [[tokens(6, 1) + THOUGHT + tokens(4, 2)], [[*tokens(9, 3), CLOSE, *tokens(6, 4)]]]


def new_thinker():
    """As the recipes train one: the halting head has nothing to learn from answers."""
    model = make_model().train()
    model.thinker.trm.halt_head.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def answer_loss(model, number):
    input_ids = torch.tensor(THOUGHT_OR_NOT[number])
    labels = input_ids.clone()
    labels[:, :-4] = -100
    return model(input_ids=input_ids, labels=labels).loss


def take_step(model, loss):
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.sub_(0.5 * parameter.grad)
                parameter.grad = None


def thinker_weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.thinker.parameters()])


def train_on_one_of_two(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model = new_thinker()
    parallel = DistributedDataParallel(model)
    for _ in range(2):
        take_step(model, answer_loss(parallel, rank))
    torch.save(thinker_weights(model), folder / f"{rank}.pt")
    del parallel
    gc.collect()  # before the group ends, as in `finish_distributed`
    distributed.destroy_process_group()


def test_thoughts_on_one_of_two_processes(tmp_path):
    """`DistributedDataParallel` waits for a gradient of every weight, also from the batch without a thought."""
    running = multiprocessing.spawn(train_on_one_of_two, (tmp_path,), nprocs=2, join=False, daemon=True)
    try:
        end = time.monotonic() + SECONDS
        while not running.join(timeout=1):
            assert time.monotonic() < end, f"they had not ended after {SECONDS} s"
    finally:
        for process in running.processes:
            process.kill()
    model = new_thinker()
    for _ in range(2):
        take_step(model, (answer_loss(model, 0) + answer_loss(model, 1)) / 2)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert (thinker_weights(model) - thinker_weights(new_thinker())).abs().max() > 1e-3
    assert torch.equal(*found)
    torch.testing.assert_close(found[0], thinker_weights(model), atol=1e-6, rtol=1e-5)


END_WHILE_A_THREAD_WANTS_THE_GIL = """
import gc, sys, time
from unittest.mock import patch
import psutil
import torch
import torch.distributed.nn.functional  # keeps the first group that it finds
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from llada_trm_hf.cli.command import finish_distributed

class Processes:
    num_processes = 2
    destroy_process_group = staticmethod(distributed.destroy_process_group)

    def wait_for_everyone(self):
        # Gloo's threads still copy them when nobody else holds them, and meet a GIL that is not given away.
        tensors = [(torch.ones(1 << 21), torch.ones(1 << 21)) for _ in range(8)]
        while tensors:
            one, other = tensors.pop()
            distributed.all_gather([one], other, async_op=True)
            del one, other
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            pass

torch.set_num_threads(1)
gc.disable()
before = psutil.Process().num_threads()
distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
assert psutil.Process().num_threads() > before
models = [DistributedDataParallel(torch.nn.Linear(2, 2))]
models.append(models)
del models
sys.setswitchinterval(100)
with patch("accelerate.PartialState", Processes):
    finish_distributed()
assert psutil.Process().num_threads() == before
"""


def test_a_run_ends_while_a_thread_of_gloo_lets_go_of_a_tensor():
    run_program([sys.executable, "-c", END_WHILE_A_THREAD_WANTS_THE_GIL], seconds=100, check=True)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder of the models that one process trained, and their losses."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, train_all(folder)


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """The same of two processes, by the file of examples/accelerate they follow; trained when first asked for."""
    found = {}

    def train(mode):
        if mode.startswith("deepspeed"):
            pytest.importorskip("deepspeed", reason="`make deepspeed` installs it and runs these")
        if mode not in found:
            folder = tmp_path_factory.mktemp(mode)
            launch_two_processes([str(ROOT / "tests/sharded_training.py"), mode, str(folder)])
            found[mode] = folder, json.loads((folder / "losses.json").read_text())
        return found[mode]

    return train


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", MODES)
def test_sharing_the_work_changes_nothing(alone, together, mode, name):
    """Losses, weights and saved files, each model through its Trainer."""
    (one, losses), (two, shared) = alone, together(mode)
    assert len(set(losses[name].values())) == STEPS
    assert [*shared[name].values()] == pytest.approx([*losses[name].values()], rel=1e-4)
    files = [{path.name for path in (folder / name).iterdir()} for folder in (one, two)]
    written = files[1] - files[0]  # beside what one process writes, only what DeepSpeed does
    assert files[0] <= files[1] and (not written or mode.startswith("deepspeed")), written
    expected = load_file(one / name / "model.safetensors")
    found = load_file(two / name / "model.safetensors")
    # These gather a weight twice that is tied.
    if mode in ("fsdp2", "deepspeed_zero2") and name == "thinker":
        expected["backbone.lm_head.weight"] = expected["backbone.model.embed_tokens.weight"]
    assert found.keys() == expected.keys()
    for weight, value in expected.items():
        torch.testing.assert_close(found[weight], value, rtol=1e-3, atol=1e-5, msg=weight)


@pytest.mark.parametrize("mode", MODES)
def test_a_run_is_resumed_from_the_checkpoint_of_two_processes(together, mode):
    """With the same losses and weights as one that was not cut; the checkpoint holds its optimizer's state."""
    folder, losses = together(mode)
    assert len(set(losses["whole"].values())) == STEPS
    assert losses["cut"] == losses["whole"]
    assert not (folder / "cut" / ".unfinished").exists()
    whole, resumed = (load_file(folder / name / "model.safetensors") for name in ("whole", "cut"))
    halfway = load_file(folder / "cut" / "checkpoint-2" / "model.safetensors")
    assert whole.keys() == resumed.keys()
    assert not all(torch.equal(whole[name], value) for name, value in halfway.items())
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("flag", ["use_ema", "use_muon"])
def test_what_needs_whole_weights_refuses_sharding(tmp_path, samples, monkeypatch, flag):
    """(accelerate shards on accelerators only: here it just says that it does.)"""
    create = Trainer.create_accelerator_and_postprocess

    def create_sharded(self):
        create(self)
        self.is_fsdp_enabled = True

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", create_sharded)
    with pytest.raises(ValueError, match="leave out one of them"):
        trainer(new_hybrid(), tmp_path, samples, **{flag: True})
