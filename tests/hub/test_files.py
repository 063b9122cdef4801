"""Files that appear complete or not at all; what a full disk looks like, whoever writes."""

import errno
import os
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_training import TOKENIZER, new_backbone

from llada_trm_hf.cli.main import main
from llada_trm_hf.hub.files import disk_problem, move_folder, output_dir_lock, write_atomically, write_text


@pytest.fixture
def small_files():
    """No file may be larger than 10,000 bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: Path(path).write_bytes(bytes(20_000)),
        lambda path: save_file({"x": torch.zeros(5_000)}, path),
        lambda path: torch.save({"x": torch.zeros(5_000)}, path),
        lambda path: torch.save([torch.zeros(2_000), torch.zeros(2_000)], path),
    ],
    ids=["bytes", "safetensors", "torch", "torch in parts"],
)
def test_a_file_that_cannot_be_written_is_named_and_the_old_one_stays(tmp_path, small_files, write):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(OSError, match=f"could not write {path}: File too large. Free space") as caught:
        write_atomically(str(path), write)
    assert caught.value.errno == errno.EFBIG
    assert [found.name for found in tmp_path.iterdir()] == ["file"] and path.read_text() == "old"


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_files_have_the_mode_of_the_umask(tmp_path, umask):
    """(safetensors writes files that only their owner can read.)"""
    before = os.umask(umask)
    try:
        write_atomically(str(tmp_path / "tensors"), lambda path: save_file({"x": torch.zeros(5)}, path))
        write_text(str(tmp_path / "text"), "text")
        new_backbone().save_pretrained(tmp_path / "model")
        new_backbone().save_pretrained(tmp_path / "model")  # over an older one
        (tmp_path / "unfinished").mkdir()
        save_file({"x": torch.zeros(5)}, tmp_path / "unfinished" / "tensors")
        move_folder(str(tmp_path / "unfinished"), str(tmp_path / "checkpoint"))
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} >= {".safetensors", ".json", ".py", ".md"}
    for path in files:
        assert oct(path.stat().st_mode & 0o777) == oct(0o666 & ~umask), path


def test_what_a_killed_process_left_goes_with_the_next_write(tmp_path):
    """Under whatever name: safetensors writes to a file of a random one first."""
    path, names = tmp_path / "file", []

    def write(name):
        names.append(name)
        Path(name).write_text("old")

    write_atomically(str(path), write)
    # As the next write leaves it, if it is killed.
    scratch = Path(names[0]).parent
    assert scratch != tmp_path and scratch.parent == tmp_path and not scratch.exists()
    scratch.mkdir()
    (scratch / ".tmpX1y2").write_text("half")
    (tmp_path / ".file.tmp").write_text("whole, but not renamed")
    write_text(str(path), "new")
    assert [found.name for found in tmp_path.rglob("*")] == ["file"] and path.read_text() == "new"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_full_device_is_known_from_the_error():
    with pytest.raises(OSError) as caught, open("/dev/full", "w") as file:
        file.write("x")
        file.flush()
    assert "No space left on device" in disk_problem(caught.value, "/dev/full")
    for other in (OSError(errno.ENOENT, "No such file"), RuntimeError("shape"), ValueError(), OSError("no model")):
        assert disk_problem(other) is None


def test_a_folder_takes_the_place_of_another(tmp_path):
    for name, text in (("new", "new"), ("checkpoint", "old")):
        (tmp_path / name / "inside").mkdir(parents=True)
        write_text(str(tmp_path / name / "inside" / "file"), text)
    (tmp_path / "checkpoint" / "older").touch()
    move_folder(str(tmp_path / "new"), str(tmp_path / "checkpoint"))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == ["inside"]
    assert (tmp_path / "checkpoint" / "inside" / "file").read_text() == "new"


def test_two_demos_in_one_folder(tmp_path, capsys):
    folder = str(tmp_path / "demo")
    with output_dir_lock(folder, ".demo.lock"):
        assert main(["demo", "--smoke_test", "--output_dir", folder]) == 1
    assert capsys.readouterr().err.strip() == (
        f"llada-trm demo: Another run is writing to {folder}: choose another --output_dir."
    )


def test_two_traces_in_one_folder(tmp_path, capsys):
    new_backbone().save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    folder = str(tmp_path / "trace")
    command = ["trace", "--checkpoint", str(tmp_path / "model"), "--prompt", "12=", "--max_new_tokens", "4"]
    with output_dir_lock(folder, ".trace.lock"):
        assert main([*command, "--device", "cpu", "--output_dir", folder]) == 1
    assert f"Another run is writing to {folder}" in capsys.readouterr().err
    assert os.listdir(folder) == [".trace.lock"]
