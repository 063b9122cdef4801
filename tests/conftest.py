"""Small models with weights large enough that their predictions mean something."""

import csv
import os
import sys
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from hub_http_server import TOKEN, model_hub
from killed_commands import commands
from run_programs import run_program
from tiny_training import new_samples
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CONFIG_MAPPING

from llada_trm_hf.models import (
    LLaDAConfig,
    LLaDAForMaskedDiffusion,
    LLaDATRMForMaskedDiffusion,
    RecursiveRefinementHeadConfig,
)
from llada_trm_hf.models.hub_model import REFINERS

# These models are too small to share: on a busy machine, threads that wait for each other cost a hundred times more.
# (`make portable` asks for two, whose sums are others.)
torch.set_num_threads(int(os.environ.get("LLADA_TEST_THREADS", "1")))

ROOT = Path(__file__).resolve().parents[1]  # of the repository
DATA = Path(os.environ.get("LLADA_DATA", ROOT.parent / "shared/data"))  # real datasets, where there are any
MASK, PAD, EOS = 49, 0, 1


@pytest.fixture
def make_backbone():
    """Builds a LLaDA of 2 layers; keyword arguments change its config."""

    def make(seed=0, **config):
        defaults = {
            "vocab_size": 50,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "mask_token_id": MASK,
            "pad_token_id": PAD,
            "eos_token_id": EOS,
            "bos_token_id": 2,
            "max_position_embeddings": 128,
            "initializer_range": 0.3,
        }
        torch.manual_seed(seed)
        return LLaDAForMaskedDiffusion(LLaDAConfig(**defaults | config)).eval()

    return make


@pytest.fixture
def make_hybrid(make_backbone):
    """
    Puts a head with random (not near-zero) weights on a backbone: some chunks are below `min_confidence` and some
    above, and those that are refined stop after different numbers of steps.
    """

    def make(backbone=None, head=None, **fields):
        backbone = make_backbone() if backbone is None else backbone
        width = backbone.config.hidden_size
        defaults = {"hidden_size": width, "chunk_size": 4, "head_hidden_size": 16, "convergence_threshold": 0.02}
        refiner = RecursiveRefinementHeadConfig(**defaults | (head or {}))
        fields = {"min_confidence": 0.25} | fields
        model = LLaDATRMForMaskedDiffusion.from_backbone(backbone, refiner=refiner, **fields).eval()
        randomise(model.refiner)
        return model

    return make


@pytest.fixture
def tiny_backbone(make_backbone):
    return make_backbone()


@pytest.fixture
def tiny_hybrid(make_hybrid):
    return make_hybrid()


@pytest.fixture
def hub(monkeypatch):
    """A Hub that this process takes for the real one."""
    with model_hub() as server:
        resolve = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", resolve)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)  # it remembers the address
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        yield server


@pytest.fixture(scope="session")
def process():
    """Runs commands outside of this process, and kills them."""
    with commands() as running:
        yield running


@pytest.fixture(scope="session")
def goldens():
    """Where the golden vectors of the official LLaDA code are; see the README there."""
    beside = ROOT.parent / "shared/goldens/llada"
    folder = Path(os.environ.get("LLADA_GOLDENS", beside))
    if not (folder / "README.md").exists():
        pytest.skip(f"no golden data in {folder}")
    return folder


@pytest.fixture(scope="session")
def llm_trm(goldens):
    """Where the golden checkpoints of the llm-trm project are; see the README there."""
    folder = goldens.parent / "llm_trm"
    if not (folder / "manifest.json").exists():
        pytest.skip(f"no golden data in {folder}")
    return folder


@pytest.fixture(scope="session")
def samples():
    """Generated arithmetic as tokens, for `tiny_training.trainer`."""
    return new_samples()


class HostCopies(TorchDispatchMode):
    """Counts the operations whose result the host waits for: values read, and shapes that depend on values."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        waits = name in ("_local_scalar_dense", "nonzero", "equal", "masked_select")
        if name in ("index", "index_put", "index_put_"):
            waits = any(index is not None and index.dtype == torch.bool for index in args[1])
        self.count += waits
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def randomise(head, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for parameter in head.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(0.3 * noise if parameter.ndim > 1 else parameter + 0.1 * noise)


def pytest_collection_modifyitems(items):
    """A test that hangs fails, by name; what is marked slow may take an hour."""
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(3600))


def forget_refiner(model_type):
    """Undoes `register_refiner`."""
    REFINERS.pop(model_type, None)
    CONFIG_MAPPING._extra_content.pop(model_type, None)


def metrics(folder, name, column):
    """A column of a run's CSV file, as numbers."""
    with (Path(folder) / name).open() as file:
        return [float(row[column]) for row in csv.DictReader(file)]


# `python ARGUMENTS` in two processes that work together, and meet at any free port of this machine.
IN_TWO_PROCESSES = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local_addr", "127.0.0.1"]
IN_TWO_PROCESSES += ["--nproc_per_node", "2"]


def launch_two_processes(arguments):
    run_program([*IN_TWO_PROCESSES, *arguments], env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)


def run_two_processes(arguments):
    """`llada-trm ARGUMENTS`, likewise."""
    launch_two_processes(["-m", "llada_trm_hf.cli", *arguments])
