"""Older pickled files: what they hold arrives, and nothing they hold is executed."""

import dataclasses
import json
import os
import pickle
import subprocess
import sys
import types
import zipfile

import pytest
import torch

from llada_trm_hf.hub import import_legacy, read_legacy_hidden_pairs
from llada_trm_hf.models import DimensionCompressor, SequenceTRM

SETTINGS = {
    "n_layers": 1,
    "n_heads": 2,
    "n_latent_steps": 4,
    "n_deep_recursions": 2,
    "n_supervision_steps": 3,
    "dropout": 0.2,
    "halt_threshold": 0.7,
    "halt_loss_weight": 0.25,
    "bce_halt_loss": False,
    "learning_rate": 1e-3,
}
SHAPES = {
    "reasoning_token": (1, 1, 8),
    "net.layers.0.norm1.weight": (8,),
    "net.layers.0.self_attn.in_proj_weight": (24, 8),
    "net.layers.0.self_attn.in_proj_bias": (24,),
    "net.layers.0.self_attn.out_proj.weight": (8, 8),
    "net.layers.0.self_attn.out_proj.bias": (8,),
    "net.layers.0.norm2.weight": (8,),
    "net.layers.0.mlp.0.weight": (32, 8),
    "net.layers.0.mlp.0.bias": (32,),
    "net.layers.0.mlp.2.weight": (8, 32),
    "net.layers.0.mlp.2.bias": (8,),
    "halt_head.weight": (1, 8),
    "halt_head.bias": (1,),
    "output_norm.weight": (8,),
}


@pytest.fixture
def pickled_config(monkeypatch):
    """Instances of a dataclass that pickles under a given module and name, which exists while the file is written."""

    def make(module, name, **settings):
        for part in (".".join(module.split(".")[: i + 1]) for i in range(module.count(".") + 1)):
            if part not in sys.modules:
                monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
        cls = dataclasses.make_dataclass(name, [(key, type(value), value) for key, value in settings.items()])
        cls.__module__ = module
        monkeypatch.setattr(sys.modules[module], name, cls, raising=False)
        return cls()

    yield make
    monkeypatch.undo()


@pytest.fixture
def trm_content(pickled_config):
    """What a TRM trainer wrote, before it was pickled."""
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    shadow = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    config = pickled_config("__main__", "Phase2Config", **SETTINGS)
    content = {"epoch": 3, "trm_state_dict": weights, "optimizer_state_dict": {"state": {}}, "loss": 0.5}
    return {**content, "config": config, "ema_shadow": shadow}


def published(model):
    return {name.replace(".in_proj.", ".in_proj_"): tensor for name, tensor in model.state_dict().items()}


def edit_pickle(path, edit):
    """Rewrites the pickle inside a file."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, edit(data) if name.endswith("/data.pkl") else data)


# --- Golden files ---


@pytest.mark.parametrize("name, shape", [("compressor_a", (24, 96)), ("compressor_b", (32, 96))])
def test_golden_compressors(llm_trm, name, shape):
    model = import_legacy(llm_trm / f"{name}_legacy.pt")
    assert type(model) is DimensionCompressor and not model.training and model.weight.shape == shape
    assert (model.config.compressed_size, model.config.hidden_size) == shape


def test_golden_trm(llm_trm, tmp_path):
    (facts,) = json.loads((llm_trm / "manifest.json").read_text())["trms"]
    model, raw = (import_legacy(str(llm_trm / facts["checkpoint"]), use_ema=ema) for ema in (True, False))
    assert type(model) is SequenceTRM and not model.training and model.num_parameters() == facts["n_parameters"]
    for name, value in facts["config"].items():
        if name in ("n_layers", "n_heads", "n_latent_steps", "n_deep_recursions", "n_supervision_steps", "dropout"):
            assert getattr(model.config, name) == value
    assert model.config.hidden_size == 32 and model.config.halt_loss == "bce" and model.config.block_style == "llm_trm"
    assert model.config.cosine_threshold == 0.8 and model.config.halt_loss_weight == 0.5
    assert all(a.ne(b).any() for a, b in zip(model.parameters(), raw.parameters()))
    context = torch.randn(2, 5, 32)
    model.save_pretrained(tmp_path)
    again = SequenceTRM.from_pretrained(tmp_path)
    assert torch.equal(again.reason(context).prediction, model.reason(context).prediction)


def test_golden_pairs(llm_trm):
    facts = json.loads((llm_trm / "manifest.json").read_text())["hidden_pairs"]
    pairs = read_legacy_hidden_pairs(llm_trm / facts["file"])
    assert pairs.keys() == facts["keys"].keys() and len(pairs["problems"]) == facts["n"]
    assert [len(states) for states in pairs["hidden_pre"]] == pairs["seq_lengths"] == facts["seq_lengths"]
    assert pairs["num_thinking_tokens"] == facts["num_thinking_tokens"]
    assert pairs["hidden_post"].shape == (14, 96) and pairs["hidden_size"] == 96
    total = sum(states.double().sum().item() for states in pairs["hidden_pre"])
    assert total == pytest.approx(facts["checksum_pre_sum_f64"])
    assert pairs["hidden_post"].double().sum().item() == pytest.approx(facts["checksum_post_sum_f64"])


def test_golden_file_of_a_gpu(llm_trm, tmp_path):
    source = llm_trm / "trm_a_legacy.pt"
    path = tmp_path / "best.pt"
    path.write_bytes(source.read_bytes())
    cpu, gpu = b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0"
    edit_pickle(path, lambda data: data.replace(cpu, gpu) if cpu in data else pytest.fail("no location"))
    for name, tensor in import_legacy(path).state_dict().items():
        assert tensor.device.type == "cpu" and torch.equal(tensor, import_legacy(source).state_dict()[name])


# --- Every form of the files ---


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
@pytest.mark.parametrize("module", ["__main__", "src.train.phase2_trm"])
@pytest.mark.parametrize("ema", [True, False])
def test_trm_files(trm_content, pickled_config, tmp_path, monkeypatch, prefix, module, ema):
    weights, shadow = trm_content["trm_state_dict"], trm_content.pop("ema_shadow")
    content = trm_content | {"config": pickled_config(module, "Phase2Config", **SETTINGS)}
    content["trm_state_dict"] = {prefix + name: tensor for name, tensor in weights.items()}
    if ema:
        content["ema_shadow"] = {prefix + name: tensor for name, tensor in shadow.items()}
    torch.save(content, tmp_path / "trm.pt")
    monkeypatch.undo()
    assert module == "__main__" or module not in sys.modules
    for use_ema in (True, False):
        model = import_legacy(tmp_path / "trm.pt", use_ema=use_ema)
        expected, found = shadow if ema and use_ema else weights, published(model)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        assert model.config.n_heads == 2 and model.config.n_latent_steps == 4 and model.config.halt_loss == "mse"
        assert model.config.cosine_threshold == 0.7 and model.config.dropout == 0.2


@pytest.mark.parametrize("module", ["__main__", "src.train.phase1_compressor"])
def test_compressor_files(pickled_config, tmp_path, monkeypatch, module):
    weight = torch.randn(3, 5, dtype=torch.bfloat16)
    config = pickled_config(module, "Phase1Config", hidden_size=5)
    # A transposed view, as no trainer writes it: strides are honoured.
    torch.save({"compressor": {"compress.weight": weight.T.contiguous().T}, "config": config}, tmp_path / "c.pt")
    monkeypatch.undo()
    assert torch.equal(import_legacy(tmp_path / "c.pt").weight, weight.float())


def test_pairs_may_share_storage_or_be_empty(tmp_path):
    states = torch.randn(5, 4)
    content = {"hidden_pre": [states[:3], states[3:], torch.zeros(0, 4)], "hidden_post": torch.randn(3, 4)}
    content |= {"seq_lengths": [3, 2, 0], "num_thinking_tokens": [1, 2, 3], "problems": ["a", "ä", "题"]}
    torch.save(content | {"hidden_size": 4}, tmp_path / "pairs.pt")
    pairs = read_legacy_hidden_pairs(tmp_path / "pairs.pt")
    assert torch.equal(torch.cat(pairs["hidden_pre"]), states) and pairs["problems"] == ["a", "ä", "题"]


# --- Files that want to run code ---


class Calls:
    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def attacks(marker):
    command = f"touch {marker}"
    return {
        "posix.system": Calls(os.system, command),
        "builtins.eval": Calls(eval, f"open({str(marker)!r}, 'w')"),
        "builtins.getattr": Calls(getattr, "text", "upper"),
        "subprocess.check_output": Calls(subprocess.check_output, ["touch", str(marker)]),
        "torch.serialization.load": Calls(torch.load, str(marker)),
        "types.SimpleNamespace": types.SimpleNamespace(a=1),
    }


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("place", ["config", "compressor", "extra", "whole"])
@pytest.mark.parametrize("name", list(attacks("")))
def test_malicious_files(tmp_path, name, place, protocol):
    """The trainers wrote protocol 2; nothing is read of another one."""
    marker = tmp_path / "executed"
    content = {"compressor": {"compress.weight": torch.ones(2, 3)}, "config": None}
    attack = attacks(marker)[name]
    content = attack if place == "whole" else content | {place: attack}
    torch.save(content, tmp_path / "file.pt", pickle_protocol=protocol)
    # Protocol 2 writes Python 2's name of the module.
    names = rf"file\.pt.*names {name.replace('subprocess', 'commands')}, "
    for read in (import_legacy, read_legacy_hidden_pairs):
        with pytest.raises(ValueError, match=names if protocol == 2 else r"file\.pt"):
            read(tmp_path / "file.pt")
    assert not marker.exists()


def test_torch_that_does_not_read_safely(llm_trm, monkeypatch):
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)("2.9.1+cpu"))
    with pytest.raises(ImportError, match=r"2\.10.*2\.9\.1"):
        import_legacy(llm_trm / "trm_a_legacy.pt")


def test_the_attacks_are_real(tmp_path):
    pickle.loads(pickle.dumps(attacks(tmp_path / "executed")["posix.system"]))
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "module, name",
    [
        ("__main__", "Phase3Config"),
        ("src.train.phase2_trm", "os"),
        ("torch", "FloatStorage.from_file"),
        ("torch", "load"),
        ("collections", "OrderedDict.fromkeys"),
        ("torch._utils", "_import_dotted_name"),
    ],
)
def test_neighbours_of_the_allowed_names_are_refused(tmp_path, module, name):
    torch.save({"compressor": {}}, tmp_path / "file.pt")
    edit_pickle(tmp_path / "file.pt", lambda _: b"\x80\x02" + f"c{module}\n{name}\n.".encode())
    with pytest.raises(ValueError, match=f"names {module}.{name}, "):
        import_legacy(tmp_path / "file.pt")


def test_tensors_beyond_their_storage(tmp_path):
    """The bytes that are there are all that can be read."""
    torch.save({"compressor": {"compress.weight": torch.ones(3, 5)}, "config": None}, tmp_path / "file.pt")
    three = b"K\x03K\x05\x86"  # the size (3, 5)
    edit_pickle(tmp_path / "file.pt", lambda data: data.replace(three, b"K\x7fK\x05\x86", 1))
    with pytest.raises(ValueError, match=r"file\.pt.*storage"):
        import_legacy(tmp_path / "file.pt")


@pytest.mark.parametrize("kind", ["compressed", "overlapping"])
def test_zip_bombs_are_not_unpacked(tmp_path, monkeypatch, kind):
    """64 MB of zeros in 64 kB, and 64 entries that are the same bytes: refused by the table of contents."""
    path = tmp_path / "bomb.pt"
    torch.save({"compressor": {"compress.weight": torch.ones(2, 3)}, "config": None}, path)
    with zipfile.ZipFile(path, "a", compression=zipfile.ZIP_DEFLATED) as archive:
        if kind == "compressed":
            archive.writestr("file/data/9", bytes(2**26))
        else:
            with archive.open(zipfile.ZipInfo("file/data/0"), "w") as part:
                part.write(os.urandom(2**16))
            archive.filelist += [archive.filelist[-1]] * 64
    assert path.stat().st_size < 2**18
    unpacked = []
    monkeypatch.setattr(zipfile.ZipExtFile, "read", lambda *_: unpacked.append(1) or b"")
    for read in (import_legacy, read_legacy_hidden_pairs):
        with pytest.raises(ValueError, match=r"Cannot read .*bomb\.pt.* bytes would unpack to \d+"):
            read(path)
    assert not unpacked


def test_tensors_that_repeat_their_storage(tmp_path):
    """800 GB by a stride of zero, in a file of 1 kB."""
    weight = torch.ones(1, 1).expand(2, 10**11)
    torch.save({"compressor": {"compress.weight": weight}, "config": None}, tmp_path / "file.pt")
    with pytest.raises(ValueError, match=r"file\.pt.*\(2, 100000000000\) in it has 4 bytes only"):
        import_legacy(tmp_path / "file.pt")


# --- Other wrong files ---


def test_missing_and_damaged_files(trm_content, tmp_path):
    path = tmp_path / "trm.pt"
    with pytest.raises(FileNotFoundError):
        import_legacy(path)
    torch.save(trm_content, path)
    whole = path.read_bytes()
    for damaged in (b"", b"no archive", whole[:1000], whole[:-200], whole[:300] + b"????" + whole[304:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"Cannot read .*trm\.pt"):
            import_legacy(path)
    torch.save(trm_content | {"config": None}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"Cannot read .*trm\.pt"):
        import_legacy(path)
    torch.save(torch.ones(3), path)
    with pytest.raises(ValueError, match="holds a Tensor, expected a dictionary"):
        import_legacy(path)


def test_incomplete_checkpoints(trm_content, pickled_config, tmp_path):
    path = tmp_path / "trm.pt"

    def refused(message, **changes):
        torch.save(trm_content | changes, path)
        with pytest.raises(ValueError, match=rf"(?s)trm\.pt.*{message}"):
            import_legacy(path)

    shadow = trm_content["ema_shadow"]
    refused(r"output_norm\.weight", ema_shadow={n: t for n, t in shadow.items() if n != "output_norm.weight"})
    refused(r"more\.weight", ema_shadow=shadow | {"more.weight": torch.ones(1)})
    refused(r"mlp\.2\.weight", ema_shadow=shadow | {"net.layers.0.mlp.2.weight": torch.ones(3)})
    refused("reasoning_token", ema_shadow={"halt_head.bias": torch.ones(1)})
    settings = {name: value for name, value in SETTINGS.items() if name not in ("n_heads", "dropout")}
    refused("n_heads", config=pickled_config("__main__", "Phase2Config", **settings))
    # More layers than tensors, and heads that do not fit.
    refused(r"layers\.1", config=pickled_config("__main__", "Phase2Config", **SETTINGS | {"n_layers": 2}))
    refused("multiple of 3", config=pickled_config("__main__", "Phase2Config", **SETTINGS | {"n_heads": 3}))


def test_the_wrong_kind_of_file(trm_content, tmp_path):
    pairs = {"hidden_pre": [torch.ones(3, 4)], "hidden_post": torch.ones(1, 4), "seq_lengths": [3]}
    pairs |= {"num_thinking_tokens": [2], "problems": ["x"], "hidden_size": 4}
    path = tmp_path / "pairs.pt"
    torch.save(pairs, path)
    with pytest.raises(ValueError, match=r"neither a compressor.*It holds hidden pairs: use read_legacy_hidden_pairs"):
        import_legacy(path)
    torch.save({"model": 1}, path)
    with pytest.raises(ValueError, match=r"neither a compressor .* nor a TRM .*, but \['model'\]"):
        import_legacy(path)
    torch.save(trm_content, path)
    with pytest.raises(ValueError, match="does not hold hidden pairs: it lacks"):
        read_legacy_hidden_pairs(path)
    for changes, message in (
        ({"seq_lengths": [4]}, "shapes of hidden_pre and hidden_post differ"),
        ({"hidden_size": 5}, "shapes of hidden_pre and hidden_post differ"),
        ({"hidden_post": torch.ones(2, 4)}, "shapes of hidden_pre and hidden_post differ"),
        ({"problems": []}, "different lengths"),
        ({"hidden_post": None}, "does not hold hidden pairs"),
        ({"seq_lengths": 3}, "does not hold hidden pairs"),
    ):
        torch.save(pairs | changes, path)
        with pytest.raises(ValueError, match=message):
            read_legacy_hidden_pairs(path)
