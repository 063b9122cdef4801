"""`llada-trm datagen`: hidden pairs, the states of a language model before and after it thinks."""

from .command import (
    DTYPES,
    CommandParser,
    add_device,
    add_generator_options,
    check_output_dir,
    check_output_file,
    checked_device,
    options_for,
)


def run(arguments: list[str]) -> None:
    options = _parser().parse(arguments)
    from ..data.reasoning import column_mapping
    from ..hidden_pairs import DatagenSettings, TraceSettings, export_legacy_hidden_pairs, run_datagen

    check_output_dir(options.output_dir)
    options.device = checked_device(options.device)
    check_output_file(options.export_legacy)
    if options.export_legacy and options.stage == "traces":
        raise ValueError("--export_legacy writes hidden pairs; --stage traces makes none.")
    settings = options_for(DatagenSettings, options)
    settings["dataset"] = [name.strip() for name in options.dataset.split(",") if name.strip()]
    settings["columns"] = column_mapping(options.columns)
    settings["traces"] = TraceSettings(**options_for(TraceSettings, options))
    settings["auto_resume"] = not options.no_auto_resume
    summary = run_datagen(DatagenSettings(**settings))
    if summary is None:  # in all processes but the first
        return
    print(summary)
    if not summary.statuses["complete"]:
        hint = (
            "allow longer ones with --max_new_tokens, or name the model's own markers with --think_start, --think_end"
        )
        raise RuntimeError(f"No problem has a complete thought, so there is nothing to learn from: {hint}.")
    if options.export_legacy:
        number = export_legacy_hidden_pairs(options.output_dir, options.export_legacy)
        print(f"Wrote {number} pairs to {options.export_legacy}")


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="llada-trm datagen",
        description="Lets a causal language model think about problems, and keeps its last layer's states before "
        "<think> and at </think>. Started again, an interrupted run goes on. Also what torchrun and accelerate launch "
        "run: processes share the shards.",
    )
    parser.add_argument("--model", required=True, help="name or folder of a causal language model")
    parser.add_argument("--output_dir", required=True, help="folder for shards, traces, metadata and settings")
    parser.add_argument(
        "--stage", choices=("traces", "states", "all"), default="all", help="write thoughts, take states, or both"
    )
    parser.add_argument("--dataset", "--dataset_name", default="", help="problems: names or files, with commas")
    parser.add_argument("--split", default="train", help="split or slice of each dataset, e.g. train[:1000]")
    parser.add_argument("--num_samples", type=int, help="at most so many problems of each dataset")
    add_generator_options(parser)
    parser.add_argument("--traces_file", help="for --stage states: finished traces, or the folder of --stage traces")
    parser.add_argument("--columns", nargs="+", default=[], help="of a local file: prompt=question completion=output")
    parser.add_argument("--batch_size", type=int, default=8, help="problems that go through the model together")
    parser.add_argument("--max_new_tokens", type=int, default=1024, help="of a thought with its closing marker")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the most probable token")
    parser.add_argument("--top_k", type=int, help="sample from so many tokens")
    parser.add_argument("--top_p", type=float, help="sample from the most probable tokens of this share")
    parser.add_argument("--seed", type=int, default=0, help="of sampling; each problem has its own random numbers")
    parser.add_argument("--think_start", default="<think>", help="opening marker")
    parser.add_argument("--think_end", default="</think>", help="closing marker")
    parser.add_argument("--checkpoint_every", type=int, default=128, help="problems of a shard")
    parser.add_argument("--no_auto_resume", action="store_true", help="refuse a folder that holds an earlier run")
    parser.add_argument("--compressor", help="name or folder of a compressor: store compressed states")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the model")
    add_device(parser)
    parser.add_argument("--export_legacy", help="in the end, also write the older single .pt file here")
    return parser
