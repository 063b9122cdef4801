"""
Hidden pairs against `generate(output_hidden_states=True)`: peak memory above the loaded model, and seconds, for the
same problems, the same thoughts and the same states kept.

    python benchmarks/datagen.py [--layers 8 36] [--repeats 3] [--threads 2] [--device cpu]

A SmolLM3 of random weights writes `--new_tokens` tokens after `--prompt_tokens`; a hook on its LM head makes the last
one `</think>`, on every side at the same step. The sides: `generate` keeping the states of all layers and steps, from
which the pairs are picked at the end, as is usual; plain `generate`, which keeps no states (for reference); and
datagen's `all` (states kept while the model writes), `traces` (no states) and `states` (a forward pass over the
finished traces). "traces + states" is what the two stages take one after the other, the larger peak of the two.
`all` and `traces` hold the keys and values of every layer, as every `generate` does; `states` holds none.

Each run is a process of its own. Its peak is that of its own pages ("RssAnon" of /proc/self/status, sampled), or of
torch's allocator on a GPU, less what the loaded model takes. "Over plain" is what a side takes more than plain
`generate`. Prints a table and writes benchmarks/results/datagen.json.
"""

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from record import circumstances, write_result
from transformers import GenerationConfig, PreTrainedModel, SmolLM3Config, SmolLM3ForCausalLM

from llada_trm_hf.data.thoughts import ThoughtTokens
from llada_trm_hf.hidden_pairs.datagen import extract_states
from llada_trm_hf.hidden_pairs.traces import TraceSettings, write_traces

OPENING, CLOSING = 1, 2
SIDES = ("generate, all states", "generate, no states", "all", "traces", "states")


def build(options: argparse.Namespace, num_layers: int) -> PreTrainedModel:
    heads = max(options.hidden_size // 128, 1)
    config = SmolLM3Config(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden_size,
        intermediate_size=options.hidden_size * 11 // 2,
        num_hidden_layers=num_layers,
        num_attention_heads=heads,
        num_key_value_heads=max(heads // 4, 1),
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
        dtype=options.dtype,
    )
    torch.manual_seed(0)
    with torch.device(options.device):
        model = SmolLM3ForCausalLM._from_config(config, dtype=getattr(torch, options.dtype)).eval()
    model.generation_config = GenerationConfig()
    return model


def close_after(model: PreTrainedModel, num_tokens: int) -> None:
    """From now on the model's `num_tokens`-th next token is the closing marker, and none before it is."""
    calls = 0

    def force(module: torch.nn.Module, arguments: Any, logits: torch.Tensor) -> None:
        nonlocal calls
        calls += 1
        logits[..., CLOSING] = torch.inf if calls == num_tokens else -torch.inf

    model.lm_head.register_forward_hook(force)


@torch.no_grad()
def keep_everything(model: PreTrainedModel, prompts: torch.Tensor, new_tokens: int) -> tuple[torch.Tensor, ...]:
    """The usual way. One step more than tokens wanted: the state of the last one exists when it has been read."""
    settings = GenerationConfig(max_new_tokens=new_tokens + 1, do_sample=False, pad_token_id=0)
    settings.output_hidden_states = settings.return_dict_in_generate = True
    output = model.generate(prompts, attention_mask=torch.ones_like(prompts), generation_config=settings)
    assert (output.sequences[:, -2] == CLOSING).all()
    return output.hidden_states[0][-1][:, :-1].flatten(0, 1).cpu(), output.hidden_states[-1][-1][:, -1].cpu()


def work(side: str, model: PreTrainedModel, prompts: torch.Tensor, new_tokens: int) -> Callable[[], Any]:
    """What a side does."""
    rows = prompts.tolist()
    if side == "states":
        thoughts = torch.randint(3, 100, (len(rows), new_tokens - 1)).tolist()
        traces = [ThoughtTokens(row[:-1], row[-1:], thought, [CLOSING]) for row, thought in zip(rows, thoughts)]
        return lambda: extract_states(model, traces)
    close_after(model, new_tokens)
    if side == "generate, all states":
        return lambda: keep_everything(model, prompts, new_tokens)
    if side == "generate, no states":
        settings = GenerationConfig(max_new_tokens=new_tokens + 1, do_sample=False, pad_token_id=0)
        return lambda: model.generate(prompts, attention_mask=torch.ones_like(prompts), generation_config=settings)
    split = [(row[:-1], row[-1:]) for row in rows]
    numbers, settings = list(range(len(rows))), TraceSettings(max_new_tokens=new_tokens)

    def write() -> None:
        written = write_traces(model, split, numbers, [CLOSING], [], 0, settings, keep_states=side == "all")
        assert set(written.statuses) == {"complete"}

    return write


class PeakMemory(threading.Thread):
    """Watches this process's own pages, in bytes."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak, self.running = 0, True

    @staticmethod
    def now() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])

    def run(self) -> None:
        while self.running:
            self.peak = max(self.peak, self.now())
            time.sleep(0.001)


def measure_here(options: argparse.Namespace) -> dict[str, float]:
    """One side in this process: MB above the loaded model, and seconds."""
    torch.set_num_threads(options.threads)
    model = build(options, options.layers[0])
    prompts = torch.randint(3, 100, (options.batch_size, options.prompt_tokens + 1), device=options.device)
    prompts[:, -1] = OPENING
    with torch.no_grad():  # what the first call of a process sets up is not of interest
        model(prompts[:1, :2], logits_to_keep=1)
    run = work(options.side, model, prompts, options.new_tokens)
    on_gpu = options.device.startswith("cuda")
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        watch = PeakMemory()
        before = watch.now()
        watch.start()
    start = time.perf_counter()
    kept = run()
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    if on_gpu:
        peak = torch.cuda.max_memory_allocated()
    else:
        watch.running = False
        watch.join()
        peak = watch.peak
    del kept
    return {"mb": (peak - before) / 1e6, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 36])
    parser.add_argument("--hidden_size", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--prompt_tokens", type=int, default=128)
    parser.add_argument("--new_tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measure_here(options)))
        return

    settings = {name: value for name, value in vars(options).items() if name not in ("layers", "side")}
    shared = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    rows: list[dict[str, Any]] = []
    print(f"{'layers':>6}  {'':<22}{'peak':>10}{'ratio':>8}{'over plain':>12}{'seconds':>9}{'ratio':>8}")
    for layers in options.layers:
        measured: dict[str, dict[str, float]] = {}
        runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        for _ in range(options.repeats):  # side by side, so that a slow minute of the machine hits all
            for side in SIDES:
                command = [sys.executable, __file__, *shared, "--layers", str(layers), "--side", side]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                runs[side].append(json.loads(output.strip().splitlines()[-1]))
        for side in SIDES:
            measured[side] = {name: statistics.median(run[name] for run in runs[side]) for name in ("mb", "seconds")}
        both = [measured["traces"], measured["states"]]
        measured["traces + states"] = {"mb": max(m["mb"] for m in both), "seconds": sum(m["seconds"] for m in both)}
        reference = measured[SIDES[0]]
        for side, values in measured.items():
            ratios = {f"{name}_ratio": values[name] / reference[name] for name in ("mb", "seconds")}
            over = values["mb"] - measured["generate, no states"]["mb"]
            entry = {"layers": layers, "side": side, **values, "over_plain_mb": over, **ratios}
            rows.append(entry | {"runs": runs.get(side, [])})
            print(
                f"{layers:>6}  {side:<22}{values['mb']:>7.0f} MB{ratios['mb_ratio']:>7.3f}x{over:>9.0f} MB"
                f"{values['seconds']:>9.2f}{ratios['seconds_ratio']:>7.2f}x",
                flush=True,
            )
    command = " ".join(["python benchmarks/datagen.py --layers", *map(str, options.layers), *shared])
    write_result("datagen", {**circumstances(command), "rows": rows})


if __name__ == "__main__":
    main()
