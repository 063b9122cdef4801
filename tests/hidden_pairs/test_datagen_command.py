"""`llada-trm datagen` from the outside: its files, its restarts, and what it refuses."""

import json
import os
import random
import time
from pathlib import Path

import pytest
import torch
from conftest import IN_TWO_PROCESSES
from datagen_models import CHAT_TEMPLATE, load_model, plain_greedy, plain_states, save_model, tokenizer_with_markers
from filelock import FileLock
from run_programs import run_program
from safetensors.torch import load_file

from llada_trm_hf import DimensionCompressor, DimensionCompressorConfig, LLaDAConfig, LLaDAForMaskedDiffusion
from llada_trm_hf.cli.main import main
from llada_trm_hf.hidden_pairs import HiddenPairsDataset
from llada_trm_hf.hidden_pairs.datagen import ShardMaker

NUM_PROBLEMS, SHARD, LIMIT = 14, 4, 24
PROMPTS = [f"problem {i * i * 37 % 101} " + "x" * (i % 7) + "?" for i in range(NUM_PROBLEMS)]
PROMPTS[5] = " "  # nothing to think about
PROMPTS[9] = "y" * 250  # more than the model's context takes


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_model(tmp_path_factory.mktemp("model"), "smollm3", favourites={"</think>": 2.4})


@pytest.fixture(scope="module")
def problems(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("data") / "problems.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt, "answer": "1"}) + "\n" for prompt in PROMPTS))
    return str(path)


@pytest.fixture(scope="module")
def flags(model, problems) -> list[str]:
    text = f"datagen --model {model} --dataset {problems} --max_new_tokens {LIMIT} --batch_size 3 --device cpu"
    return [*text.split(), "--checkpoint_every", str(SHARD)]


@pytest.fixture(scope="module")
def finished(flags, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    assert main([*flags, "--output_dir", str(folder)]) == 0
    return folder


def files(folder: Path) -> dict[str, bytes]:
    """Everything in a folder but the lock; a temporary file or folder counts."""
    found = [path for path in folder.rglob("*") if path.name != ".datagen.lock"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else b"" for path in found}


def metadata(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def traces(folder: Path) -> list[dict]:
    return [json.loads(line) for path in sorted(folder.glob("traces-*")) for line in path.read_text().splitlines()]


def assert_same_pairs(one: Path, other: Path) -> None:
    """The same pairs up to rounding, and the same metadata."""
    assert metadata(one) == metadata(other)
    for mine, theirs in zip(HiddenPairsDataset(one), HiddenPairsDataset(other)):
        assert mine["id"] == theirs["id"]
        for name in ("context", "target"):
            torch.testing.assert_close(mine[name], theirs[name], rtol=1e-4, atol=1e-5)


# --- What it makes ---


def test_everything_against_a_plain_reference(model, finished, capsys):
    """Each problem by itself: greedy decoding without cache, and the states of one plain forward pass."""
    llm, tokenizer = load_model(model), tokenizer_with_markers()
    pairs = HiddenPairsDataset(finished)
    assert pairs.model_name == model
    entries, written = metadata(finished), traces(finished)
    assert [entry["problem"] for entry in entries] == PROMPTS
    assert [entry["id"] for entry in entries] == [f"problems.jsonl:train:{i}" for i in range(NUM_PROBLEMS)]
    assert [entry["shard"] for entry in entries] == [i // SHARD for i in range(NUM_PROBLEMS)]
    assert [trace["prompt"] for trace in written] == PROMPTS
    position = 0
    for i, (entry, trace) in enumerate(zip(entries, written)):
        assert trace["status"] == entry["status"] and trace["id"] == entry["id"]
        if i in (5, 9):
            assert entry["status"] == ("empty_prompt" if i == 5 else "too_long") and trace["completion_ids"] == []
            assert entry["row"] is entry["offset"] is entry["length"] is None
            continue
        context = tokenizer(PROMPTS[i])["input_ids"]
        expected = plain_greedy(llm, [*context, 259], [260], tokenizer.eos_token_id, LIMIT)
        assert trace["completion_ids"] == expected and trace["completion"] == tokenizer.decode(expected)
        complete = expected[-1] == 260
        assert entry["num_prompt_tokens"] == len(context)
        assert entry["num_thought_tokens"] == len(expected) - complete
        assert entry["status"] == "complete" if complete else entry["status"] in ("no_end_of_thought", "ended_early")
        if complete:
            states = plain_states(llm, [*context, 259, *expected])
            item = pairs[position]
            assert item["id"] == entry["id"] and entry["length"] == len(context)
            torch.testing.assert_close(item["context"], states[: len(context)], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(item["target"], states[-1], rtol=1e-4, atol=1e-5)
            shard = load_file(finished / f"pairs-{entry['shard']:05d}.safetensors")
            rows = shard["hidden_pre"][entry["offset"] : entry["offset"] + entry["length"]]
            assert torch.equal(rows, item["context"])
            assert torch.equal(shard["hidden_post"][entry["row"]], item["target"])
            position += 1
    assert position == len(pairs) > 4 and len(pairs) + pairs.num_skipped == NUM_PROBLEMS


def test_the_summary_counts_what_was_skipped(flags, finished, capsys):
    assert main([*flags, "--output_dir", str(finished)]) == 0
    out = capsys.readouterr().out
    statuses = [entry["status"] for entry in metadata(finished)]
    assert f"{statuses.count('complete')} hidden pairs of {NUM_PROBLEMS} problems in {finished} (4 shards)" in out
    for reason in set(statuses) - {"complete"}:
        assert f"{statuses.count(reason)} {reason}" in out


@pytest.mark.parametrize("template", [None, CHAT_TEMPLATE.replace("[assistant]", "[assistant]<think>\n")])
def test_apart_and_in_one_go(problems, tmp_path, template, capsys):
    folder = save_model(tmp_path / "model", chat_template=template)
    text = f"datagen --model {folder} --dataset {problems} --max_new_tokens 20 --device cpu --checkpoint_every 5"
    apart, one_go = tmp_path / "apart", tmp_path / "one_go"
    assert main([*text.split(), "--output_dir", str(one_go)]) == 0
    assert main([*text.split(), "--stage", "traces", "--output_dir", str(apart)]) == 0
    assert "traces with a complete thought" in capsys.readouterr().out
    assert not list(apart.glob("pairs-*")) and not (apart / "metadata.jsonl").exists()
    assert main([*text.split(), "--stage", "states", "--output_dir", str(apart)]) == 0
    assert_same_pairs(apart, one_go)
    assert [path.read_bytes() for path in sorted(apart.glob("traces-*"))] == [
        path.read_bytes() for path in sorted(one_go.glob("traces-*"))
    ]
    # The folder of traces as a source of its own.
    text = text.replace(f"--dataset {problems} --max_new_tokens 20", f"--traces_file {apart} --stage states")
    assert main([*text.split(), "--output_dir", str(tmp_path / "third")]) == 0
    assert_same_pairs(tmp_path / "third", one_go)


def test_batches_change_states_by_rounding_only(flags, finished, tmp_path):
    other = [*flags, "--batch_size", "14", "--checkpoint_every", "14", "--output_dir", str(tmp_path)]
    assert main(other) == 0
    mine, theirs = metadata(finished), metadata(tmp_path)
    for entry in mine + theirs:
        for name in ("shard", "row", "offset"):
            del entry[name]
    assert mine == theirs
    for one, two in zip(HiddenPairsDataset(finished), HiddenPairsDataset(tmp_path)):
        torch.testing.assert_close(one["context"], two["context"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one["target"], two["target"], rtol=1e-4, atol=1e-5)


def test_sampling_does_not_depend_on_batches(flags, tmp_path):
    written = []
    for name, sizes in {"a": "3 4", "b": "2 14", "c": "3 4"}.items():
        batch, shard = sizes.split()
        sampled = [*flags, "--temperature", "0.9", "--top_p", "0.95", "--seed", "7" if name != "c" else "8"]
        sampled += ["--stage", "traces", "--batch_size", batch, "--checkpoint_every", shard]
        assert main([*sampled, "--output_dir", str(tmp_path / name)]) == 0
        written.append(traces(tmp_path / name))
    assert written[0] == written[1] != written[2]


def test_compressed_states(flags, finished, tmp_path, capsys):
    compressor = DimensionCompressor(DimensionCompressorConfig(hidden_size=32, compressed_size=5))
    compressor.save_pretrained(tmp_path / "compressor")
    out = tmp_path / "pairs"
    compressed = [*flags, "--compressor", str(tmp_path / "compressor"), "--output_dir", str(out)]
    assert main(compressed) == 0
    pairs, plain = HiddenPairsDataset(out), HiddenPairsDataset(finished, compressor)
    assert pairs.hidden_size == 5 and pairs.ids == plain.ids
    for one, two in zip(pairs, plain):
        torch.testing.assert_close(one["context"], two["context"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one["target"], two["target"], rtol=1e-4, atol=1e-5)
    # Another compressor under the same name.
    torch.manual_seed(1)
    DimensionCompressor(compressor.config).save_pretrained(tmp_path / "compressor")
    capsys.readouterr()
    assert main(compressed) == 2
    assert "was made with sha256_of_compressor=" in capsys.readouterr().err
    DimensionCompressor(DimensionCompressorConfig(hidden_size=8, compressed_size=5)).save_pretrained(tmp_path / "c8")
    assert main([*flags, "--compressor", str(tmp_path / "c8"), "--output_dir", str(tmp_path / "x")]) == 2
    assert "are 32 wide, the compressor" in capsys.readouterr().err
    assert files(tmp_path / "x") == {}


def test_half_precision(flags, finished, tmp_path):
    assert main([*flags, "--dtype", "bfloat16", "--output_dir", str(tmp_path)]) == 0
    shard = load_file(tmp_path / "pairs-00000.safetensors")
    assert shard["hidden_pre"].dtype == shard["hidden_post"].dtype == torch.bfloat16


def test_a_dataset_named_several_times_over(model, problems, tmp_path, capsys):
    text = (
        f"datagen --model {model} --dataset_name {problems},arithmetic --split train[:30] --num_terms 4 --device cpu"
    )
    text += f" --num_samples 3 --max_new_tokens 4 --output_dir {tmp_path}"
    assert main(text.split()) == 0
    ids = [entry["id"] for entry in metadata(tmp_path)]
    names = ("problems.jsonl:train[:30]", "arithmetic:train[:30]")
    assert ids == [f"{name}:{i}" for name in names for i in range(3)]
    assert main([*text.split(), "--dataset", f"{problems},{problems}"]) == 2
    assert "problems.jsonl is named twice" in capsys.readouterr().err


# --- Traces from elsewhere ---


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    "rows, columns",
    [
        ([{"prompt": "1+1?", "completion": "<think>\ntwo</think>2"}, {"prompt": "2?", "completion": "x"}], []),
        ([{"prompt": "1+1?", "reasoning": "\ntwo"}, {"prompt": "2?", "reasoning": ""}], []),
        (
            [{"q": "1+1?", "out": "\ntwo</think>", "completion": "?"}, {"q": "2?", "out": "x", "completion": "?"}],
            ["prompt=q", "completion=out"],
        ),
        ([{"question": "1+1?", "answer": "two #### 2"}, {"question": "2?", "answer": "#### 3"}], []),
    ],
)
def test_traces_of_a_file(model, tmp_path, rows, columns):
    path = write_rows(tmp_path / "t.jsonl", rows)
    text = f"datagen --model {model} --stage states --traces_file {path} --output_dir {tmp_path}/out --device cpu"
    assert main([*text.split(), *(["--columns", *columns] if columns else [])]) == 0
    thought = "two" if "question" in rows[0] else "\ntwo"
    tokenizer = tokenizer_with_markers()
    states = plain_states(load_model(model), tokenizer(f"1+1?<think>{thought}</think>")["input_ids"])
    (item,) = HiddenPairsDataset(tmp_path / "out")
    torch.testing.assert_close(item["context"], states[:4], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(item["target"], states[-1], rtol=1e-4, atol=1e-5)
    first, second = metadata(tmp_path / "out")
    assert first["id"] == item["id"] == "0" and first["num_thought_tokens"] == len(thought)
    assert second["status"] == ("no_end_of_thought" if "completion" in rows[0] else "no_thought")


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"text": "?"}], "lacks the columns prompt, answer"),
        ([{"prompt": 3, "reasoning": "x"}], "the prompt of row 0 is a int, not a text"),
        ([{"id": "a", "prompt": "?", "reasoning": "x"}] * 2, "are not unique: 1 different ones in 2 rows"),
        ([{"prompt": "?", "completion_ids": [5, 999, 260]}], "holds token 999, the vocabulary of"),
        ([{"prompt": "?", "completion_ids": [5, -1, 260]}], "holds token -1, the vocabulary of"),
        ([{"prompt": "?", "completion_ids": [5.0, 1.5, 260.0]}], "completion_ids must be whole numbers, got 5.0"),
        ([], "is empty"),
    ],
)
def test_bad_traces(model, tmp_path, capsys, rows, message):
    path = write_rows(tmp_path / "t.jsonl", rows)
    text = f"datagen --model {model} --stage states --traces_file {path} --output_dir {tmp_path}/out --device cpu"
    assert main(text.split()) == 2
    assert message in capsys.readouterr().err


def test_a_trace_longer_than_the_context_and_one_that_is_not_finite(tmp_path):
    """Of three traces one is too long, and one goes through an embedding that is NaN."""
    folder = save_model(tmp_path / "model")
    llm = load_model(folder)
    with torch.no_grad():
        llm.model.embed_tokens.weight[tokenizer_with_markers()("~")["input_ids"]] = float("nan")
    llm.save_pretrained(folder)
    rows = [{"prompt": "1?", "reasoning": text} for text in ("a" * 300, "~", "fine")]
    path = write_rows(tmp_path / "t.jsonl", rows)
    text = f"datagen --model {folder} --stage states --traces_file {path} --output_dir {tmp_path}/out --device cpu"
    assert main(text.split()) == 0
    assert [entry["status"] for entry in metadata(tmp_path / "out")] == ["too_long", "not_finite", "complete"]
    assert HiddenPairsDataset(tmp_path / "out").ids == ["2"]


# --- Restarts ---


def test_killed_at_every_step_of_writing(process, flags, finished, tmp_path):
    """Killed at its 5th, 9th, ... file operation, going on from what the one before left, until one ends."""
    command = [*flags, "--output_dir", str(tmp_path)]
    for kills in range(60):
        run = process.run(command, tmp_path, kill_at=5 + 4 * kills % 17)  # the first four are of the lock
        if run["code"] == 0:
            break
        assert run["code"] is None and not run["hung"], run["stderr"]
        if not (tmp_path / "metadata.jsonl").exists():  # written last
            with pytest.raises(ValueError, match="hold"):
                HiddenPairsDataset(tmp_path)
    assert run["code"] == 0 and kills >= 10
    assert files(tmp_path) == files(finished)


def kill_at_random_moments(process, flags: list[str], finished: Path, tmp_path: Path, number: int) -> None:
    start = time.perf_counter()
    whole = process.run([*flags, "--output_dir", str(tmp_path / "whole")], tmp_path / "whole")
    seconds = time.perf_counter() - start
    assert whole["code"] == 0 and files(tmp_path / "whole") == files(finished), whole["stderr"]
    generator, hits = random.Random(0), 0
    for i in range(number):
        folder = tmp_path / str(i)
        command = [*flags, "--output_dir", str(folder)]
        hits += process.run(command, folder, kill_after=generator.uniform(0, 0.7 * seconds))["code"] is None
        again = process.run(command, folder)
        assert again["code"] == 0, again["stderr"]
        assert files(folder) == files(finished), f"killed run {i}"
    assert hits  # most of them, unless the machine has sped up since


def test_killed_at_a_few_random_moments(process, flags, finished, tmp_path):
    kill_at_random_moments(process, flags, finished, tmp_path, 3)


@pytest.mark.slow
def test_killed_at_20_random_moments(process, flags, finished, tmp_path):
    kill_at_random_moments(process, flags, finished, tmp_path, 20)


@pytest.mark.parametrize("stage", ["traces", "states"])
def test_stages_apart_can_be_killed_too(process, flags, tmp_path, stage):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        if stage == "states":
            assert main([*flags, "--stage", "traces", "--output_dir", str(folder)]) == 0
    assert main([*flags, "--stage", stage, "--output_dir", str(whole)]) == 0
    run = process.run([*flags, "--stage", stage, "--output_dir", str(killed)], killed, kill_at=12)
    assert run["code"] is None and files(killed) != files(whole)
    assert main([*flags, "--stage", stage, "--output_dir", str(killed)]) == 0
    assert files(killed) == files(whole)


def test_damaged_and_missing_files_are_made_again(flags, finished, tmp_path, capsys):
    assert main([*flags, "--output_dir", str(tmp_path)]) == 0
    shard, written = tmp_path / "pairs-00002.safetensors", tmp_path / "traces-00001.jsonl"
    shard.write_bytes(shard.read_bytes()[:-5])
    written.write_text(written.read_text()[:-50])
    (tmp_path / "pairs-00000.safetensors").unlink()
    (tmp_path / "metadata.jsonl").unlink()
    capsys.readouterr()
    assert main([*flags, "--output_dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "Making shard 2 again" in out and "cut short" in out and "Making shard 1 again" in out
    assert files(tmp_path) == files(finished)


def test_a_finished_run_needs_no_model(flags, finished, tmp_path, monkeypatch):
    monkeypatch.setattr(ShardMaker, "__init__", lambda *args: pytest.fail("a model was loaded"))
    before = {path.name: path.stat().st_mtime_ns for path in finished.glob("pairs-*")}
    assert main([*flags, "--output_dir", str(finished), "--export_legacy", str(tmp_path / "p.pt")]) == 0
    assert before == {path.name: path.stat().st_mtime_ns for path in finished.glob("pairs-*")}
    older, newer = HiddenPairsDataset(tmp_path / "p.pt"), HiddenPairsDataset(finished)
    assert len(older) == len(newer)
    assert all(torch.equal(one["context"], two["context"]) for one, two in zip(older, newer))


def test_a_full_disk_loses_nothing(process, flags, finished, tmp_path):
    """From the third shard on, files may not grow beyond a limit that the traces keep and the pairs do not."""
    largest_trace = max(path.stat().st_size for path in finished.glob("traces-*"))
    smallest_pairs = min(path.stat().st_size for path in finished.glob("pairs-*"))
    assert largest_trace < smallest_pairs

    command = [*flags, "--output_dir", str(tmp_path)]
    run = process.run(command, tmp_path, size_limit=largest_trace, limit_from="traces-00002")
    assert run["code"] == 1
    assert f"could not write {tmp_path}/pairs-00002.safetensors: File too large" in run["stderr"].splitlines()[-1]
    left = files(tmp_path)
    assert set(left) == {"datagen_config.json"} | {f"traces-0000{i}.jsonl" for i in range(3)} | {
        f"pairs-0000{i}.safetensors" for i in range(2)
    }
    assert main([*flags, "--output_dir", str(tmp_path)]) == 0
    assert files(tmp_path) == files(finished)


def test_interrupted(flags, tmp_path, finished, monkeypatch, capsys):
    make, calls = ShardMaker.make, []

    def interrupted(self, number, advance):
        calls.append(number)
        if number == 2:
            raise KeyboardInterrupt
        make(self, number, advance)

    monkeypatch.setattr(ShardMaker, "make", interrupted)
    assert main([*flags, "--output_dir", str(tmp_path)]) == 130
    assert capsys.readouterr().err.strip().endswith("llada-trm: interrupted.")
    monkeypatch.undo()
    assert main([*flags, "--output_dir", str(tmp_path)]) == 0
    assert files(tmp_path) == files(finished)


def test_two_processes_give_the_files_of_one(flags, finished, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    arguments = [*IN_TWO_PROCESSES, "-m", "llada_trm_hf.cli", *flags, "--output_dir", str(tmp_path)]
    result = run_program(arguments, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("hidden pairs of") == 1
    assert files(tmp_path) == files(finished)
    # A run of two processes is refused as one is, and none of them writes.
    (tmp_path / "pairs-00001.safetensors").unlink()
    with FileLock(tmp_path / ".datagen.lock"):
        result = run_program(arguments, env=environment)
    assert result.returncode != 0 and "Another run is writing to" in result.stderr
    assert not (tmp_path / "pairs-00001.safetensors").exists()


# --- What it refuses ---


@pytest.mark.parametrize(
    "change, message",
    [
        (["--max_new_tokens", "25"], "was made with max_new_tokens=24, now it is 25 (traces)"),
        (["--batch_size", "2"], "was made with batch_size=3, now it is 2"),
        (["--temperature", "0.5"], "was made with temperature=0.0, now it is 0.5"),
        (["--seed", "1"], "was made with seed=0, now it is 1"),
        (["--dtype", "bfloat16"], "was made with dtype='auto', now it is 'bfloat16'"),
        (["--checkpoint_every", "5"], "was made with checkpoint_every=4, now it is 5"),
        (["--num_samples", "3"], "was made with num_samples=None, now it is 3"),
        (["--split", "train[:5]"], "was made with split='train', now it is 'train[:5]'"),
        (["--think_end", "</x>"], "was made with think_end='</think>', now it is '</x>'"),
        (["--stage", "states"], "was made with states_from='generation', now it is 'traces'"),
        (["--no_auto_resume"], "holds an earlier run"),
    ],
)
def test_a_changed_configuration(flags, finished, capsys, change, message):
    before = files(finished)
    assert main([*flags, "--output_dir", str(finished), *change]) == 2
    error = capsys.readouterr().err
    assert message in error and len([line for line in error.splitlines() if line.startswith("llada-trm")]) == 1
    assert files(finished) == before


def test_changed_problems(flags, problems, tmp_path, capsys):
    path = tmp_path / "problems.jsonl"
    path.write_text(Path(problems).read_text())
    arguments = [*flags, "--dataset", str(path), "--output_dir", str(tmp_path / "out")]
    assert main(arguments) == 0
    path.write_text(path.read_text().replace("problem 37", "problem 38"))
    assert main(arguments) == 2
    assert "was made with sha256_of_problems=" in capsys.readouterr().err


def test_a_folder_in_use(flags, tmp_path, capsys):
    with FileLock(tmp_path / ".datagen.lock"):
        assert main([*flags, "--output_dir", str(tmp_path)]) == 1
    assert f"Another run is writing to {tmp_path}" in capsys.readouterr().err
    assert files(tmp_path) == {}


@pytest.mark.parametrize(
    "change, message",
    [
        (["--batch_size", "0"], "batch_size must be at least 1, got 0"),
        (["--checkpoint_every", "0"], "checkpoint_every must be at least 1, got 0"),
        (["--num_samples", "-1"], "num_samples must be at least 1, got -1"),
        (["--max_new_tokens", "0"], "max_new_tokens must be at least 1"),
        (["--temperature", "-1"], "temperature must be at least 0"),
        (["--top_k", "5"], "need a temperature above 0"),
        (["--stage", "all", "--traces_file", "x.jsonl"], "either --dataset, or --traces_file"),
        (["--dataset", ""], "either --dataset, or --traces_file"),
        (["--dataset", "", "--traces_file", "x.jsonl"], "use it with --stage states"),
        (["--dataset", "", "--traces_file", "no.jsonl", "--stage", "states"], "There is no file no.jsonl"),
        (["--dataset", "gsm8"], "Unknown dataset 'gsm8' (did you mean 'gsm8k'?)"),
        (["--dataset", "no.jsonl"], "There is no file no.jsonl"),
        (["--columns", "prompt"], "columns are pairs such as prompt=question"),
        (["--columns", "prompt=q"], "no such column: prompt=q"),
        (["--think_start", "</think>"], "think_start and think_end must differ"),
        (["--model", "/no/such/model"], "/no/such/model"),
        (["--compressor", "/no/such/compressor"], "/no/such/compressor"),
        (["--stage", "traces", "--compressor", "c"], "--compressor is for states"),
        (["--stage", "traces", "--export_legacy", "x.pt"], "--export_legacy writes hidden pairs"),
        (["--export_legacy", "no/folder/x.pt"], "There is no folder"),
        (["--stage", "states"], "run --stage traces first"),
        (["--dtype", "float8"], "invalid choice"),
        (["--max_tokens", "3"], "unrecognized arguments: --max_tokens"),
    ],
)
def test_mistakes_are_one_clear_line(flags, tmp_path, capsys, change, message):
    assert main([*flags, "--output_dir", str(tmp_path / "out"), *change]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert len([line for line in error.splitlines() if line.startswith("llada-trm")]) == 1
    assert not (tmp_path / "out").exists() or files(tmp_path / "out") == {}


def test_a_masked_diffusion_model_is_refused(flags, tmp_path, capsys):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    LLaDAForMaskedDiffusion(LLaDAConfig(vocab_size=300, mask_token_id=299, **sizes)).save_pretrained(tmp_path)
    tokenizer_with_markers().save_pretrained(tmp_path)
    assert main([*flags, "--model", str(tmp_path), "--output_dir", str(tmp_path / "out")]) == 2
    assert "is a LLaDAForMaskedDiffusion; hidden pairs need a causal language model" in capsys.readouterr().err


def test_foreign_shards_are_left_alone(flags, tmp_path, capsys):
    (tmp_path / "pairs-00000.safetensors").write_text("mine")
    assert main([*flags, "--output_dir", str(tmp_path)]) == 2
    assert "holds pairs-00000.safetensors, but no datagen_config.json" in capsys.readouterr().err
    (tmp_path / "datagen_config.json").write_text("{broken")
    assert main([*flags, "--output_dir", str(tmp_path)]) == 2
    assert "datagen_config.json is not valid JSON" in capsys.readouterr().err
    assert (tmp_path / "pairs-00000.safetensors").read_text() == "mine"
