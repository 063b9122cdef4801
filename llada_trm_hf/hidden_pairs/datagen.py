"""Makes hidden pairs: what a language model knows before it thinks, and after, for every problem of a dataset."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from datasets import Dataset
from torch import distributed
from tqdm import tqdm
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from ..data import ThoughtFormat
from ..data.thoughts import COMPLETE, EMPTY_PROMPT, NOT_FINITE, TOO_LONG, ThoughtTokens
from ..generation import MaskedDiffusionGenerationMixin
from ..hub.files import output_dir_lock
from ..hub.model_folders import COMPRESSOR, LANGUAGE_MODEL, check_model, load_tokenizer
from ..models import DimensionCompressor
from ..models.backbone_wrapper import encode
from .dataset import CONFIG_FILE, compressed
from .settings import DatagenSettings
from .shard_folder import DatagenSummary, ShardFolder, ShardProblem, write_text
from .traces import write_traces

# Enough to keep a device busy; a layer's working memory grows with it.
TOKENS_PER_FORWARD = 512


def run_datagen(settings: DatagenSettings) -> DatagenSummary | None:
    """
    Makes what is missing in `settings.output_dir`, shard by shard.

    Shard `n` holds the problems from `n * checkpoint_every` and depends on the settings alone: with several processes
    (`torchrun`, `accelerate launch`) each makes whole shards, and a run that was killed continues with those that are
    missing. On the same machine, with the same number of threads, the files are the same byte for byte. (Batches are
    composed within a shard. Another batch size, or `states` instead of `all`, changes states by float rounding, so
    the settings are recorded and a change is refused.) All processes but the first return None.

    Raises:
        ValueError, OSError: for settings that cannot work, or that differ from those of the earlier run in the folder.
        RuntimeError: if another run is writing to the folder.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    check_model(settings.model, "model", LANGUAGE_MODEL)
    if settings.compressor:
        check_model(settings.compressor, "compressor", COMPRESSOR)
    rows = settings.load_rows()
    compressor = DimensionCompressor.from_pretrained(settings.compressor).eval() if settings.compressor else None
    config = settings.recorded(rows, compressor)
    with _process_group(world_size) as barrier, output_dir_lock(settings.output_dir, ".datagen.lock"):
        recorded = settings.check_recorded(config) if rank == 0 else config
        folder = ShardFolder(settings, len(rows))
        shards = range(rank, folder.num_shards, world_size)  # of this process
        missing = [number for number in shards if not folder.has(number)]
        maker = ShardMaker(settings, folder, rows, compressor) if missing else None
        if rank == 0 and recorded != config:
            text = json.dumps({**recorded, **config}, indent=2, ensure_ascii=False) + "\n"
            write_text(os.path.join(settings.output_dir, CONFIG_FILE), text)
        barrier()  # nobody works before the first process holds the folder and has recorded the settings
        done = sum(len(folder.problems_of(number)) for number in shards if number not in missing)
        total = sum(len(folder.problems_of(number)) for number in shards)
        with tqdm(total=total, initial=done, desc=f"Datagen ({settings.stage})", disable=rank > 0) as progress:
            for number in missing:
                assert maker is not None
                maker.make(number, progress.update)
        barrier()
        summary = folder.finish() if rank == 0 else None
        barrier()
    return summary


@contextmanager
def _process_group(world_size: int) -> Iterator[Callable[[], object]]:
    """A barrier at which processes wait for each other, however long it takes."""
    if world_size == 1:
        yield lambda: None
        return
    distributed.init_process_group("gloo", timeout=timedelta(days=365))
    try:
        yield distributed.barrier
    finally:
        distributed.destroy_process_group()


class ShardMaker:
    """Model, tokenizer and everything else it takes to make a shard."""

    def __init__(
        self, settings: DatagenSettings, folder: ShardFolder, rows: Dataset, compressor: DimensionCompressor | None
    ):
        self.settings, self.folder, self.rows = settings, folder, rows
        self.tokenizer = load_tokenizer(settings.model)
        self.thoughts = ThoughtFormat(self.tokenizer, settings.think_start, settings.think_end)
        device = settings.device
        if device == "cuda" and "LOCAL_RANK" in os.environ:
            device = f"cuda:{os.environ['LOCAL_RANK']}"
        self.model, self.eos_ids = load_language_model(settings.model, settings.dtype, device)
        if self.tokenizer.eos_token_id is not None:
            self.eos_ids = sorted({*self.eos_ids, self.tokenizer.eos_token_id})
        pad_id = self.tokenizer.pad_token_id
        self.pad_id = pad_id if pad_id is not None else self.eos_ids[0] if self.eos_ids else 0
        context_length = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        self.context_length = float("inf") if context_length is None else context_length
        self.width, self.dtype = self.model.get_output_embeddings().weight.shape[-1], self.model.dtype
        self.compressor = compressor.to(self.model.device) if compressor is not None else None
        if self.compressor is not None:
            if self.compressor.config.hidden_size != self.width:
                takes = f"{settings.compressor} takes hidden_size={self.compressor.config.hidden_size}"
                raise ValueError(f"The states of {settings.model} are {self.width} wide, the compressor {takes}.")
            self.width, self.dtype = self.compressor.config.compressed_size, self.compressor.dtype

    def make(self, number: int, advance: Callable[[int], object]) -> None:
        """Makes shard `number`; `advance` gets the number of problems that are done, whenever some are."""
        if self.settings.stage == "states":
            problems = self._read_traces(number, advance)
        else:
            problems, traces = self._write_traces(number, advance)
            self.folder.write_traces(number, traces)
        if self.settings.stage != "traces":
            self.folder.write_pairs(number, problems, self.width, self.dtype)

    def _write_traces(
        self, number: int, advance: Callable[[int], object]
    ) -> tuple[list[ShardProblem], list[dict[str, Any]]]:
        """The problems of a shard, with states in the stage `all`, and the traces the model wrote for them."""
        indices = self.folder.problems_of(number)
        rows = self.rows[indices.start : indices.stop]
        problems = [ShardProblem(id, prompt or "") for id, prompt in zip(rows["id"], rows["prompt"])]
        prompts: dict[int, tuple[list[int], list[int]]] = {}
        for i, problem in enumerate(problems):
            context, opening = self.thoughts.prompt(problem.prompt) if problem.prompt.strip() else ([], [])
            problem.prompt_tokens = len(context)
            if not context:
                problem.status = EMPTY_PROMPT
            elif len(context) + len(opening) + self.settings.traces.max_new_tokens > self.context_length:
                problem.status = TOO_LONG
            else:
                prompts[i] = (context, opening)
        advance(len(problems) - len(prompts))

        keep_states = self.settings.stage == "all"
        completions: list[list[int]] = [[] for _ in problems]
        for batch in _batches({i: len(c) + len(o) for i, (c, o) in prompts.items()}, self.settings.batch_size):
            batch_prompts, numbers = [prompts[i] for i in batch], [indices[i] for i in batch]
            ids = (self.thoughts.end_ids, self.eos_ids, self.pad_id)
            written = write_traces(self.model, batch_prompts, numbers, *ids, self.settings.traces, keep_states)
            for i, status, tokens in zip(batch, written.statuses, written.completions):
                completions[i], problems[i].status = tokens, status
                closing = len(self.thoughts.end_ids) if status == COMPLETE else 0
                problems[i].thought_tokens = len(tokens) - closing
            if written.hidden_pre is not None and written.hidden_post is not None:
                self._keep_states([problems[i] for i in batch], written.hidden_pre, written.hidden_post)
            advance(len(batch))
        traces = [
            {
                "id": problem.id,
                # The thought of a problem whose states are not finite is complete all the same.
                "status": COMPLETE if problem.status == NOT_FINITE else problem.status,
                "prompt": problem.prompt,
                "completion": self.tokenizer.decode(tokens),
                "completion_ids": tokens,
            }
            for problem, tokens in zip(problems, completions)
        ]
        return problems, traces

    def _read_traces(self, number: int, advance: Callable[[int], object]) -> list[ShardProblem]:
        """The problems of a shard with the states of their finished traces."""
        if self.folder.reads_traces:
            rows = self.folder.read_traces(number)
        else:
            rows = self.rows.select(self.folder.problems_of(number)).to_list()
        problems = [ShardProblem(row["id"], row["prompt"] or "") for row in rows]
        vocabulary = self.model.get_input_embeddings().num_embeddings
        traces = {}
        for i, (row, problem) in enumerate(zip(rows, problems)):
            trace, problem.status = self.thoughts.trace(row)
            if trace is None:
                problem.prompt_tokens = len(self.thoughts.prompt(problem.prompt)[0]) if problem.prompt.strip() else 0
                problem.thought_tokens = len(row.get("completion_ids") or [])
                continue
            problem.prompt_tokens, problem.thought_tokens = len(trace.context), len(trace.thought)
            unknown = [token for token in trace.input_ids if not 0 <= token < vocabulary]
            if unknown:
                raise ValueError(
                    f"The trace {problem.id} holds token {unknown[0]}, the vocabulary of {self.settings.model} has "
                    f"{vocabulary}: was it written with another tokenizer?"
                )
            if len(trace.input_ids) > self.context_length:
                problem.status = TOO_LONG
            else:
                traces[i] = trace
        advance(len(problems) - len(traces))
        for batch in _batches({i: len(trace.input_ids) for i, trace in traces.items()}, self.settings.batch_size):
            pre, post = extract_states(self.model, [traces[i] for i in batch], self.pad_id)
            self._keep_states([problems[i] for i in batch], pre, post)
            advance(len(batch))
        return problems

    @torch.no_grad()
    def _keep_states(self, problems: list[ShardProblem], hidden_pre: torch.Tensor, hidden_post: torch.Tensor) -> None:
        """Gives each problem with a complete thought its states, compressed if wanted."""
        lengths = [problem.prompt_tokens for problem in problems]
        finite = zip(hidden_pre.isfinite().all(1).split(lengths), hidden_post.isfinite().all(1))
        hidden_pre, hidden_post = compressed(self.compressor, hidden_pre, hidden_post)
        states = zip(hidden_pre.split(lengths), hidden_post.unbind())
        for problem, pair, (pre_is_finite, post_is_finite) in zip(problems, states, finite):
            if problem.status == COMPLETE:
                if pre_is_finite.all() and post_is_finite:
                    problem.states = pair
                else:
                    problem.status = NOT_FINITE


def load_language_model(name: str, dtype: str, device: str) -> tuple[PreTrainedModel, list[int]]:
    """
    A causal language model (ValueError for another kind), with a bare `generation_config`: no repetition penalty, no
    sampling; and the tokens that end its text.
    """
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    is_causal = model.can_generate() and model.get_output_embeddings() is not None
    if isinstance(model, MaskedDiffusionGenerationMixin) or not is_causal:
        raise ValueError(f"{name} is a {type(model).__name__}; hidden pairs need a causal language model.")
    eos = model.generation_config.eos_token_id
    model.generation_config = GenerationConfig()
    return model.to(device).eval(), [] if eos is None else [eos] if isinstance(eos, int) else list(eos)


@torch.no_grad()
def extract_states(
    model: PreTrainedModel, traces: list[ThoughtTokens], pad_id: int = 0, tokens_per_forward: int = TOKENS_PER_FORWARD
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Stage 2: the last layer's states of finished traces, as the LM head would read them, without evaluating the head.
    Traces that go through the model together, best of similar length, have at most `tokens_per_forward` tokens with
    padding, unless one is longer.

    Returns:
        `hidden_pre` `[sum of the contexts, D]`, row after row, and `hidden_post` `[B, D]`, on the CPU.
    """
    groups: list[list[ThoughtTokens]] = []
    for trace in traces:
        group = [*(groups[-1] if groups else []), trace]
        if groups and len(group) * max(len(member.input_ids) for member in group) <= tokens_per_forward:
            groups[-1] = group
        else:
            groups.append([trace])
    pre, post = zip(*(_states_of(model, group, pad_id) for group in groups))
    return torch.cat(pre), torch.cat(post)


def _states_of(model: PreTrainedModel, traces: list[ThoughtTokens], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """In one forward pass, padded on the right: no real token sees the padding, and positions count from 0."""
    lengths = torch.tensor([len(trace.input_ids) for trace in traces])
    contexts = torch.tensor([len(trace.context) for trace in traces])
    columns = torch.arange(int(lengths.max()))
    is_real = columns < lengths[:, None]
    input_ids = torch.full(is_real.shape, pad_id)
    input_ids[is_real] = torch.tensor([token for trace in traces for token in trace.input_ids])

    device = model.device
    inputs = {"input_ids": input_ids.to(device), "attention_mask": is_real.long().to(device), "use_cache": False}
    states = encode(model, inputs).last_hidden_state  # [B, L, D]
    is_context = (columns < contexts[:, None]).to(states.device)
    rows = torch.arange(len(traces), device=states.device)
    return states[is_context].cpu(), states[rows, lengths.to(states.device) - 1].cpu()


def _batches(lengths: dict[int, int], batch_size: int) -> list[list[int]]:
    """The keys, those of similar length together."""
    order = sorted(lengths, key=lambda key: lengths[key])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
