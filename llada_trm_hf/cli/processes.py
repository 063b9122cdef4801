"""Commands that several processes run together."""

import gc

from accelerate import PartialState


def part() -> None:
    """
    Ends the processes of a run together: one that leaves while others still write would bring them down.

    `destroy_process_group` drops only torch's own references. A DDP model holds the group too, and the trainer around
    it is in reference cycles: without a collection, gloo's worker threads outlive `main`, and one that releases a
    tensor while the interpreter shuts down aborts the process (SIGABRT, pytorch/pytorch#179291).
    """
    processes = PartialState()
    if processes.num_processes > 1:
        processes.wait_for_everyone()
        processes.destroy_process_group()
        gc.collect()
