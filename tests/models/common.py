"""
What a person does with a Llama in the Hugging Face world, as tests that every model class of the package is held to:
`test_every_model.py`, where a class joins in a few lines. Where a class cannot have what a test is about, the test
skips with a sentence that says why; `benchmarks/capabilities.py` makes a table of what passes.
"""

import copy
import inspect
import os

import pytest
import torch
import transformers
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig

ROWS, LENGTH, WIDTH = 2, 11, 32


class ModelTesterMixin:
    """
    Attributes:
        output: the field of the output that is compared.
        mask: the name of the padding mask among the arguments of `forward`; None without one.
        recursive: sub-modules that are no backbone: trained in full beside adapters, and not quantised.
        fixed_arguments, fixed_config: arguments of `forward`, and fields of the config (with dots), that ask for a
            fixed amount of recursion, which is what compiles to one graph.
        untrained: parts that a loss of the class alone does not reach.
        exempt: tests that are not for this class, with the reason.
    """

    output = "logits"
    mask: str | None = "attention_mask"
    recursive: tuple[str, ...] = ()
    fixed_arguments: dict = {}
    fixed_config: dict = {}
    untrained: tuple[str, ...] = ()
    exempt: dict[str, str] = {}

    def new_model(self):
        """A tiny model in evaluation mode, with weights large enough that its output means something."""
        raise NotImplementedError

    def new_inputs(self, seed=0):
        """The arguments of `forward`: `ROWS` rows of `LENGTH` without padding."""
        raise NotImplementedError

    def loss(self, output, inputs):
        """What training minimises."""
        return output.loss if output.get("loss") is not None else output[self.output].float()[..., 0].square().mean()

    def training_inputs(self, seed=0):
        return self.new_inputs(seed)

    @pytest.fixture(autouse=True)
    def _exempt(self, request):
        name = request.node.originalname
        if name in self.exempt:
            pytest.skip(self.exempt[name])

    @pytest.fixture
    def model(self):
        return self.new_model().eval()

    @pytest.fixture
    def inputs(self):
        return self.new_inputs()

    @torch.no_grad()
    def run(self, model, inputs):
        torch.manual_seed(0)
        return model(**inputs)[self.output]

    def check_same(self, found, expected, **tolerance):
        """The rounding of a sum goes with the size of what is summed: on another CPU, with logits up to 8, 1.4e-5."""
        size = max(1.0, float(expected.detach().float().abs().max())) if expected.numel() else 1.0
        torch.testing.assert_close(found, expected, **{"atol": 1e-5 * size, "rtol": 1e-4, **tolerance})

    # --- Configuration, saving, loading ---

    def test_config(self, model, tmp_path):
        config_class = type(model.config)
        if not getattr(config_class, "has_no_defaults_at_init", False):
            config_class()  # transformers compares with a config of defaults
        model.config.save_pretrained(tmp_path)
        loaded = config_class.from_pretrained(tmp_path)
        assert loaded.to_dict() == model.config.to_dict() | {
            name: loaded.to_dict()[name]
            for name in ("transformers_version", "_name_or_path")
            if name in loaded.to_dict()
        }
        assert type(AutoConfig.from_pretrained(tmp_path)) is config_class

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_save_and_load(self, model, inputs, tmp_path, dtype):
        model = model.to(dtype)
        model.save_pretrained(tmp_path, max_shard_size="20KB")
        loaded = type(model).from_pretrained(tmp_path, dtype=dtype)
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name
        # A copy: tensors of a mapped file are not aligned, and other kernels round differently.
        tolerance = {} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.1}
        self.check_same(self.run(copy.deepcopy(loaded), inputs), self.run(model, inputs), **tolerance)

    def test_auto_classes(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        assert model.auto_classes
        for name in model.auto_classes:
            loaded = getattr(transformers, name).from_pretrained(tmp_path, trust_remote_code=True)
            assert type(loaded).__name__ == type(model).__name__, name

    def test_an_incomplete_checkpoint_is_refused(self, model, tmp_path):
        weights = model.state_dict()
        shared = {tensor.data_ptr() for tensor in weights.values()}
        if len(weights) < 2 or len(shared) < 2:
            pytest.skip("has one tensor only")
        left_out = max(weights, key=lambda name: weights[name].numel() if ".refiner" not in name else 0)
        kept = {name: tensor for name, tensor in weights.items() if tensor.data_ptr() != weights[left_out].data_ptr()}
        model.save_pretrained(tmp_path, state_dict=kept)
        with pytest.raises(ValueError, match=left_out.replace(".", r"\.")):
            type(model).from_pretrained(tmp_path)

    def test_weights_are_initialised(self):
        """The same seed, the same weights, all of them finite; a second seed, others."""

        model = self.new_model()

        def weights(seed):
            torch.manual_seed(seed)
            return type(model)(copy.deepcopy(model.config)).state_dict()

        first, second, other = weights(0), weights(0), weights(1)
        assert all(torch.equal(first[name], second[name]) and first[name].isfinite().all() for name in first)
        assert any(not torch.equal(first[name], other[name]) for name in first)

    # --- Forward ---

    def test_outputs_as_tuples(self, model, inputs):
        torch.manual_seed(0)
        named = model(**inputs)
        as_tuple = model(**inputs, return_dict=False)
        assert isinstance(as_tuple, tuple) and len(as_tuple) == len(named.to_tuple())
        self.check_same(as_tuple[list(named.keys()).index(self.output)], named[self.output])
        model.config.return_dict = False
        assert isinstance(model(**inputs), tuple)

    def test_main_input(self, model, inputs):
        arguments = list(inspect.signature(type(model).forward).parameters)
        assert arguments[1] == model.main_input_name and model.main_input_name in inputs

    def test_rows_do_not_see_each_other(self, model, inputs):
        together = self.run(model, inputs)
        for row in range(ROWS):
            alone = self.run(model, {name: value[row : row + 1] for name, value in inputs.items()})
            self.check_same(alone[0], together[row])

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding_changes_nothing(self, model, inputs, side):
        if self.mask is None:
            pytest.skip("takes no padding mask")
        expected, extra = self.run(model, inputs), 3
        pads = (extra, 0) if side == "left" else (0, extra)
        real = nn.functional.pad(torch.ones(ROWS, LENGTH, dtype=torch.long), pads)
        padded = {self.mask: real}
        for name, value in inputs.items():
            flat = value.flatten(2) if value.ndim > 2 else value[..., None]
            shape = (ROWS, LENGTH + extra, *value.shape[2:])
            content = 7 if name == "input_ids" else 5.0
            padded[name] = nn.functional.pad(flat, (0, 0, *pads), value=content).view(shape)
        found = self.run(model, padded)
        if found.shape[1] == LENGTH + extra:
            found = found[:, real[0].bool()]
        self.check_same(found, expected)

    def test_hidden_states(self, model, inputs):
        if not hasattr(model.config.get_text_config(), "num_hidden_layers") or self.output not in (
            "logits",
            "last_hidden_state",
        ):
            pytest.skip("has no stack of layers")
        plain = model(**inputs)
        asked = model(**inputs, output_hidden_states=True)
        assert plain.get("hidden_states") is None and len(asked.hidden_states) >= 3
        assert all(states.shape == (ROWS, LENGTH, WIDTH) for states in asked.hidden_states)
        self.check_same(asked[self.output], plain[self.output])
        model.config.output_hidden_states = True
        by_config = model(**inputs)
        for found, expected in zip(by_config.hidden_states, asked.hidden_states, strict=True):
            self.check_same(found, expected)

    def test_attentions(self, model, inputs):
        model.set_attn_implementation("eager")
        plain = model(**inputs)
        asked = model(**inputs, output_attentions=True)
        self.check_same(asked[self.output], plain[self.output])
        assert len(asked.attentions) == model.config.get_text_config().num_hidden_layers
        for weights in asked.attentions:
            assert weights.shape[0] == ROWS and weights.shape[-2:] == (LENGTH, LENGTH)
            self.check_same(weights.sum(-1), torch.ones_like(weights.sum(-1)))

    def test_bfloat16(self, model, inputs):
        expected = self.run(model, inputs)
        found = self.run(model.to(torch.bfloat16), inputs).float()
        assert found.isfinite().all() and found.shape == expected.shape
        assert (found - expected).abs().mean() < 0.25 * expected.abs().mean() + 1e-3

    # --- Training ---

    def gradients(self, model, inputs):
        torch.manual_seed(0)
        model.zero_grad()
        self.loss(model(**inputs), inputs).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    def test_every_weight_gets_a_gradient(self, model):
        gradients = self.gradients(model.requires_grad_(True).train(), self.training_inputs())
        missing = [name for name, gradient in gradients.items() if gradient is None or not gradient.isfinite().all()]
        assert not [name for name in missing if not any(part in name for part in self.untrained)]

    def test_gradient_checkpointing(self, model):
        if not model.supports_gradient_checkpointing:
            pytest.skip("has nothing worth computing twice")
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model.requires_grad_(True).train()
        expected = self.gradients(model, self.training_inputs())
        model.gradient_checkpointing_enable()
        assert model.is_gradient_checkpointing
        found = self.gradients(model, self.training_inputs())
        for name, gradient in expected.items():
            if gradient is None:
                continue
            scale = float(gradient.abs().max()) + 1e-6
            torch.testing.assert_close(found[name], gradient, atol=1e-4 * scale, rtol=1e-3, msg=name)

    # --- Tools ---

    @pytest.mark.parametrize("how", ["cpu_offload", "disk_offload", "dispatch_model", "device_map"])
    def test_offloading(self, model, inputs, tmp_path, how):
        expected = self.run(model, inputs)
        if how == "cpu_offload":
            cpu_offload(model, execution_device="cpu")
        elif how == "disk_offload":
            disk_offload(model, tmp_path / "offloaded", execution_device="cpu")
        else:
            parts = [*model.named_children(), *model.named_parameters(recurse=False)]
            has_weights = [
                not isinstance(part, nn.Module) or any(True for _ in part.parameters()) for _, part in parts
            ]
            places = {name: "cpu" for (name, _), has in zip(parts, has_weights) if has}
            if len(places) == 1:
                pytest.skip("is one part")
            places[[name for name in places if name in dict(model.named_children())][-1]] = "disk"
            if how == "dispatch_model":
                model = dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path / "offloaded")
            else:
                model.save_pretrained(tmp_path / "model")
                model = type(model).from_pretrained(
                    tmp_path / "model", device_map=places, offload_folder=tmp_path / "offloaded"
                )
                assert any(weight.device.type == "meta" for weight in model.parameters())
        self.check_same(self.run(model, inputs), expected)

    def test_limited_memory(self, model, inputs, tmp_path):
        """`device_map="auto"` with less memory than the model needs."""
        expected = self.run(model, inputs)
        model.save_pretrained(tmp_path / "model")
        size = sum(tensor.numel() * 4 for tensor in model.state_dict().values())
        loaded = type(model).from_pretrained(
            tmp_path / "model",
            device_map="auto",
            max_memory={"cpu": size // 2},
            offload_folder=str(tmp_path / "offloaded"),
        )
        self.check_same(self.run(loaded, inputs), expected)

    def task_types(self, model):
        if hasattr(model, "generate"):
            return ("CAUSAL_LM", None)
        return (None, "FEATURE_EXTRACTION") if model.main_input_name == "input_ids" else (None,)

    def test_lora(self, model, inputs, tmp_path):
        linear = [name for name, part in model.named_modules() if type(part) is nn.Linear]
        kept = (*self.recursive, "lm_head")
        targets = [name for name in linear if not any(part in name.split(".") for part in kept)]
        if not targets:
            pytest.skip("has no linear layer to adapt")
        expected = self.run(model, inputs)
        for number, task_type in enumerate(self.task_types(model)):
            folder = tmp_path / str(number)
            config = LoraConfig(
                r=2, target_modules=targets[:2], task_type=task_type, modules_to_save=list(self.recursive) or None
            )
            adapted = get_peft_model(copy.deepcopy(model), config)
            self.check_same(self.run(adapted.eval(), inputs), expected)
            optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
            for _ in range(2):  # the first step moves only B, which starts at zero
                optimizer.zero_grad()
                self.loss(adapted.train()(**self.training_inputs()), inputs).backward()
                optimizer.step()
            trained = self.run(adapted.eval(), inputs)
            assert not torch.allclose(trained, expected, atol=1e-6)
            adapted.save_pretrained(folder)
            loaded = PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()
            self.check_same(self.run(loaded, inputs), trained)
            self.check_same(self.run(loaded.merge_and_unload(), inputs), trained, atol=1e-2, rtol=1e-2)

    def make_static(self, model, inputs):
        """Asks for a fixed number of recursion steps."""
        for name, value in self.fixed_config.items():
            *path, field = name.split(".")
            owner = model.config
            for part in path:
                owner = getattr(owner, part)
            setattr(owner, field, value)
        return {**inputs, **self.fixed_arguments}

    def test_compiled(self, model, inputs):
        """In one graph, with a fixed number of recursion steps."""
        inputs = self.make_static(model, inputs)
        expected = self.run(model, inputs)
        torch.compiler.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        self.check_same(self.run(compiled, inputs), expected)

    def test_exported(self, model, inputs):
        """With `torch.export`, at another batch and length than the example's."""
        dynamic = torch.export.Dim.AUTO
        static = self.make_static(model, inputs)
        tensors = {name: value for name, value in static.items() if isinstance(value, torch.Tensor)}
        shapes = {name: {0: dynamic, 1: dynamic} if name in tensors else None for name in static}

        with torch.no_grad():
            program = torch.export.export(model, (), kwargs=static, dynamic_shapes=shapes, strict=False)
        other = {
            name: torch.cat([value, value.flip(0)])[:3, : LENGTH - 2] if name in tensors else value
            for name, value in static.items()
        }
        self.check_same(program.module()(**other)[self.output], self.run(model, other))

    def test_pickled_and_copied(self, model, inputs, tmp_path):
        expected = self.run(model, inputs)
        self.check_same(self.run(copy.deepcopy(model), inputs), expected)
        torch.save(model.state_dict(), tmp_path / "weights.pt")
        other = type(model)(copy.deepcopy(model.config)).eval()
        other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
        self.check_same(self.run(other, inputs), expected)
        assert os.path.getsize(tmp_path / "weights.pt")
