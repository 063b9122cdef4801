"""Commands that are killed while they write, or that cannot write, and are run again."""

import csv
import json
import random
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from datagen_models import save_model
from safetensors.torch import load_file
from tiny_training import TOKENIZER, new_hybrid

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TRAIN = "train --recipe warmup --refiner recursive_refinement_head --dataset_name arithmetic --split train[:64]"
TRAIN += " --num_terms 4 --chunk_size 5 --head_hidden_size 16 --max_steps 4 --logging_steps 1 --save_steps 1"
TRAIN += " --save_total_limit 2 --use_ema true --eval_split test[:8] --eval_strategy steps --eval_steps 1"
TRAIN += " --load_best_model_at_end true --metric_for_best_model loss --use_cpu --report_to none --disable_tqdm true"
TRAIN += " --resume_from_checkpoint true"


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "small.json"
    path.write_text(json.dumps({**SIZES, "max_position_embeddings": 512}))
    return path


def train(config_file, folder: Path) -> list[str]:
    return [*TRAIN.split(), "--backbone", str(config_file), "--output_dir", str(folder)]


def state_of_run(folder: Path) -> dict:
    """What a run leaves, without times and the paths in it."""
    last = max((path for path in folder.glob("checkpoint-*")), key=lambda path: int(path.name[11:]))
    state = json.loads((last / "trainer_state.json").read_text())
    rows = [list(csv.DictReader((folder / f"{name}_metrics.csv").open())) for name in ("training", "validation")]
    times = ("runtime", "per_second")
    return {
        "files": sorted(path.name for path in folder.iterdir() if path.name != "README.md"),
        "weights": {name: tensor.tolist() for name, tensor in load_file(folder / "model.safetensors").items()},
        "checkpoint": {name: tensor.tolist() for name, tensor in load_file(last / "model.safetensors").items()},
        "average": {name: tensor.tolist() for name, tensor in load_file(last / "ema_state.safetensors").items()},
        "optimizer": str(torch.load(last / "optimizer.pt", weights_only=True)),
        "schedule": torch.load(last / "scheduler.pt", weights_only=True),
        "best": (state["best_global_step"], Path(state["best_model_checkpoint"] or "").name, state["best_metric"]),
        "logs": [[{k: v for k, v in row.items() if not k.endswith(times)} for row in table] for table in rows],
    }


def kill_and_finish(process, command, folder: Path, moments: list[int]) -> list[dict]:
    """Kills the command at each of these file operations in turn, and lets it end; the runs."""
    runs = [process.run(command, folder, kill_at=moment) for moment in moments]
    return [*runs, process.run(command, folder)]


def test_training_that_is_killed_ends_as_if_it_had_not_been(tmp_path, process, config_file):
    whole = process.run(train(config_file, tmp_path / "whole"), tmp_path / "whole")
    assert whole["code"] == 0, whole["stderr"]
    expected, choice, kills = state_of_run(tmp_path / "whole"), random.Random(0), 0
    for number in range(2):
        folder = tmp_path / f"killed-{number}"
        moments = [choice.randrange(1, whole["operations"] // 2) for _ in range(4)]
        runs = kill_and_finish(process, train(config_file, folder), folder, moments)
        assert all(run["code"] in (None, 0) for run in runs) and runs[-1]["code"] == 0, [run["stderr"] for run in runs]
        kills += sum(run["code"] is None for run in runs)
        assert state_of_run(folder) == expected, moments
    assert kills >= 6


def test_kills_at_every_point_of_a_save(tmp_path, process, config_file):
    """Of which the last restart, after a checkpoint was written and the model only in part, takes no more steps."""
    whole = process.run(train(config_file, tmp_path / "whole"), tmp_path / "whole")
    last = whole["operations"]
    folder = tmp_path / "killed"
    first = process.run(train(config_file, folder), folder, kill_at=last - 20)
    assert first["code"] is None
    again = process.run(train(config_file, folder), folder)
    assert again["code"] == 0, again["stderr"]
    assert state_of_run(folder) == state_of_run(tmp_path / "whole")


def test_a_command_that_hangs_is_ended_and_the_next_one_runs(tmp_path, process, config_file):
    run = process.run(train(config_file, tmp_path / "run"), tmp_path / "run", deadline=0.2)
    assert run["hung"] and run["code"] is None and "had not ended after 0.2 s" in run["stderr"]
    assert process.run(["--version"], tmp_path) == {"code": 0, "operations": 0, "stderr": "", "hung": False}


@pytest.mark.parametrize("limit", [30_000, 100_000])
def test_training_that_cannot_write_says_so_in_one_line(tmp_path, process, config_file, limit):
    """The limits are met by different writers: of tensors, of the optimizer, of the average."""
    run = process.run(train(config_file, tmp_path / "run"), tmp_path / "run", size_limit=limit)
    message = run["stderr"].strip().splitlines()[-1]
    assert run["code"] == 1 and "Traceback" not in run["stderr"], run["stderr"]
    assert f"could not write {tmp_path}/run/checkpoint-1: File too large" in message
    assert not [path for path in (tmp_path / "run").rglob("*") if "tmp" in path.name or "checkpoint" in path.name]
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {
        *(".training.lock", "training_metrics.csv", "validation_metrics.csv")
    }


# --- All commands that write ---

TIMES = ("seconds", "runtime", "per_second", "time")
SELDOM_THE_SAME = ("training_args.bin", "README.md", "trainer_state.json", "results.json")


def without_times(value):
    if isinstance(value, dict):
        return {name: without_times(item) for name, item in value.items() if not name.endswith(TIMES)}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def contents(folder: Path) -> dict[str, object]:
    """What is in the files, but times and hidden files; a zip archive counts by its name."""
    found: dict[str, object] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        # (The demo's control trains for as long as the head took.)
        if path.name in SELDOM_THE_SAME or path.name.endswith(".lock") or "training/control/" in name:
            continue
        if path.suffix == ".csv":
            found[name] = without_times(list(csv.DictReader(path.open())))
        elif path.suffix in (".json", ".jsonl"):
            found[name] = [without_times(json.loads(line)) for line in _documents(path)]
        else:
            found[name] = None if path.suffix in (".pt", ".pth") else path.read_bytes()
    return found


def _documents(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    return text.splitlines() if path.suffix == ".jsonl" else [text]


LM_DATA = "--dataset_name arithmetic --num_terms 3"
SMALL = "--max_new_tokens 6 --num_diffusion_steps 3 --device cpu"
RESUMED = "--use_cpu --report_to none --disable_tqdm true --resume_from_checkpoint true"
EVALUATE = f"evaluate --dataset_name arithmetic --num_terms 4 --batch_size 2 {SMALL}"
# For `command_of`: CONFIG is the config of a new model, MODELS the folder of what follows, OUT the output folder.
COMMANDS = {
    "train": f"{TRAIN} --backbone CONFIG --output_dir OUT",
    "slots": f"train --recipe slot_warmup --backbone CONFIG --dataset_name arithmetic --split train[:64] "
    f"--num_terms 4 --chunk_size 5 --max_steps 3 --save_steps 1 --batch_size 8 --gradient_accumulation_steps 1 "
    f"--logging_steps 1 {RESUMED} --output_dir OUT",
    "sweep": f"train --recipe compressor_1a --backbone MODELS/lm --dataset_name arithmetic --split train[:32] "
    f"--num_eval_samples 8 --compressed_sizes 2 4 --max_steps 3 --save_steps 1 --eval_steps 1 "
    f"--batch_size 8 --max_length 64 {RESUMED} --output_dir OUT",
    "trm": f"train --recipe trm --pairs_dir MODELS/pairs --n_latent_steps 1 --n_deep_recursions 1 --n_heads 2 "
    f"--n_supervision_steps 2 --max_steps 4 --batch_size 4 --eval_fraction 0.2 --eval_strategy steps --eval_steps 2 "
    f"--save_strategy steps --save_steps 2 --logging_steps 1 {RESUMED} --output_dir OUT",
    "latent_answer": f"train --recipe latent_answer --backbone MODELS/lm {LM_DATA} --split train[:16] --max_length 40 "
    f"--max_steps 3 --save_steps 1 --batch_size 4 --n_heads 2 --n_latent_steps 1 --n_deep_recursions 1 "
    f"--n_supervision_steps 2 --num_latents 2 --logging_steps 1 {RESUMED} --output_dir OUT",
    "datagen": f"datagen --model MODELS/lm {LM_DATA} --split train[:40] --max_new_tokens 12 --batch_size 4 "
    f"--checkpoint_every 8 --device cpu --output_dir OUT",
    "evaluate": f"{EVALUATE} --model MODELS/hybrid --split test[:6] --output_dir OUT",
    "compare": "compare MODELS/one MODELS/two --plot OUT/difference.png --output_file OUT/numbers.json",
    "generate": f"generate --checkpoint MODELS/hybrid --prompts_file MODELS/prompts.json {SMALL} "
    f"--output_file OUT/answers.jsonl",
    "trace": f"trace --checkpoint MODELS/hybrid --prompt 3942= {SMALL} --output_dir OUT",
    "export-onnx": "export-onnx --checkpoint MODELS/hybrid --output OUT/hybrid.onnx",
    "demo": "demo --smoke_test --output_dir OUT",
}


def command_of(name: str, models: Path, config_file: Path, folder: Path) -> list[str]:
    text = COMMANDS[name].replace("MODELS", str(models)).replace("CONFIG", str(config_file))
    return text.replace("OUT", str(folder)).split()


@pytest.fixture(scope="module")
def models(tmp_path_factory, process, config_file):
    """What the commands read."""
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "lm", favourites={"</think>": 4.0})  # which ends most thoughts of datagen
    hybrid = new_hybrid()
    hybrid.save_pretrained(folder / "hybrid")
    TOKENIZER.save_pretrained(folder / "hybrid")
    (folder / "prompts.json").write_text(json.dumps([f"{n}942=" for n in range(4)]))
    steps = (["--num_diffusion_steps", number] for number in "16")
    made = {
        name: [*command_of("evaluate", folder, config_file, folder / name), *next(steps)] for name in ("one", "two")
    }
    for name, command in {**made, "pairs": command_of("datagen", folder, config_file, folder / "pairs")}.items():
        run = process.run(command, folder / name)
        assert run["code"] == 0, run["stderr"]
    return folder


@pytest.mark.parametrize(
    "umask, names",
    [
        (0o022, ("train", "trm", "datagen", "evaluate", "generate")),
        (0o077, ("train", "datagen", "compare")),
        pytest.param(0o022, tuple(COMMANDS), marks=pytest.mark.slow),
        pytest.param(0o027, tuple(COMMANDS), marks=pytest.mark.slow),
    ],
)
def test_what_is_written_has_the_mode_of_the_umask(tmp_path, process, config_file, models, umask, names):
    for name in names:
        folder = tmp_path / name
        folder.mkdir(mode=0o777 & ~umask)
        run = process.run(command_of(name, models, config_file, folder), folder, umask=umask)
        assert run["code"] == 0, run["stderr"]
        found = {path: path.stat().st_mode & 0o777 for path in folder.rglob("*") if not path.name.endswith(".lock")}
        assert found
        for path, mode in found.items():
            assert oct(mode) == oct((0o777 if path.is_dir() else 0o666) & ~umask), path


KILLS = {"train": 16, "slots": 8, "sweep": 14, "trm": 10, "latent_answer": 8, "datagen": 12, "evaluate": 8}
KILLS |= {"compare": 5, "generate": 6, "trace": 6, "export-onnx": 4, "demo": 3}


@pytest.mark.slow
@pytest.mark.parametrize("name, kills", KILLS.items())
def test_a_hundred_kills_over_all_commands_that_write(tmp_path, process, config_file, models, name, kills):
    """By turns at a random file operation and at a random time, three times before the command may end."""
    if name == "export-onnx":
        pytest.importorskip("onnxscript")
    killed_and_run_again(tmp_path, process, partial(command_of, name, models, config_file), kills)


@pytest.mark.parametrize("name", ["trm", "evaluate", "generate"])
def test_a_few_kills(tmp_path, process, config_file, models, name):
    killed_and_run_again(tmp_path, process, partial(command_of, name, models, config_file), 2)


def killed_and_run_again(tmp_path: Path, process, command_for, kills: int) -> None:
    whole, choice, done = tmp_path / "whole", random.Random(7), 0
    whole.mkdir()
    start = time.perf_counter()
    first = process.run(command_for(whole), whole)
    seconds = time.perf_counter() - start
    assert first["code"] == 0, first["stderr"]
    expected = contents(whole)
    assert expected
    for number in range(kills):
        folder = tmp_path / "killed" / str(number)
        folder.mkdir(parents=True)
        command, moments = command_for(folder), []
        for turn in range(3):
            at = {"kill_at": choice.randrange(1, first["operations"] + 1)}
            moment = at if (number + turn) % 2 == 0 else {"kill_after": choice.uniform(0, seconds)}
            moments.append(moment)
            run = process.run(command, folder, **moment)
            assert run["code"] in (None, 0) and not run["hung"], (moments, run["stderr"])
            done += run["code"] is None
        last = process.run(command, folder)
        assert last["code"] == 0, (moments, last["stderr"])
        found = contents(folder)
        assert found.keys() == expected.keys(), moments
        for path, content in found.items():
            assert content == expected[path], (moments, path)
        if done >= kills:
            print(f"{done} kills, {number + 1} runs that ended")
            return
    raise AssertionError(f"only {done} kills")
