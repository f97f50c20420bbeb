"""Several single-threaded processes train one model together: each takes its own pictures, all average their gradients.

On a CPU that is faster than one process with many threads, which meet at a barrier thousands of times a step (and wait
there for any thread that another program has pushed aside); processes meet once or twice a step.
"""

from __future__ import annotations

import multiprocessing.connection
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Barrier
from typing import TypeVar

import torch
import torch.multiprocessing
from torch import Tensor

from mammut_runtime.errors import MammutError

J = TypeVar("J")

PATIENCE_S = 600.0
"""How long a worker waits for the others before it gives up."""


@dataclass(frozen=True)
class Crew:
    """What one worker knows of the others."""

    rank: int
    size: int
    shared: Tensor
    """float32[2, size, length] in shared memory: two buffers in turns, so that one meeting an exchange is enough."""
    generators: Tensor
    """uint8[size, bytes] in shared memory: the state of each worker's random generator, for saving."""
    barrier: Barrier

    def average(self, values: Tensor, turn: int) -> Tensor:
        """The mean over all workers of float32[length] vectors; the same bits for each of them.

        turn: 0, 1, 2, ... from call to call: a worker may write the next vector while others still read this one.
        """
        buffer = self.shared[turn % 2]
        buffer[self.rank, : len(values)] = values
        self.meet()
        return buffer[:, : len(values)].mean(dim=0)

    def meet(self) -> None:
        """Wait until every worker is here. Raises MammutError when one does not come."""
        try:
            self.barrier.wait(PATIENCE_S)
        except threading.BrokenBarrierError as error:
            raise MammutError("a worker process ended early; its own message says why. Go on with --resume") from error


def run_together(work: Callable[[J, Crew], None], job: J, size: int, length: int) -> None:
    """Run `work(job, crew)` in `size` processes, this one being rank 0, and return when all are done.

    Args:
        work: a function at the top level of a module.
        job: the same for all; its tensors are shared, not copied.
        length: of the longest vector that is averaged.
    """
    context = torch.multiprocessing.get_context("spawn")
    barrier = context.Barrier(size)
    shared = torch.zeros(2, size, length)
    generators = torch.zeros(size, len(torch.Generator().get_state()), dtype=torch.uint8)
    for tensor in (shared, generators):
        tensor.share_memory_()  # type: ignore[no-untyped-call]
    crews = [Crew(rank, size, shared, generators, barrier) for rank in range(size)]
    others = [context.Process(target=_other, args=(work, job, crew), daemon=True) for crew in crews[1:]]
    for process in others:
        process.start()
    threading.Thread(target=_watch, args=(others, barrier), daemon=True).start()
    try:
        work(job, crews[0])
        for process in others:
            process.join(PATIENCE_S)
    finally:
        for process in others:
            if process.is_alive():
                process.terminate()


def _watch(processes: Sequence[BaseProcess], barrier: Barrier) -> None:
    """Free the waiting workers as soon as one has died, also of what Python cannot catch."""
    waiting = {process.sentinel: process for process in processes}
    while waiting:
        for sentinel in multiprocessing.connection.wait(list(waiting)):
            process = waiting.pop(sentinel)  # type: ignore[arg-type]
            process.join()
            if process.exitcode != 0:
                barrier.abort()


def _other(work: Callable[[J, Crew], None], job: J, crew: Crew) -> None:
    torch.set_num_threads(1)
    try:
        work(job, crew)
    except BaseException:
        crew.barrier.abort()  # or the others would wait for their full patience
        raise
