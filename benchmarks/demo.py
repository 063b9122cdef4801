"""
The demo's checkpoint, judged three times: by the demo itself, by `llada-trm evaluate`, by lm-evaluation-harness.

    make demo
    python benchmarks/demo.py [--demo_dir outputs/demo] [--threads 2]

1,000 held-out chains, with and without refinement, in 1, 2 and 4 diffusion steps. All three have to find the same
number of right responses; the script ends with 1 if they do not. Writes benchmarks/results/demo.json.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import lm_eval
import torch
from record import circumstances, write_result

import llada_trm_hf.evaluation.harness  # noqa: F401  (registers the model)
from llada_trm_hf.data import load_reasoning_dataset
from llada_trm_hf.evaluation.evaluate import EvaluationSettings, run_evaluation
from llada_trm_hf.recipes.demo import NUM_TERMS

HELD_OUT = "test"
ROWS = {"bare backbone": False, "refined": True}


def by_evaluate(checkpoint: Path, steps: int, refined: bool, folder: Path) -> int:
    summary = run_evaluation(
        EvaluationSettings(
            model=str(checkpoint),
            output_dir=str(folder / f"{steps}_{refined}"),
            dataset_name="arithmetic",
            split=HELD_OUT,
            num_terms=NUM_TERMS,
            generation={"num_diffusion_steps": steps, "enable_refinement": refined},
            batch_size=250,
        )
    )
    assert summary is not None
    return summary.accuracy.correct


def by_harness(checkpoint: Path, steps: int, refined: bool, problems: Path) -> int:
    task = {
        "task": "chains",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(problems)}},
        "test_split": "test",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{reasoning}}{{answer}}",
        "output_type": "generate_until",
        "generation_kwargs": {"until": [], "max_gen_toks": NUM_TERMS + 1},
        "metric_list": [{"metric": "exact_match"}],
    }
    arguments = {"pretrained": str(checkpoint), "num_diffusion_steps": steps, "enable_refinement": refined}
    found = lm_eval.simple_evaluate(
        "llada_trm", arguments, [task], batch_size=250, device="cpu", bootstrap_iters=0, log_samples=False
    )
    return round(found["results"]["chains"]["exact_match,none"] * found["n-samples"]["chains"]["effective"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo_dir", type=Path, default=Path("outputs/demo"))
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    demo = json.loads((options.demo_dir / "results.json").read_text(encoding="utf-8"))
    checkpoint = options.demo_dir / "checkpoint"
    problems, _ = load_reasoning_dataset("arithmetic", HELD_OUT, num_terms=NUM_TERMS)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "chains.jsonl"
        problems.to_json(path)
        for name, refined in ROWS.items():
            for number, steps in enumerate(demo["steps"]):
                row = {
                    "model": name,
                    "steps": steps,
                    "demo": demo["accuracy"][name][number]["correct"],
                    "evaluate": by_evaluate(checkpoint, steps, refined, Path(folder)),
                    "harness": by_harness(checkpoint, steps, refined, path),
                }
                print(row)
                rows.append(row)
    result = {
        **circumstances("make demo && python benchmarks/demo.py"),
        "total": len(problems),
        "accuracy": demo["accuracy"],
        "steps": demo["steps"],
        "seconds": demo["seconds"],
        "rows": rows,
    }
    write_result("demo", result)
    same = all(row["demo"] == row["evaluate"] == row["harness"] for row in rows)
    print("The three agree." if same else "They differ.")
    return int(not same)


if __name__ == "__main__":
    sys.exit(main())
