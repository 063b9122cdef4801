"""
Writes the README's section "Does it help?" from benchmarks/results, so that no figure in it is typed by hand.

    python benchmarks/report.py [--check]

`--check` changes nothing and ends with 1 where the README says something else than the results.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"
START, END = "<!-- benchmarks/report.py writes from here -->\n", "<!-- to here -->\n"


def percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f}%"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def source(result: dict[str, Any]) -> str:
    """The command that reproduces a table, and what it ran on."""
    machine = f"{result['machine']['threads']} CPU thread{'s' * (result['machine']['threads'] > 1)}"
    return f"`{result['command']}` ({result['date']}, {machine}, torch {result['torch']})\n"


def refiners(result: dict[str, Any]) -> str:
    seeds = len(result["seeds"])
    rows = []
    for name, row in result["table"].items():
        each = [", ".join(f"{100 * value:.1f}" for value in row[key][2]) for key in ("accuracy_1", "accuracy_2")]
        cells = [f"{percent(row[key][0])} ({values})" for key, values in zip(("accuracy_1", "accuracy_2"), each)]
        gains = [f"{100 * row[key][0]:+.1f} ± {100 * row[key][1]:.1f}" for key in ("gain_1", "gain_2")]
        extra = f"{1000 * row['extra_ms_per_token']:.1f} µs" if "extra_ms_per_token" in row else ""
        trained = f"{row['parameters']:,}" if row["parameters"] else ""
        name = name if row["seeds"] == seeds else f"{name} ({row['seeds']} seeds)"
        rows.append([name, trained, extra, cells[0], gains[0], cells[1], gains[1]])
    header = ["", "parameters", "more time a token", "1 diffusion step", "gain", "2 steps", "gain"]
    steps = [
        [name, *(percent(mean(s["recursion_steps"][name][i]["1"] for s in result["seeds"])) for i in range(5))]
        for name in result["seeds"][0]["recursion_steps"]
    ]
    chosen = []
    for i, row in enumerate(result["seeds"][0]["selective"]):
        each = [seed["selective"][i] for seed in result["seeds"]]
        ratio = mean(row["ms_per_token"] / row["bare_ms_per_token"] for row in each)
        shares = [percent(mean(row[key] for row in each)) for key in ("share_refined", "accuracy")]
        chosen.append([f"{row['min_confidence']:g}", *shares, f"{ratio:.2f}x"])
    return (
        f"What did not work: refiners without recall, trained at one depth (the first version's; `recall=False` "
        f"now). The demo's task of then: whole responses right of 1,000 held-out problems, mean over {seeds} seeds "
        f"(and each), and the gain over the same backbone without refiner, in points, with the 95% interval of "
        f"Student's t, which is wide for so few seeds that differ so much."
        f"\n\n{table(header, rows)}\nWith so many recursion steps at inference (trained with 4), one "
        f"diffusion step:\n\n{table(['', '1', '2', '4', '8', '16'], steps)}\nThe recursive head where "
        f"`min_confidence` decides what is refined, one diffusion step; time against the bare backbone:\n\n"
        f"{table(['`min_confidence`', 'chunks refined', 'right', 'time'], chosen)}\n"
        f"![Accuracy against recursion steps, and against chunks refined](benchmarks/results/refiners.png)\n\n"
        f"{source(result).rstrip()}; the script is that version's.\n"
    )


def recursion(result: dict[str, Any]) -> str:
    names = {"backbone": "bare", "control": "control: the backbone trained on", "trm": "`TRMRefiner`"}
    depths = ["1", "2", "4", "8", "16", "32"]
    rows, curves, stops = [], [], []
    for seed, found in result["seeds"].items():
        for name, title in names.items():
            if name in found:
                row = found[name]
                rows.append([seed, title, f"{row['steps']:,}", *map(percent, row["accuracy"])])
        if "trm" in found:
            curves.append([seed, *(percent(found["trm"]["depths"][depth][0]) for depth in depths)])
            each = found["trm"].get("thresholds", {}).values()
            stops.append([seed, *(f"{steps:.1f}: {percent(accuracy)}" for steps, accuracy, _ in each)])
    first = next(iter(result["seeds"].values()))
    sixths = "; ".join(
        f"seed {seed}: {', '.join(f'{100 * accuracy[0]:.1f}' for _, accuracy in found['backbone']['curve'])}"
        for seed, found in result["seeds"].items()
    )
    text = (
        f"Chains of {result['num_terms']} digits, trained with {result['optimizer']}: whole responses right of 1,000 "
        f"held-out problems. Control and refiner have the same training time (what a step takes was measured for both "
        f"in turn):\n\n{table(['seed', '', 'training steps', '1 diffusion step', '2 steps'], rows)}\nThe backbone's "
        f"accuracy in one diffusion step hardly rose in its own training (in sixths of it, %: {sixths}).\n\nOne "
        f"diffusion step, by recursion steps without early stop (trained with 4, and up to 8 without gradient before "
        f"them):\n\n{table(['seed', *depths], curves)}\n"
    )
    if "thresholds" in first["trm"]:
        header = ["seed", *first["trm"]["thresholds"]]
        text += (
            f"Mean recursion steps, of at most {first['trm']['max_steps']}, and accuracy in one diffusion step, by "
            f"`convergence_threshold`:\n\n{table(header, stops)}\n"
        )
    return text + source(result)


def demo(result: dict[str, Any]) -> str:
    rows = [
        [row["model"], str(row["steps"]), *(f"{row[who]:,}" for who in ("demo", "evaluate", "harness"))]
        for row in result["rows"]
    ]
    return (
        f"Right responses of the demo's checkpoint, of {result['total']:,}, as counted by the demo, by `llada-trm "
        f"evaluate` and by lm-evaluation-harness (`llada-trm lm-eval`):\n\n"
        f"{table(['', 'diffusion steps', 'demo', 'evaluate', 'harness'], rows)}\n{source(result)}"
    )


def latent_thinking(result: dict[str, Any]) -> str:
    seeds, whole = result["seeds"], result["table"]["chain of thought"]
    rows = []
    for name, row in result["table"].items():
        each = ", ".join(f"{100 * seed['models'][name]['accuracy']:.1f}" for seed in seeds)
        times = [
            f"{row[key][0]:.1f} ms ({whole[key][0] / row[key][0]:.1f}x)"
            for key in ("milliseconds_1", "milliseconds_64")
        ]
        parameters = f"{row['trainable_parameters'][0]:,.0f}" if row["trainable_parameters"][0] else ""
        accuracy = f"{percent(row['accuracy'][0])} ± {100 * row['accuracy'][1]:.1f} ({each})"
        tokens = f"{row['tokens'][0]:.1f} ({percent(row['tokens'][0] / whole['tokens'][0])})"
        rows.append([name, accuracy, tokens, *times, parameters])
    header = ["", "accuracy", "tokens generated", "an answer alone", "in batches of 64", "trained on top"]
    first = seeds[0]
    rewards = [
        [name, str(seed["seed"]), *(f"{reward:.3f}" for _, reward in seed[key])]
        for name, key in (("all of it", "held_out_rewards"), ("a shorter one", "held_out_rewards_early"))
        for seed in seeds
    ]
    longest = max((seed["held_out_rewards"] for seed in seeds), key=len)
    rewards = [row + [""] * (2 + len(longest) - len(row)) for row in rewards]
    by_steps = [
        [str(seed["seed"]), *(percent(value) for value in seed["accuracy_by_steps"].values())] for seed in seeds
    ]
    variants = [[name, percent(row["accuracy"])] for name, row in first["variants"].items()]
    return (
        f"Latent thinking on `examples/latent_thinking`: right answers to 1,000 held-out chains of eight digits, "
        f"greedy, mean over {len(seeds)} seeds with the 95% interval of Student's t (and each seed); tokens and speed "
        f"beside those of the chain of thought. Distillation trains compressor and SequenceTRM only; its latents are "
        f"the predicted states as they are.\n\n{table(header, rows)}\n"
        f"GRPO after answer supervision, all of it or one of {first['variant_steps']:,} steps: mean reward of sampled "
        f"answers to 300 held-out problems, 8 samples each, by step.\n\n"
        f"{table(['after', 'seed', *(str(step) for step, _ in longest)], rewards)}\n"
        f"Accuracy with so many supervision steps at inference, after answer supervision with one:\n\n"
        f"{table(['seed', *map(str, first['accuracy_by_steps'])], by_steps)}\n"
        f"A shorter answer supervision, {first['variant_steps']:,} steps (seed {first['seed']}):\n\n"
        f"{table(['', 'accuracy'], variants)}\n{source(result)}"
    )


def compressor(result: dict[str, Any]) -> str:
    rows = []
    for row in result["rows"]:
        names = [name for name in row if name.startswith("pca")]
        for name in (*names, "trained"):
            values = row[name]
            faster = values.get("times_faster_by_seconds"), values.get("times_faster_by_seconds_with_model")
            rows.append(
                [
                    str(row["compressed_size"]),
                    name,
                    *(f"{values[key]:.4f}" for key in ("mse", "cosine_similarity", "variance_ratio")),
                    f"{values['standardised_mse']:.3f} / {values['standardised_cosine_similarity']:.3f}",
                    percent(values["top_token_agreement"]),
                    f"{values['seconds']:.2f} s" if "seconds" in values else "",
                    " / ".join(f"{ratio:.1f}x" if ratio else "never" for ratio in faster) if name != "trained" else "",
                ]
            )
    constant = result["rows"][0]["pca"]
    rows.append(
        [
            "",
            "constant",
            *(f"{constant[f'constant_{key}']:.4f}" for key in ("mse", "cosine_similarity", "variance_ratio")),
            f"{constant['constant_standardised_mse']:.3f} / {constant['constant_standardised_cosine_similarity']:.3f}",
            "",
            "",
            "",
        ]
    )
    header = ["D'", "", "MSE", "cosine", "variance kept", "standardised MSE / cosine", "same top token", "fitted in"]
    header.append("training takes longer, to within 1% (states at hand / with the model's passes)")
    return (
        f"The compressor on held-out states of a causal LM of {result['parameters'] / 1e6:.1f} M parameters trained "
        f"on GSM8K (hidden size 256): PCA, and the best of four runs from random rows.\n\n{table(header, rows)}\n"
        f"{source(result)}"
    )


def sequence_trm(result: dict[str, Any]) -> str:
    keys = ("mse", "r2", "cosine_similarity", "standardised_cosine_similarity", "top_token_agreement")

    def cells(row: dict[str, float]) -> list[str]:
        return [*(f"{row[key]:.3f}" for key in keys[:-1]), percent(row[keys[-1]])]

    rows = [[name, *cells(row)] for name, row in result["rows"].items()]
    trained = result["rows"]["SequenceTRM"]
    stands = "above" if trained["r2"] > result["rows"]["ridge regression"]["r2"] else "below"
    tries = [
        [str(row["trajectories"]), f"{row['noise_std']:g}", *cells(row), f"{row['mean_steps']:.2f}"]
        for row in [
            {"trajectories": 1, "noise_std": 0, "mean_steps": trained["mean_steps"], **result["without_noise"]}
        ]
        + [row for row in result["trajectories"] if row.get("select_by", "halt") == "halt"]
    ]
    header = ["MSE", "R²", "cosine", "standardised cosine", "same top token"]
    return (
        f"SequenceTRM on hidden pairs of the same model (from the states of a question to the state after its "
        f"solution), held out. Its halting head is right in {percent(trained['halting_accuracy'])} of the pairs and "
        f"lets it take {trained['mean_steps']:.2f} steps on average; {percent(trained['solved_share'])} end close "
        f"enough to the target to count as solved. Trained for {result['training_seconds'] / 60:.0f} minutes, it "
        f"stays {stands} ridge regression.\n\n{table(['', *header], rows)}\nSeveral noisy trajectories, of "
        f"which the halting head chooses (the first held-out pairs only):\n\n"
        f"{table(['trajectories', 'noise', *header, 'mean steps'], tries)}\n{source(result)}"
    )


def sequence_trm_speed(result: dict[str, Any]) -> str:
    rows = [
        [row["style"], row["what"], f"{row['plain_seconds']:.2f} s", f"{row['seconds']:.2f} s", f"{row['ratio']:.2f}x"]
        for row in result["rows"]
    ]
    return (
        f"A supervision step (training) and up to 8 of them (inference; halting after {result['mean_steps']:g} on "
        f"average) for 8 contexts of 40 to 160 positions, width 256, against a plain padded implementation:\n\n"
        f"{table(['block', '', 'plain', 'ours', 'ratio'], rows)}\n{source(result)}"
    )


def datagen(result: dict[str, Any]) -> str:
    rows = [
        [
            str(row["layers"]),
            row["side"],
            f"{row['mb']:.0f} MB",
            f"{row['mb_ratio']:.3f}x",
            f"{row['over_plain_mb']:.0f} MB",
            f"{row['seconds']:.1f} s",
            f"{row['seconds_ratio']:.2f}x",
        ]
        for row in result["rows"]
    ]
    header = ["layers", "", "peak over the model", "", "over plain `generate`", "time", ""]
    return (
        f"Hidden pairs against `generate(output_hidden_states=True)`: memory above the loaded model, and time."
        f"\n\n{table(header, rows)}\n{source(result)}"
    )


def mean(values: Any) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


PARTS = {
    "demo": demo,
    "latent_thinking": latent_thinking,
    "recursion_12": recursion,
    "recursion_10": recursion,
    "refiners": refiners,
    "compressor": compressor,
    "sequence_trm": sequence_trm,
    "sequence_trm_speed": sequence_trm_speed,
    "datagen": datagen,
}


def section() -> str:
    """Of every result there is."""
    parts = []
    for name, write in PARTS.items():
        path = RESULTS / f"{name}.json"
        if path.exists():
            parts.append(write(json.loads(path.read_text(encoding="utf-8"))))
    return "\n".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(START)
    _, after = rest.split(END)
    written = f"{before}{START}\n{section()}\n{END}{after}"
    if options.check:
        return int(written != text)
    README.write_text(written, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
