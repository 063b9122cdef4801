"""What a recipe says besides the arguments of its trainer: what is trained on what."""

from dataclasses import dataclass, field


@dataclass
class DataArguments:
    """Text to train on, and the tokenizer that reads it."""

    tokenizer: str | None = field(
        default=None, metadata={"help": "Name or folder; the model's own, or a byte tokenizer for a new model."}
    )
    dtype: str = field(default="float32", metadata={"help": "Of the weights: float32, bfloat16, float16 or auto."})
    dataset_name: str = field(
        default="arithmetic",
        metadata={
            "help": "arithmetic, gsm8k, natural_reasoning, math, aime, humaneval, mbpp, apps, or a .json, .jsonl, "
            ".csv or .parquet file."
        },
    )
    data_files: str | None = field(default=None, metadata={"help": "A local file with the rows of dataset_name."})
    columns: list[str] | None = field(
        default=None, metadata={"help": "Columns of a local file, e.g. prompt=question answer=solution."}
    )
    split: str = field(default="train", metadata={"help": "Split or slice to train on, e.g. train[:1000]."})
    eval_split: str | None = field(
        default=None, metadata={"help": "Split or slice to evaluate on; of eval_data_files for a local file."}
    )
    eval_data_files: str | None = field(default=None, metadata={"help": "A local file with the rows to evaluate on."})
    streaming: bool = field(
        default=False, metadata={"help": "Read rows as they are needed, without loading them first; needs max_steps."}
    )
    num_terms: int = field(default=8, metadata={"help": "Difficulty of generated arithmetic."})
    max_length: int = field(default=512, metadata={"help": "Tokens of prompt and response together."})


@dataclass
class RecipeArguments(DataArguments):
    """What is trained on what. The rest of a recipe are [`MaskedDiffusionTrainingArguments`]."""

    backbone: str | None = field(
        default=None,
        metadata={
            "aliases": ["--model"],
            "help": "Name or folder of a masked-diffusion model, or a config .json to train one from scratch.",
        },
    )
    checkpoint: str | None = field(default=None, metadata={"help": "A hybrid to go on from, instead of a backbone."})
    refiner: str = field(
        default="recursive_refinement_head",
        metadata={
            "help": "The kind of refiner, the folder of one, several with commas between, or 'none' to train the "
            "backbone alone."
        },
    )
    integration: str | None = field(
        default=None, metadata={"help": "How several refiners work together: cascade or mix."}
    )
    chunk_size: int | None = field(default=None, metadata={"help": "Tokens refined together; 16."})
    align_steps_to_chunks: bool = field(
        default=False, metadata={"help": "Start every reasoning step, and the answer, in a chunk of its own."}
    )
    max_recursive_steps: int | None = field(
        default=None, metadata={"help": "Largest number of updates of a chunk; 8, of a slot refiner 4."}
    )
    convergence_threshold: float | None = field(
        default=None, metadata={"help": "When a chunk stops, 0 never; 0.01, of a slot refiner 1e-4."}
    )
    head_hidden_size: int | None = field(
        default=None, metadata={"help": "Width of a chunk's code in a recursive head; 512."}
    )
    head_layers: int | None = field(default=None, metadata={"help": "SwiGLU layers of a recursive head; 2."})
    step_size: float | None = field(default=None, metadata={"help": "Factor of a recursive head's updates; 0.1."})
    preset: str | None = field(default=None, metadata={"help": "Size of a slot refiner: tiny, base or large; base."})
    context_slot_size: int | None = field(
        default=None, metadata={"help": "Width of a slot refiner's context slot; half the backbone's."}
    )
    reasoning_slot_size: int | None = field(default=None, metadata={"help": "Of its reasoning slot; a quarter."})
    refinement_slot_size: int | None = field(default=None, metadata={"help": "Of its refinement slot; a quarter."})
    confidence_slot_size: int | None = field(default=None, metadata={"help": "Of its confidence slot; an eighth."})
    use_gating: bool | None = field(default=None, metadata={"help": "Whether its slots have gates; true."})
    delta_scale: float | None = field(default=None, metadata={"help": "Factor of a slot refiner's updates; 0.1."})
    dropout: float | None = field(default=None, metadata={"help": "Dropout of a slot refiner; 0."})
    min_confidence: float = field(default=0.5, metadata={"help": "Chunks below it are refined."})
    deep_supervision_weight: float = field(default=0.3, metadata={"help": "Weight of the loss over the steps."})
    deep_supervision_schedule: str = field(default="constant", metadata={"help": "constant, linear or exponential."})
    confidence_loss_weight: float = field(default=0.05, metadata={"help": "Weight of the confidence's calibration."})
    orthogonality_weight: float = field(default=0.01, metadata={"help": "Weight of the overlap between slots."})
    freeze_backbone: bool = field(default=False, metadata={"help": "Train the refiner only."})
    trainable: list[str] | None = field(
        default=None, metadata={"help": "Patterns of module names that train, instead of freeze_backbone."}
    )
    train_last_layers: int | None = field(
        default=None, metadata={"help": "Train this many of the backbone's last layers as well."}
    )
    train_layer_norms: bool = field(default=False, metadata={"help": "Train all normalisation layers as well."})


@dataclass
class CompressorRecipeArguments(DataArguments):
    """A compressor, and whose hidden states on which text. The rest are [`CompressorTrainingArguments`]."""

    backbone: str | None = field(
        default=None,
        metadata={"aliases": ["--model"], "help": "Name or folder of the causal language model; it stays frozen."},
    )
    init: str = field(
        default="orthogonal",
        metadata={"help": "Weights to start from: orthogonal (random), pca, or checkpoint (the one in --compressor)."},
    )
    compressor: str | None = field(default=None, metadata={"help": "A compressor to go on from."})
    compressed_size: int | None = field(
        default=None, metadata={"help": "Width to compress to; 256, or that of --compressor."}
    )
    compressed_sizes: list[int] | None = field(
        default=None,
        metadata={"help": "Several widths: a run each, and sweep.csv, where PCA stands beside them."},
    )
    pca_batches: int | None = field(
        default=None,
        metadata={"help": "Batches of the training data that PCA sees; by default all, which a stream may not have."},
    )
    text_column: str | None = field(
        default=None,
        metadata={"help": "Train on plain text, this column of it. Without: on prompt, reasoning and answer."},
    )
    num_eval_samples: int = field(
        default=0, metadata={"help": "Hold out the first samples for evaluation, where no eval_split is named."}
    )


@dataclass
class TRMRecipeArguments:
    """A SequenceTRM, and the hidden pairs it learns. The rest are [`TRMTrainingArguments`]."""

    pairs_dir: str | None = field(default=None, metadata={"help": "Folder or file of hidden pairs."})
    eval_pairs_dir: str | None = field(default=None, metadata={"help": "Hidden pairs to evaluate on."})
    eval_fraction: float = field(
        default=0.0, metadata={"help": "Share of the pairs that is held out, where no eval_pairs_dir is named."}
    )
    compressor: str | None = field(
        default=None,
        metadata={
            "help": "The compressor of the pairs: for those stored uncompressed, and for what --backbone reports."
        },
    )
    backbone: str | None = field(
        default=None,
        metadata={
            "aliases": ["--model"],
            "help": "The language model the pairs come from: reports how often its head agrees on the next token.",
        },
    )
    checkpoint: str | None = field(default=None, metadata={"help": "A SequenceTRM to go on from."})
    n_layers: int = field(default=2, metadata={"help": "Blocks of a new network."})
    n_heads: int = field(default=8, metadata={"help": "Attention heads of a new network."})
    block_style: str = field(default="trm", metadata={"help": "trm (the paper's block) or llm_trm."})
    dropout: float = field(default=0.1, metadata={"help": "Dropout of a new network."})
    dtype: str = field(
        default="float32", metadata={"help": "Of the language model: float32, bfloat16, float16 or auto."}
    )


@dataclass
class LatentAnswerRecipeArguments(DataArguments):
    """What learns to answer after latent thoughts. The rest are [`LatentAnswerTrainingArguments`]."""

    backbone: str | None = field(
        default=None, metadata={"aliases": ["--model"], "help": "Name or folder of a causal language model."}
    )
    checkpoint: str | None = field(
        default=None, metadata={"help": "A latent-thinking model to go on from, instead of a backbone."}
    )
    compressor: str | None = field(default=None, metadata={"help": "A trained compressor; without, a new one."})
    trm: str | None = field(
        default=None, metadata={"help": "A SequenceTRM trained on hidden pairs; without, a new one."}
    )
    num_latents: int = field(default=4, metadata={"help": "Input embeddings a thought is turned into."})
    compressed_size: int | None = field(
        default=None, metadata={"help": "Width of a new compressor; 256, or the backbone's if that is less."}
    )
    n_layers: int = field(default=2, metadata={"help": "Blocks of a new SequenceTRM's network."})
    n_heads: int = field(default=8, metadata={"help": "Attention heads of a new SequenceTRM."})
    n_latent_steps: int | None = field(
        default=None, metadata={"help": "Updates of z in a latent recursion; 6, or the SequenceTRM's."}
    )
    n_deep_recursions: int | None = field(
        default=None, metadata={"help": "Latent recursions in a supervision step; 3, or the SequenceTRM's."}
    )
    n_supervision_steps: int | None = field(
        default=None, metadata={"help": "Supervision steps of a thought; 8, or the SequenceTRM's."}
    )
    dropout: float | None = field(default=None, metadata={"help": "Dropout in the SequenceTRM; its own by default."})
    freeze_backbone: bool = field(default=True, metadata={"help": "Train compressor, SequenceTRM and projector only."})
