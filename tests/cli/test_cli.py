"""The command line, from the outside: what it prints, writes and returns."""

import json
import os
import re
import shlex
import shutil
import sys
import warnings
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from conftest import forget_refiner
from run_programs import run_program
from tiny_training import SIZES, new_backbone
from transformers import AutoConfig

import llada_trm_hf.cli.generate
from llada_trm_hf import (
    LLaDATRMForMaskedDiffusion,
    MaskedDiffusionGenerationConfig,
    RecursiveRefinementHeadConfig,
    RefinementTrace,
)
from llada_trm_hf.cli.main import COMMANDS, main
from llada_trm_hf.data import byte_tokenizer
from llada_trm_hf.inspection import trace_summary
from llada_trm_hf.recipes.recipe import KINDS, training_method


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    tokenizer, folder = byte_tokenizer(), tmp_path_factory.mktemp("checkpoint")
    backbone = new_backbone(num_hidden_layers=1, max_position_embeddings=64, initializer_range=0.3)
    head = RecursiveRefinementHeadConfig(hidden_size=32, chunk_size=4, head_hidden_size=8)
    hybrid = LLaDATRMForMaskedDiffusion.from_backbone(backbone, head, min_confidence=1.0)
    hybrid.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def generate(checkpoint: str, *flags: str) -> int:
    return main(["generate", "--checkpoint", checkpoint, "--max_new_tokens", "6", "--device", "cpu", *flags])


def test_one_prompt_prints_the_answer(checkpoint, capsys):
    assert generate(checkpoint, "--prompt", "12=") == 0
    first = capsys.readouterr().out
    assert generate(checkpoint, "--prompt", "12=") == 0
    assert capsys.readouterr().out == first


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".txt"])
def test_prompt_files_give_what_single_prompts_give(checkpoint, tmp_path, capsys, suffix):
    prompts = ["12=", "a longer prompt", "7"]
    text = {
        ".json": json.dumps([prompts[0], {"prompt": prompts[1]}, prompts[2]]),
        ".jsonl": "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts),
        ".txt": "\n".join(prompts) + "\n",
    }[suffix]
    (tmp_path / f"prompts{suffix}").write_text(text)
    output = tmp_path / "answers.jsonl"
    assert (
        generate(checkpoint, "--prompts_file", str(tmp_path / f"prompts{suffix}"), "--output_file", str(output)) == 0
    )
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == prompts
    for row in rows:
        alone = tmp_path / "alone.jsonl"
        assert generate(checkpoint, "--prompt", row["prompt"], "--output_file", str(alone)) == 0
        assert json.loads(alone.read_text())["answer"] == row["answer"]


def test_show_intermediates_and_trace(checkpoint, tmp_path, capsys):
    trace = tmp_path / "trace.html"
    assert generate(checkpoint, "--prompt", "12=", "--show_intermediates", "--trace_file", str(trace)) == 0
    assert "\033[33m" in capsys.readouterr().out  # drafts are printed in yellow and overwritten
    assert "<html" in trace.read_text()


def test_no_refinement_is_the_backbone(checkpoint, tmp_path):
    output = tmp_path / "bare.jsonl"
    assert generate(checkpoint, "--prompt", "12=", "--no_refinement", "--output_file", str(output)) == 0
    model = LLaDATRMForMaskedDiffusion.from_pretrained(checkpoint)
    tokens = byte_tokenizer()("12=", return_tensors="pt")["input_ids"]
    expected = model.backbone.eval().generate(tokens, max_new_tokens=6)[0, 3:]
    text = byte_tokenizer().decode(expected[: (expected == model.config.eos_token_id).int().argmax() or None])
    assert json.loads(output.read_text())["answer"] == text


def test_fast_decoding_flags(checkpoint, tmp_path):
    output = tmp_path / "answer.jsonl"
    flags = ["--block_length", "3", "--kv_cache", "dual", "--confidence_factor", "1.5", "--remask_committed", "0.1"]
    assert generate(checkpoint, "--prompt", "12=", "--stop_at_eos", *flags, "--output_file", str(output)) == 0
    model = LLaDATRMForMaskedDiffusion.from_pretrained(checkpoint).eval()
    tokens = byte_tokenizer()("12=", return_tensors="pt")["input_ids"]
    settings = {"block_length": 3, "kv_cache": "dual", "confidence_factor": 1.5, "remask_committed": 0.1}
    expected = model.generate(tokens, max_new_tokens=6, stop_at_eos=True, **settings)[0, 3:]
    text = byte_tokenizer().decode(expected[: (expected == model.config.eos_token_id).int().argmax() or None])
    assert json.loads(output.read_text())["answer"] == text


def trace(checkpoint: str, folder: Path, *flags: str) -> int:
    where = ["--checkpoint", checkpoint, "--output_dir", str(folder), "--device", "cpu"]
    return main(["trace", *where, "--max_new_tokens", "6", *flags])


def test_trace_writes_page_picture_and_data(checkpoint, tmp_path, capsys):
    assert generate(checkpoint, "--prompt", "12=", "--num_diffusion_steps", "3") == 0
    answer = capsys.readouterr().out.rstrip("\n")
    assert trace(checkpoint, tmp_path / "new" / "out", "--prompt", "12=", "--num_diffusion_steps", "3") == 0
    printed = capsys.readouterr().out
    folder = tmp_path / "new" / "out"
    written = sorted(set(os.listdir(folder)) - {".trace.lock"})
    assert written == ["trace.html", "trace.json", "trace.png"]
    assert all(str(folder / name) in printed for name in written)
    recorded = RefinementTrace.from_json(folder / "trace.json")
    assert printed.startswith(f"{answer}\n\n6 tokens decided in 3 diffusion steps\n")
    assert f"{trace_summary(recorded)}\n" in printed and len(recorded.passes) == 3
    model = LLaDATRMForMaskedDiffusion.from_pretrained(checkpoint).eval()
    tokens = byte_tokenizer()("12=", return_tensors="pt")["input_ids"]
    sequences = model.generate(tokens, max_new_tokens=6, num_diffusion_steps=3)
    assert torch.equal(recorded.canvases[-1], sequences)
    recorded.plot(tmp_path / "again.png", byte_tokenizer())
    assert (folder / "trace.png").read_bytes() == (tmp_path / "again.png").read_bytes()
    recorded.to_html(tmp_path / "again.html", byte_tokenizer())
    assert (folder / "trace.html").read_text() == (tmp_path / "again.html").read_text()


def test_trace_draws_a_grid(checkpoint, tmp_path, capsys):
    flags = ["--prompt", "1..2=", "--num_diffusion_steps", "3"]
    assert trace(checkpoint, tmp_path / "grid", *flags, "--grid_width", "2") == 0
    recorded = RefinementTrace.from_json(tmp_path / "grid" / "trace.json")
    recorded.plot(tmp_path / "again.png", byte_tokenizer(), 2)
    assert (tmp_path / "grid" / "trace.png").read_bytes() == (tmp_path / "again.png").read_bytes()
    recorded.to_html(tmp_path / "again.html", byte_tokenizer(), 2)
    assert (tmp_path / "grid" / "trace.html").read_text() == (tmp_path / "again.html").read_text()
    capsys.readouterr()
    assert trace(checkpoint, tmp_path / "wide", *flags, "--grid_width", "3") == 2
    assert "grid_width=3 does not fit" in capsys.readouterr().err
    assert os.listdir(tmp_path / "wide") == [".trace.lock"]


@pytest.mark.parametrize("length", [4, 6])
def test_trace_compares_with_the_known_answer(checkpoint, tmp_path, capsys, length):
    flags = ["--prompt", "12=", "--num_diffusion_steps", "3", "--answer", "123456"[:length]]
    assert trace(checkpoint, tmp_path / "out", *flags) == 0
    recorded = RefinementTrace.from_json(tmp_path / "out" / "trace.json")
    end = [byte_tokenizer().eos_token_id] * (length == 4)  # there is room for it
    expected = [*byte_tokenizer()("123456"[:length])["input_ids"], *end]
    assert recorded.expected.tolist() == [[-1] * 3 + expected + [-1] * (6 - len(expected))]
    right = sum(a == b for a, b in zip(recorded.canvases[-1][0, 3:].tolist(), expected))
    assert f"\n{right} of {len(expected)} as in the known answer\n" in capsys.readouterr().out
    assert f"{right} of {len(expected)} tokens as in the known answer" in (tmp_path / "out/trace.html").read_text()


def test_trace_of_the_backbone_alone_has_no_picture(checkpoint, tmp_path, capsys):
    assert trace(checkpoint, tmp_path / "out", "--prompt", "12=", "--no_refinement") == 0
    assert sorted(os.listdir(tmp_path / "out")) == [".trace.lock", "trace.html", "trace.json"]
    assert "no refiner ran" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--prompt", " "], "Prompt 1 is empty"),
        ([], "the following arguments are required: --prompt"),
        (["--prompt", "1", "--top_p", "2"], "top_p must be above 0 and at most 1"),
        (["--prompt", "1", "--answer", ""], "--answer is empty"),
        (["--prompt", "1", "--answer", "1234567"], "The known answer has 7 tokens and 6 were generated"),
        (["--prompt", "1", "--output_file", "x"], "unrecognized arguments: --output_file"),
    ],
)
def test_trace_mistakes_leave_nothing_behind(checkpoint, tmp_path, capsys, flags, message):
    assert trace(checkpoint, tmp_path / "out", *flags) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_trace_needs_a_folder_and_matplotlib(checkpoint, tmp_path, capsys, monkeypatch):
    (tmp_path / "out").write_text("precious")
    assert trace(checkpoint, tmp_path / "out", "--prompt", "1") == 2
    assert "out is a file: choose another --output_dir" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "precious"
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert trace(checkpoint, tmp_path / "other", "--prompt", "1") == 2
    assert "pip install 'llada-trm-hf[train,demo,eval]'" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def mistake(*_):
    MaskedDiffusionGenerationConfig(top_p=2.0)  # raised by the package, for the user


def failed_assertion(*_):
    assert not "a bug"


@pytest.mark.parametrize(
    "raising, code, is_bug",
    [
        (mistake, 2, False),
        (lambda *_: AutoConfig.for_model("no such model"), 2, False),  # raised by a library that checks what it gets
        (lambda *_: json.loads("{"), 2, False),
        (lambda *_: b"\xff".decode(), 2, False),
        (lambda *_: int("x"), 1, True),  # a ValueError too, but of the interpreter
        (lambda *_: torch.nn.functional.cross_entropy(torch.ones(2, 3), torch.ones(3).long()), 1, True),
        (lambda *_: 1 / 0, 1, True),
        (lambda *_: {}["key"], 1, True),
        (failed_assertion, 1, True),
    ],
)
def test_a_bug_shows_a_traceback_and_a_mistake_in_debug_mode_only(
    checkpoint, capsys, monkeypatch, raising, code, is_bug
):
    monkeypatch.setattr("llada_trm_hf.cli.generate.load", raising)
    monkeypatch.setitem(raising.__globals__, "__name__", "llada_trm_hf.test")  # as if it stood in the package
    for value in ("0", "1"):
        monkeypatch.setenv("LLADA_TRM_DEBUG", value)
        assert generate(checkpoint, "--prompt", "1") == code
        error = capsys.readouterr().err
        assert ("Traceback" in error) == (is_bug or value == "1")
        assert error.splitlines()[-1].startswith("llada-trm generate: ")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--prompt", "  "], "Prompt 1 is empty"),
        (["--prompt", "x" * 100], "The prompt has 100 tokens"),
        (["--prompts_file", "nowhere.txt"], "There is no prompts file nowhere.txt"),
        (["--prompt", "1", "--num_diffusion_steps", "0"], "num_diffusion_steps must be an integer of at least 1"),
        (["--prompt", "1", "--remasking", "lowest"], "remasking must be one of"),
        (["--prompt", "1", "--top_p", "2"], "top_p must be above 0 and at most 1"),
        (["--prompt", "1", "--temprature", "1"], "unrecognized arguments: --temprature"),
        (["--prompt", "1", "--output_file", "no/such/folder/x.jsonl"], "There is no folder"),
        (["--prompt", "1", "--batch_size", "0"], "batch_size must be at least 1"),
        ([], "one of the arguments --prompt --prompts_file is required"),
    ],
)
def test_mistakes_are_one_clear_line(checkpoint, capsys, flags, message):
    assert generate(checkpoint, *flags) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "Traceback" not in error
    assert len([line for line in error.splitlines() if line.startswith("llada-trm")]) == 1


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("p.json", "{not json", "p.json is not valid JSON"),
        ("p.json", '{"prompt": "a"}', "must hold a list of prompts, got a dict"),
        ("p.jsonl", '{"prompt": "a"}\n{"text": "b"}\n', "entry 2 is neither a text nor an object with a 'prompt'"),
        ("p.txt", "\n\n", "holds no prompts"),
    ],
)
def test_bad_prompt_files(checkpoint, tmp_path, capsys, name, text, message):
    (tmp_path / name).write_text(text)
    assert generate(checkpoint, "--prompts_file", str(tmp_path / name)) == 2
    assert message in capsys.readouterr().err


def test_bad_checkpoints(checkpoint, tmp_path, capsys):
    assert generate(str(tmp_path / "nowhere"), "--prompt", "1") == 2
    assert "nowhere" in capsys.readouterr().err
    cut = tmp_path / "cut"
    cut.mkdir()
    for file in [path for path in Path(checkpoint).iterdir() if path.is_file()]:
        content = file.read_bytes()
        (cut / file.name).write_bytes(content[: len(content) // 2] if file.suffix == ".safetensors" else content)
    assert generate(str(cut), "--prompt", "1") == 2
    assert "a weights file is damaged" in capsys.readouterr().err


def test_unknown_command_and_help(capsys):
    assert main(["generat"]) == 2
    assert "unknown command 'generat'; one of demo, train, generate" in capsys.readouterr().err
    assert main(["--help"]) == 0
    for command in ("demo", "train", "generate", "trace", "datagen"):
        assert main([command, "--help"]) == 0
        assert "usage: llada-trm" in capsys.readouterr().out


def test_module_entry_point_and_exit_code():
    result = run_program([sys.executable, "-m", "llada_trm_hf.cli", "generate", "--prompt", "1"])
    assert result.returncode == 2
    assert "the following arguments are required: --checkpoint" in result.stderr


def test_what_optional_packages_log_stays_off_stderr():
    """torchao and bitsandbytes, where they are installed, say which of their extensions they did not load."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TORCHAO_")}
    result = run_program(
        [sys.executable, "-m", "llada_trm_hf.cli", "train", "--recipe", "warmup", "--help"],
        env=inherited,
    )
    assert result.returncode == 0 and "--learning_rate" in result.stdout
    assert result.stderr == ""


def test_demo_runs_from_start_to_end(tmp_path, capsys):
    folder = tmp_path / "demo"
    assert main(["demo", "--smoke_test", "--output_dir", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "bare backbone" in out and "control" in out and "refined" in out and "the same: True" in out
    results = json.loads((folder / "results.json").read_text())
    assert set(results["accuracy"]) == {"bare backbone", "control: backbone trained on", "refined"}
    assert (folder / "checkpoint" / "model.safetensors").exists()
    # What it saves, and how it says to use it, is what it found to be best.
    correct = [accuracy["correct"] for accuracy in results["accuracy"]["refined"]]
    settings = json.loads((folder / "checkpoint" / "generation_config.json").read_text())
    assert settings["num_diffusion_steps"] == results["steps"][correct.index(max(correct))]
    command, prompt, said = re.search(r'(llada-trm generate .* --prompt "(\d+=)")  # (\d+) is right', out).groups()
    assert [int(digit) for digit in said] == list(accumulate(map(int, prompt[:-1]), lambda a, b: abs(a - b)))
    assert main(shlex.split(command)[1:]) == 0
    data = re.search(r'id="trace">(.*?)</script>', (folder / "trace.html").read_text())[1]
    for row in json.loads(data)["rows"]:  # with the right answer: the difference to the next digit, again and again
        digits, answer = byte_tokenizer().decode(row["expected"], skip_special_tokens=True).split("=")
        assert [int(value) for value in answer] == list(accumulate(map(int, digits), lambda a, b: abs(a - b)))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    assert main(["demo", "--smoke_test", "--output_dir", str(tmp_path / "mine")]) == 2
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


# --- The first minutes ---


@pytest.mark.parametrize(
    "arguments, printed",
    [
        *[([command, "--help"], f"usage: llada-trm {command}") for command in COMMANDS if command != "lm-eval"],
        (["--help"], "usage: llada-trm COMMAND"),
        (["--version"], f"llada-trm {llada_trm_hf.__version__}"),
    ],
)
def test_help_does_not_wait_for_torch(arguments, printed):
    """Of the command line as a process of its own, since torch is imported here."""
    program = (
        "import sys; sys.argv[0] = 'llada-trm'; from llada_trm_hf.cli.main import main\n"
        f"code = main({arguments}); sys.exit(code or bool({{'torch', 'transformers', 'datasets'}} & set(sys.modules)))"
    )
    assert printed in run_program([sys.executable, "-c", program], check=True).stdout


def test_interrupted_while_it_imports(tmp_path):
    """Ctrl-C while torch is being imported: an interrupt stands in for it, in a module of that name."""
    (tmp_path / "torch.py").write_text(
        "import os, signal, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # what runs in the background ignores it
        "os.kill(os.getpid(), signal.SIGINT)\n"
        "time.sleep(5)\n"
    )
    result = run_program(
        [sys.executable, "-m", "llada_trm_hf.cli", "generate", "--checkpoint", "x", "--prompt", "1"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
    )
    assert result.returncode == 130 and result.stderr.strip() == "llada-trm: interrupted."


def test_the_command_line_registers_models_once_it_needs_them(checkpoint):
    program = (
        "import sys; sys.argv[0] = 'llada-trm'; from llada_trm_hf.cli.main import main\n"
        f"code = main(['generate', '--checkpoint', {checkpoint!r}, '--prompt', '1=', '--max_new_tokens', '4'])\n"
        "from llada_trm_hf import LLaDAConfig, MaskedDiffusionGenerationConfig\n"
        "from transformers import AutoConfig; AutoConfig.for_model('llada'); sys.exit(code)"
    )
    result = run_program([sys.executable, "-c", program])
    assert result.returncode == 0, result.stderr
    for noise in ("FutureWarning", "of type ``", "Loading weights", "pin_memory"):
        assert noise not in result.stderr


def test_help_of_a_recipe_is_grouped_and_has_its_defaults(capsys):
    assert main(["train", "--recipe", "slot_warmup_cpu", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    places = [text.index(f" {flag} ") for flag in ("--backbone", "--output_dir", "--use_ema", "--jit_mode_eval")[:3]]
    assert places == sorted(places)
    for title in ("what is trained on what:", "the run:", "the method:", "TrainingArguments:"):
        assert title in text
    assert "(default: train[:1000])" in text and "(default: 5e-4)" in text  # as the recipe sets them


def test_flags_of_the_overview_exist(capsys):
    assert main(["train", "--help"]) == 0
    flags = set(re.findall(r"--(\w+)", capsys.readouterr().out)) - {"help", "recipe", "config", "device"}
    known = {name for kind in KINDS for name in training_method(kind).option_names()}
    assert flags - known <= {"lr", "batch_size", "num_epochs"} and len(flags) > 15


def test_a_killed_run_keeps_the_answers_it_had(checkpoint, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("1=\n2=\n3=\n")
    output, calls = tmp_path / "answers.jsonl", []

    def killed_in_the_third(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            lines = [json.loads(line) for line in output.read_text().splitlines()]
            assert [line["prompt"] for line in lines] == ["1=", "2="]  # on the disk by now, not in a buffer
            raise KeyboardInterrupt
        return generate_batch(*arguments)

    generate_batch = llada_trm_hf.cli.generate.generate
    monkeypatch.setattr("llada_trm_hf.cli.generate.generate", killed_in_the_third)
    flags = ["--prompts_file", str(tmp_path / "prompts.txt"), "--output_file", str(output), "--batch_size", "1"]
    assert generate(checkpoint, *flags) == 130
    assert len(output.read_text().splitlines()) == 2


def test_a_prompt_too_long_leaves_earlier_answers_alone(checkpoint, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("1=\n" + "2" * 70 + "\n")
    output = tmp_path / "answers.jsonl"
    output.write_text("precious")
    assert generate(checkpoint, "--prompts_file", str(tmp_path / "prompts.txt"), "--output_file", str(output)) == 2
    assert "Prompt 2 has 70 tokens" in capsys.readouterr().err and output.read_text() == "precious"


def test_your_own_refiner_on_the_command_line(checkpoint, tmp_path, monkeypatch):
    """Trained, saved and used by commands alone, its file given to each."""
    module = Path(__file__).parents[2] / "examples/custom_refiner.py"
    shutil.copy(module, tmp_path / "my_refiner_module.py")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.json").write_text(json.dumps(SIZES))
    flags = "--backbone small.json --split train[:8] --num_terms 4 --max_steps 1 --use_cpu --save_strategy no"
    train = f"train --recipe finetune --refiner chunk_mean_refiner {flags} --output_dir run"
    try:
        for command in (train, "generate --checkpoint run --prompt 1= --max_new_tokens 4"):
            forget_refiner("chunk_mean_refiner")
            assert main([*command.split(), "--import_module", "my_refiner_module.py"]) == 0
    finally:
        forget_refiner("chunk_mean_refiner")
        del sys.modules["my_refiner_module"]
    assert (tmp_path / "run/my_refiner_module.py").exists()


def test_a_head_finds_its_backbone_and_its_tokenizer_from_anywhere(checkpoint, tmp_path, monkeypatch, capsys):
    """Trained on a backbone named from the current folder, saved without it."""
    (tmp_path / "training/runs").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "training")
    LLaDATRMForMaskedDiffusion.from_pretrained(checkpoint).backbone.save_pretrained("runs/bb")
    byte_tokenizer().save_pretrained("runs/bb")
    head = RecursiveRefinementHeadConfig(hidden_size=32, chunk_size=4, head_hidden_size=8)
    hybrid = LLaDATRMForMaskedDiffusion.from_backbone("runs/bb", head)
    hybrid.save_pretrained("runs/head", save_backbone=False)
    hybrid.save_pretrained("runs/whole")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert generate("../training/runs/head", "--prompt", "12=", "--no_refinement") == 0
    from_the_head = capsys.readouterr().out
    assert generate("../training/runs/bb", "--prompt", "12=") == 0
    assert capsys.readouterr().out == from_the_head

    # An older checkpoint, whose backbone has a name that only the folder beside it explains.
    config = json.loads((tmp_path / "training/runs/head/config.json").read_text())
    assert config["backbone_name_or_path"] == str(tmp_path / "training/runs/bb")
    for relative in ("../bb", "runs/bb"):
        config["backbone_name_or_path"] = relative
        (tmp_path / "training/runs/head/config.json").write_text(json.dumps(config))
        assert main(["push", "--checkpoint", "../training/runs/head", "--repo", "owner/name", "--dry_run"]) == 2
        assert f"names a folder of this machine, {relative}" in capsys.readouterr().err
    config["backbone_name_or_path"] = "../bb"
    (tmp_path / "training/runs/head/config.json").write_text(json.dumps(config))
    assert generate("../training/runs/head", "--prompt", "12=", "--no_refinement") == 0
    assert capsys.readouterr().out == from_the_head
    (tmp_path / "training/runs/bb").rename(tmp_path / "training/runs/renamed")
    assert generate("../training/runs/head", "--prompt", "12=") == 2
    assert "the folder of the one it names is not there: ../bb" in capsys.readouterr().err

    files = llada_trm_hf.hub.push.files_to_publish(tmp_path / "training/runs/whole", "owner/name")
    assert str(tmp_path) not in files["config.json"].decode() and str(tmp_path) not in files["README.md"].decode()


def test_a_frozen_random_backbone_is_warned_of(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.json").write_text(json.dumps(SIZES))
    flags = "--backbone small.json --split train[:8] --num_terms 4 --max_steps 1 --use_cpu --save_strategy no"
    with pytest.warns(UserWarning, match=r"random weights, and they are frozen: .*--recipe finetune --refiner none"):
        assert main([*f"train --recipe warmup {flags} --output_dir run".split()]) == 0
    with warnings.catch_warnings(record=True) as caught:
        assert main([*f"train --recipe finetune {flags} --output_dir other".split()]) == 0
    assert not [warning for warning in caught if "random weights" in str(warning.message)]
