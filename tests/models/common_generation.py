"""What everyone's `generate` and pipelines do, as tests for every model class that writes."""

import copy

import pytest
import torch
from common import ROWS
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_training import TOKENIZER
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig
from transformers import GenerationConfig, TorchAoConfig, pipeline
from transformers.generation.streamers import BaseStreamer

NEW, MASK, PAD = 8, TOKENIZER.mask_token_id, TOKENIZER.pad_token_id


class TokenModelMixin:
    """For models that read tokens; beside `ModelTesterMixin`."""

    def test_input_embeddings(self, model, inputs):
        if hasattr(model, "thinker"):
            inputs["input_ids"] = inputs["input_ids"].clamp(max=200)  # latents are thought where their tokens stand
        elif hasattr(model, "refiner"):
            inputs["relevant_tokens"] = inputs["input_ids"] == MASK  # which embeddings do not tell
        expected = self.run(model, inputs)
        embeddings = model.get_input_embeddings()(inputs["input_ids"])
        others = {name: value for name, value in inputs.items() if name != "input_ids"}
        self.check_same(self.run(model, {**others, "inputs_embeds": embeddings}), expected)

    def test_quantised(self, model, inputs, tmp_path):
        """Loaded with int8 weights, trained (what is recursive, or adapters), saved, loaded again."""
        model.save_pretrained(tmp_path / "model")
        config = TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=[*self.recursive, "lm_head"])
        quantised = type(model).from_pretrained(tmp_path / "model", quantization_config=config).eval()
        int8 = [
            name
            for name, part in quantised.named_modules()
            if isinstance(part, nn.Linear) and type(part.weight.data).__name__.startswith("Int8")
        ]
        assert int8 and not any(name.startswith(("lm_head", *self.recursive)) for name in int8)
        found, expected = self.run(quantised, inputs), self.run(model, inputs)
        assert (found - expected).abs().mean() < 0.25 * expected.abs().mean()

        trained = quantised.requires_grad_(False)
        for name in self.recursive:
            getattr(quantised, name).requires_grad_(True)
        if not self.recursive:
            trained = get_peft_model(quantised, LoraConfig(r=2, target_modules=["q_proj"]))
        optimizer = torch.optim.SGD([weight for weight in trained.parameters() if weight.requires_grad], lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            self.loss(trained.train()(**self.training_inputs()), inputs).backward()
            optimizer.step()
        after = self.run(trained.eval(), inputs)
        assert not torch.allclose(after, found, atol=1e-6)
        trained.save_pretrained(tmp_path / "trained")
        if self.recursive:
            loaded = type(model).from_pretrained(tmp_path / "trained")
        else:
            base = type(model).from_pretrained(tmp_path / "model", quantization_config=config)
            loaded = PeftModel.from_pretrained(base, tmp_path / "trained")
        self.check_same(self.run(loaded.eval(), inputs), after)

    def test_resized_embeddings(self, model, inputs, tmp_path):
        expected = self.run(model, inputs)
        size = model.config.get_text_config().vocab_size
        model.resize_token_embeddings(size + 5)
        assert model.config.get_text_config().vocab_size == size + 5
        found = self.run(model, inputs)
        self.check_same(found[..., :size] if self.output == "logits" else found, expected)
        model.save_pretrained(tmp_path)
        self.check_same(self.run(type(model).from_pretrained(tmp_path), inputs), found)
        if getattr(model.config, "mask_token_id", None) is not None:
            with pytest.raises(ValueError, match="mask_token_id"):
                model.resize_token_embeddings(MASK - 1)
            assert model.get_input_embeddings().num_embeddings == size + 5


class GenerationTesterMixin(TokenModelMixin):
    """`prompt` is what the tests of generation write after; its rows have an answer each."""

    def prompt(self):
        return self.new_inputs()["input_ids"]

    def test_greedy(self, model):
        prompt = self.prompt()
        first = model.generate(prompt, max_new_tokens=NEW)
        assert torch.equal(first[:, : prompt.shape[1]][prompt != MASK], prompt[prompt != MASK])
        assert first.shape[0] == ROWS and prompt.shape[1] < first.shape[1] <= prompt.shape[1] + NEW
        for arguments in (
            {"do_sample": False},
            {"num_beams": 1, "use_cache": True},
            {"generation_config": GenerationConfig(max_new_tokens=NEW, do_sample=False)},
        ):
            again = model.generate(inputs=prompt, **{"max_new_tokens": NEW, **arguments})
            assert torch.equal(again, first), arguments

    def test_sampling(self, model):
        once = self.prompt()

        def sample(seed, **arguments):
            torch.manual_seed(seed)
            return model.generate(once, max_new_tokens=NEW, do_sample=True, temperature=9.0, **arguments)

        assert torch.equal(sample(0), sample(0)) and not torch.equal(sample(0), sample(1))
        several = sample(0, num_return_sequences=3)
        assert len(several) == 3 * ROWS
        prompt = self.prompt()
        kept = prompt != MASK
        assert torch.equal(
            several[:, : prompt.shape[1]][kept.repeat_interleave(3, 0)],
            prompt.repeat_interleave(3, 0)[kept.repeat_interleave(3, 0)],
        )
        with pytest.raises(ValueError):
            model.generate(once, max_new_tokens=NEW, do_sample=False, num_return_sequences=3)

    def test_output_object(self, model):
        plain = model.generate(self.prompt(), max_new_tokens=NEW)
        output = model.generate(self.prompt(), max_new_tokens=NEW, return_dict_in_generate=True, output_scores=True)
        assert torch.equal(output.sequences, plain) and output.scores is not None

    def test_what_is_no_setting_is_refused(self, model):
        with pytest.raises((ValueError, TypeError), match="max_new_token"):
            model.generate(self.prompt(), max_new_token=NEW)

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_ragged_rows(self, model, side):
        """(transformers pads on the left where a model writes from left to right.)"""
        if side == "right" and model.config.model_type == "latent_thinking":
            pytest.skip("writes from left to right, so prompts are padded on the left")
        prompt = self.prompt()
        shorter = prompt[1:, 2:]
        fill = torch.full((1, 2), PAD)
        padded = torch.cat([fill, shorter] if side == "left" else [shorter, fill], dim=1)
        mask = torch.ones_like(prompt)
        mask[1] = padded.ne(PAD)
        arguments = {"max_new_tokens": NEW}
        together = model.generate(torch.cat([prompt[:1], padded]), attention_mask=mask, **arguments)
        for row, alone in enumerate((prompt[:1], shorter)):
            expected = model.generate(alone, **arguments)[0, alone.shape[1] :]
            found = together[row, prompt.shape[1] :][: len(expected)]
            assert torch.equal(found, expected), row

    def test_streaming(self, model):
        """What a streamer gets is the sequence, in order."""

        class Recorder(BaseStreamer):
            def __init__(self):
                self.tokens, self.ended = [], False

            def put(self, value):
                self.tokens += value.flatten().tolist()

            def end(self):
                self.ended = True

        recorder = Recorder()
        prompt = self.prompt()[:1].clamp(max=200)
        written = model.generate(prompt, max_new_tokens=NEW, streamer=recorder)
        assert recorder.ended and recorder.tokens == written[0].tolist()

    def test_stopping(self, model):
        """At a string, and where a criterion says so."""
        tokenizer = TOKENIZER
        prompt = self.prompt()[:1]
        written = model.generate(prompt, max_new_tokens=NEW)[0, prompt.shape[1] :]
        stop = tokenizer.decode(written[2:3])
        assert stop
        stopped = model.generate(prompt, max_new_tokens=NEW, stop_strings=[stop], tokenizer=tokenizer)
        text = tokenizer.decode(stopped[0, prompt.shape[1] :], skip_special_tokens=True)
        assert stop in text and len(text) <= len(tokenizer.decode(written))
        with pytest.raises(ValueError, match="tokenizer"):
            model.generate(prompt, max_new_tokens=NEW, stop_strings=[stop])

    def new_tokenizer(self):
        return copy.deepcopy(TOKENIZER)

    def test_pipeline(self, tmp_path):
        model, tokenizer = self.new_model().eval(), self.new_tokenizer()
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        tokenizer.padding_side = "left"
        pipe = pipeline("text-generation", model=str(tmp_path), device="cpu")
        texts = ["12+3=", "7="]
        settings = {"max_new_tokens": NEW, "return_full_text": False, "do_sample": False}
        found = pipe(texts, batch_size=2, **settings)
        for text, (answer,) in zip(texts, found):
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            written = model.generate(ids, max_new_tokens=NEW, do_sample=False)[0, ids.shape[1] :]
            assert answer["generated_text"] == tokenizer.decode(written, skip_special_tokens=True)
        several = pipe("7=", max_new_tokens=NEW, do_sample=True, num_return_sequences=2)
        assert len(several) == 2 and all(answer["generated_text"].startswith("7=") for answer in several)

    def test_chat_pipeline(self, tmp_path):
        model, tokenizer = self.new_model().eval(), self.new_tokenizer()
        tokenizer.chat_template = tokenizer.chat_template or (
            "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '\\n' }}{% endfor %}"
            "{% if add_generation_prompt %}assistant:{% endif %}"
        )
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        messages = [{"role": "user", "content": "12+3="}]
        pipe = pipeline("text-generation", model=str(tmp_path), device="cpu")
        answer = pipe(messages, max_new_tokens=NEW, do_sample=False)[0]["generated_text"][-1]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        written = copy.deepcopy(model).generate(ids, max_new_tokens=NEW, do_sample=False)[0, ids.shape[1] :]
        assert answer == {"role": "assistant", "content": tokenizer.decode(written, skip_special_tokens=True)}

    def test_fill_mask_pipeline(self, tmp_path):
        model, tokenizer = self.new_model().eval(), self.new_tokenizer()
        if tokenizer.mask_token is None or "AutoModelForMaskedLM" not in model.auto_classes:
            pytest.skip("has no mask token")
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        pipe = pipeline("fill-mask", model=str(tmp_path), device="cpu")
        text = f"1+{tokenizer.mask_token}=4"
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            position = (ids[0] == tokenizer.mask_token_id).nonzero().item()
            probabilities = model(ids).logits[0, position].float().softmax(-1)
        best = probabilities.topk(3)
        found = pipe(text, top_k=3)
        assert [guess["token"] for guess in found] == best.indices.tolist()
        assert [guess["score"] for guess in found] == pytest.approx(best.values.tolist(), rel=1e-3)

    def test_generation_config_is_saved(self, model, tmp_path):
        model.generation_config.max_new_tokens = 5
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path)
        assert loaded.generation_config.max_new_tokens == 5
        prompt = self.prompt()
        assert loaded.generate(prompt).shape[1] <= prompt.shape[1] + 5

    def test_adapters_generate(self, model):
        expected = model.generate(self.prompt(), max_new_tokens=NEW)
        config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        adapted = get_peft_model(copy.deepcopy(model), config).eval()
        assert torch.equal(adapted.generate(input_ids=self.prompt(), max_new_tokens=NEW), expected)
