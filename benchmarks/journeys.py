"""
How far a reader has to walk: the files of the package a debugger enters, how long they are, and what a checkpoint
carries.

    python benchmarks/journeys.py [--name journeys]

A *journey* is traced with `sys.setprofile`. It enters a file when one of the file's functions is called (or one of its
generators resumed); importing a file does not count, nor does code outside the package. `files` are the distinct files
entered. `switches` are the calls that lead into another file than the call before, the first one included: returning
to a caller is not counted, so a helper of the same file costs nothing and one of another file costs a switch.

The journeys: a `generate` call of one denoising step, the second step of a block alone (without and with a cache),
a training step, `from_pretrained`, `save_pretrained`, and `llada-trm generate` with 4 tokens in 4 steps; all of a
hybrid of 2 layers with a recursive refinement head. `at most` is the goal.

Prints three tables and writes benchmarks/results/NAME.json. Uses public names only, so it can measure any version of
the package: put that version first in PYTHONPATH.
"""

import argparse
import ast
import contextlib
import functools
import io
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from types import FrameType
from typing import Any

import torch
from record import circumstances, write_result
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import llada_trm_hf
from llada_trm_hf.cli.main import main as llada_trm

PACKAGE = Path(llada_trm_hf.__file__).parent
GROUND_FLOOR = ("models", "generation")
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SPECIAL_TOKENS = {"vocab_size": 384, "mask_token_id": 383, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
GOALS = {"one denoising step": 10, "training step": 8, "from_pretrained": 10, "llada-trm generate": 18}


class Tracer:
    """Records, within `with`, the file of the package that each call enters."""

    def __init__(self) -> None:
        self.entered: list[str] = []
        self._imports = 0  # being executed

    def __enter__(self) -> "Tracer":
        sys.setprofile(self.record)
        return self

    def __exit__(self, *_: Any) -> None:
        sys.setprofile(None)

    def record(self, frame: FrameType, event: str, _: Any) -> None:
        if event not in ("call", "return"):
            return
        code = frame.f_code
        if code.co_name == "<module>":
            self._imports += 1 if event == "call" else -1
        elif event == "call" and not self._imports and Path(code.co_filename).is_relative_to(PACKAGE):
            self.entered.append(str(Path(code.co_filename).relative_to(PACKAGE)))

    def report(self) -> dict[str, Any]:
        switches = sum(file != before for before, file in zip([None, *self.entered], self.entered))
        calls = dict(Counter(self.entered).most_common())
        return {"files": len(calls), "switches": switches, "calls": calls}


class StepTracer:
    """A streamer that traces what happens between its first and its second draft: the second step of a block."""

    def __init__(self) -> None:
        self.tracer, self.drafts = Tracer(), 0

    def put_draft(self, _: torch.Tensor) -> None:
        self.drafts += 1
        sys.setprofile(self.tracer.record if self.drafts == 1 else None)

    def put(self, _: torch.Tensor) -> None: ...

    def end(self) -> None: ...


def saved_classes() -> dict[str, Callable[[], PreTrainedModel]]:
    """How to make a tiny model of each class that is saved."""
    ours = llada_trm_hf
    width = {"hidden_size": SIZES["hidden_size"]}
    moe = {k: v for k, v in SIZES.items() if k != "intermediate_size"} | {"expert_intermediate_size": 16}
    compressor = ours.DimensionCompressorConfig(**width, compressed_size=16)
    trm = ours.SequenceTRMConfig(hidden_size=16, n_heads=2)
    thought = {"think_start_token_ids": [3], "think_end_token_ids": [4], "latent_token_id": 5, "num_latents": 2}

    def head() -> Any:
        return ours.RecursiveRefinementHeadConfig(**width, chunk_size=4, head_hidden_size=16)

    def slots() -> Any:
        return ours.SlotTRMRefinerConfig(**width, chunk_size=4, preset="tiny")

    def backbone() -> PreTrainedModel:
        return ours.LLaDAForMaskedDiffusion(ours.LLaDAConfig(**SIZES, **SPECIAL_TOKENS))

    def latent() -> PreTrainedModel:
        causal_lm = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=384))
        return ours.LatentThinkingForCausalLM.from_backbone(causal_lm, compressor, trm, **thought)

    return {
        "LLaDAForMaskedDiffusion": backbone,
        "LLaDAMoEForMaskedDiffusion": lambda: ours.LLaDAMoEForMaskedDiffusion(
            ours.LLaDAMoEConfig(**moe, **SPECIAL_TOKENS, num_experts=4, num_experts_per_tok=2)
        ),
        "RecursiveRefinementHead": lambda: ours.RecursiveRefinementHead(head()),
        "SlotTRMRefiner": lambda: ours.SlotTRMRefiner(slots()),
        "RefinerCascade": lambda: ours.RefinerCascade(ours.RefinerCascadeConfig(refiner_configs=[head(), slots()])),
        "RefinerMix": lambda: ours.RefinerMix(ours.RefinerMixConfig(refiner_configs=[head(), slots()])),
        "LLaDATRMForMaskedDiffusion": lambda: ours.LLaDATRMForMaskedDiffusion.from_backbone(
            backbone(), refiner=head(), min_confidence=1.0
        ),
        "DimensionCompressor": lambda: ours.DimensionCompressor(compressor),
        "SequenceTRM": lambda: ours.SequenceTRM(trm),
        "LatentThinkingForCausalLM": latent,
        "LatentThinker": lambda: latent().thinker,
    }


def journeys() -> dict[str, dict[str, Any]]:
    torch.manual_seed(0)
    tokenizer = ByT5Tokenizer()
    hybrid = saved_classes()["LLaDATRMForMaskedDiffusion"]().eval()
    prompt = tokenizer("12+34=", return_tensors="pt", add_special_tokens=False).input_ids
    found: dict[str, Tracer] = {}
    hybrid.generate(prompt, max_new_tokens=4)  # imports and caches are not the reader's
    with Tracer() as found["generate, one step"]:
        hybrid.generate(prompt, max_new_tokens=4, num_diffusion_steps=1)
    for name, cache in (("one denoising step", "none"), ("one denoising step, dual cache", "dual")):
        step = StepTracer()
        hybrid.generate(prompt, max_new_tokens=4, num_diffusion_steps=4, kv_cache=cache, streamer=step)
        found[name] = step.tracer
    labels = prompt.repeat(2, 2)
    masked = labels.masked_fill(torch.arange(labels.shape[1]) % 3 == 0, SPECIAL_TOKENS["mask_token_id"])
    hybrid.train()
    with Tracer() as found["training step"]:
        hybrid(masked, labels=labels).loss.backward()
    hybrid.eval()
    with tempfile.TemporaryDirectory() as folder, quiet():
        with Tracer() as found["save_pretrained"]:
            hybrid.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        with Tracer() as found["from_pretrained"]:
            llada_trm_hf.LLaDATRMForMaskedDiffusion.from_pretrained(folder)
        settings = ["--max_new_tokens", "4", "--num_diffusion_steps", "4", "--device", "cpu"]
        with Tracer() as found["llada-trm generate"]:
            code = llada_trm(["generate", "--checkpoint", folder, "--prompt", "12+34=", *settings])
    assert code == 0, f"llada-trm generate ended with {code}"
    return {name: tracer.report() for name, tracer in found.items()}


def saved_code() -> dict[str, dict[str, int]]:
    """The Python files in the folder of each class, sub-folders included, and how many are there once more."""
    rows = {}
    for name, make in saved_classes().items():
        with tempfile.TemporaryDirectory() as folder, quiet():
            make().save_pretrained(folder)
            files = list(Path(folder).rglob("*.py"))
            lines = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)
            twice = len(files) - len({file.name for file in files})
            rows[name] = {"files": len(files), "twice": twice, "lines": lines}
    return rows


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def house() -> dict[str, dict[str, Any]]:
    """Files and lines of each folder, of the ground floor, and of the whole package."""
    files = sorted(PACKAGE.rglob("*.py"))
    groups: dict[str, list[Path]] = {}
    for file in files:
        groups.setdefault(str(file.parent.relative_to(PACKAGE)).replace(".", "(root)"), []).append(file)
    groups["ground floor"] = [f for f in files if f.relative_to(PACKAGE).parts[0] in GROUND_FLOOR]
    groups["package"] = files
    rows = {}
    for name, group in groups.items():
        lines = [len(file.read_text(encoding="utf-8").splitlines()) for file in group]
        short = {f"under_{limit}": sum(number < limit for number in lines) for limit in (40, 100)}
        rows[name] = {"files": len(lines), "median": median(lines), "lines": sum(lines), **short}
    return rows


def floors() -> list[str]:
    """The longest chain of imports among the files of the ground floor, from the top downwards."""
    paths = [path for folder in GROUND_FLOOR for path in PACKAGE.joinpath(folder).rglob("*.py")]
    files = {path.relative_to(PACKAGE).with_suffix("").parts: path for path in paths}

    @functools.cache
    def chain(module: tuple[str, ...]) -> list[str]:
        below: list[str] = []
        for node in ast.walk(ast.parse(files[module].read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = (*module[: -node.level], *(node.module.split(".") if node.module else ()))
                for target in (base, (*base, "__init__"), *((*base, alias.name) for alias in node.names)):
                    if target in files and target != module:
                        below = max(below, chain(target), key=len)
        return ["/".join(module), *below]

    return max(map(chain, sorted(files)), key=len)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="journeys", help="of the result file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    traced, rooms, chain, code = journeys(), house(), floors(), saved_code()
    print(f"{'journey':<34}{'files':>7}{'at most':>9}{'switches':>10}")
    for name, row in traced.items():
        print(f"{name:<34}{row['files']:>7}{GOALS.get(name, ''):>9}{row['switches']:>10}")
    print(f"\n{'folder':<34}{'files':>7}{'median':>9}{'lines':>9}{'< 40':>7}{'< 100':>7}")
    for name, row in rooms.items():
        counts = f"{row['lines']:>9}{row['under_40']:>7}{row['under_100']:>7}"
        print(f"{name:<34}{row['files']:>7}{row['median']:>9g}{counts}")
    print(f"\nfloors of the ground floor: {len(chain)} ({' > '.join(chain)})")
    print(f"\n{'code of a saved':<34}{'files':>7}{'twice':>9}{'lines':>9}")
    for name, saved in code.items():
        print(f"{name:<34}{saved['files']:>7}{saved['twice']:>9}{saved['lines']:>9}")
    command = "python benchmarks/journeys.py" + (f" --name {options.name}" if options.name != "journeys" else "")
    result = {"journeys": traced, "folders": rooms, "floors": chain, "saved_code": code}
    write_result(options.name, {**circumstances(command), **result})


if __name__ == "__main__":
    main()
