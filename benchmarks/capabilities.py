"""
Which model class can do what: runs the tests that every class is held to, and writes `docs/capabilities.md` from what
they say. A cell is the tests of one class and capability.

    python benchmarks/capabilities.py [--remote_code]

`--remote_code` also loads every class without the package, which takes a minute more.
"""

import argparse
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

import torch
import transformers
from record import circumstances

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/capabilities.md"
SUITE, SHARED, HUB = (
    "tests/models/test_every_model.py",
    "tests/e2e/test_two_processes.py",
    "tests/models/test_hub_model.py",
)

# Row -> class of tests; the name under which two processes train it; that under which the Hub's tests load it.
ROWS = {
    "`LLaDAForMaskedDiffusion`": ("TestLLaDA", "llada", "backbone"),
    "`LLaDAModel`": ("TestLLaDAModel", None, "encoder"),
    "`LLaDAMoEForMaskedDiffusion`": ("TestLLaDAMoE", "llada_moe", "moe"),
    "`LLaDAMoEModel`": ("TestLLaDAMoEModel", None, "moe-encoder"),
    "hybrid, `RecursiveRefinementHead`": ("TestHybrid", "hybrid", "hybrid"),
    "hybrid, `SlotTRMRefiner`": ("TestHybridWithSlots", "slots", "hybrid-slots"),
    "hybrid, `TRMRefiner`": ("TestHybridWithTRM", "trm_refiner", "hybrid-trm"),
    "hybrid, cascade": ("TestHybridWithCascade", "cascade", "hybrid-cascade"),
    "hybrid, mix": ("TestHybridWithMix", "mix", "hybrid-own"),
    "`LatentThinkingForCausalLM`": ("TestLatentThinking", "thinker", "latent"),
    "`RecursiveRefinementHead`": ("TestHead", None, "head"),
    "`SlotTRMRefiner`": ("TestSlots", None, "slots"),
    "`TRMRefiner`": ("TestTRMRefiner", None, "trm-refiner"),
    "`RefinerCascade`": ("TestCascade", None, "cascade"),
    "`RefinerMix`": ("TestMix", None, "mix"),
    "`DimensionCompressor`": ("TestCompressor", None, "compressor"),
    "`SequenceTRM`": ("TestSequenceTRM", None, "trm"),
    "`LatentThinker`": ("TestThinker", None, "thinker"),
}
# Column -> tests of the suite, without `test_`.
COLUMNS = {
    "save, load, Auto classes": ("save_and_load", "auto_classes"),
    "padding, batches": ("padding_changes_nothing", "rows_do_not_see_each_other"),
    "`generate`": ("greedy", "sampling", "output_object", "stopping", "streaming", "ragged_rows"),
    "`text-generation`, chats": ("pipeline", "chat_pipeline"),
    "`fill-mask`": ("fill_mask_pipeline",),
    "LoRA": ("lora", "adapters_generate"),
    "int8, trained, saved": ("quantised",),
    "offloaded": ("offloading", "limited_memory"),
    "compiled": ("compiled",),
    "`torch.export`": ("exported",),
}
SHARED_COLUMNS = {"DDP": "ddp", "FSDP2": "fsdp2", "ZeRO-2": "deepspeed_zero2", "ZeRO-3": "deepspeed_zero3"}
PASSED, FAILED, NOT_APPLICABLE = "✓", "✗", "-"


def run_tests(files: list[str]) -> dict[tuple[str, str], list[str]]:
    """(class or file, test) -> what each of its cases came to: passed, failed, or the reason it was skipped."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "-m", "", f"--junit-xml={report}", *files]
        subprocess.run(command, cwd=ROOT, check=False)
        cases = ElementTree.parse(report).iter("testcase")
    found = defaultdict(list)
    for case in cases:
        skipped = case.find("skipped")
        failed = case.find("failure") is not None or case.find("error") is not None
        said = FAILED if failed else PASSED if skipped is None else str(skipped.get("message"))
        name, _, parameters = str(case.get("name")).partition("[")
        owner = str(case.get("classname")).split(".")[-1]
        found[owner, name if owner.startswith("Test") else f"{name}[{parameters}"].append(said)
    return found


def cell(said: list[str], notes: list[str]) -> str:
    """What some tests said together; reasons go to `notes`."""
    if not said:
        return NOT_APPLICABLE
    if FAILED in said:
        return FAILED
    if PASSED in said:
        return PASSED
    if said[0] not in notes:
        notes.append(said[0])
    return f"{NOT_APPLICABLE} [{notes.index(said[0]) + 1}]"


def table(found: dict[tuple[str, str], list[str]], remote_code: bool) -> str:
    notes: list[str] = []
    header = ["", *COLUMNS, *SHARED_COLUMNS, *(["without the package"] if remote_code else [])]
    lines = [header, ["---", *[":-:"] * (len(header) - 1)]]
    for row, (tester, trained, published) in ROWS.items():
        cells = [
            [said for test in tests for said in found.get((tester, f"test_{test}"), [])] for tests in COLUMNS.values()
        ]
        shared = "test_sharing_the_work_changes_nothing"
        cells += [
            found.get((Path(SHARED).stem, f"{shared}[{mode}-{trained}]"), []) for mode in SHARED_COLUMNS.values()
        ]
        if remote_code:
            test = f"test_loads_from_the_hub_without_the_package[{published}]"
            cells.append(found.get((Path(HUB).stem, test), []))
        lines.append([row, *(cell(said, notes) for said in cells)])
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return text + "\n" + "".join(f"[{number}] {note}  \n" for number, note in enumerate(notes, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--remote_code", action="store_true", help="also load every class without the package")
    arguments = parser.parse_args()
    found = run_tests([SUITE, SHARED, *([HUB] if arguments.remote_code else [])])
    ran = circumstances(" ".join(["python benchmarks/capabilities.py", *sys.argv[1:]]))
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(
        "# Which class can do what\n\n"
        "Each ✓ is one or several tests that pass: those of `tests/models/common.py` and `common_generation.py` for "
        "every class, of `tests/e2e/test_two_processes.py` for two processes that share the work (each model through "
        "its Trainer, with the files of `examples/accelerate`, on the CPU). - means that it does not apply.\n\n"
        f"{table(found, arguments.remote_code)}\n"
        f"Written by `{ran['command']}` ({ran['date']}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}).\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
