"""Calls of one engine from several threads."""

import threading
from collections.abc import Sequence

from torch import Tensor, equal
from torch.utils import _pytree as pytree

from biper_engine.engine import Engine


def wrong_results(
    engine: Engine, batches: Sequence[Tensor], *, threads: int, calls: int
) -> list[int]:
    """Call an engine from threads that take the batches in turn, each from another one on.

    Returns:
        Positions of batches whose result was not that of a call alone, one for each such call.
    """
    wanted = [pytree.tree_leaves(engine(batch)) for batch in batches]
    wrong = []

    def call(start: int) -> None:
        for i in range(calls):
            at = (start + i) % len(batches)
            if not all(map(equal, pytree.tree_leaves(engine(batches[at])), wanted[at])):
                wrong.append(at)

    running = [threading.Thread(target=call, args=(start,)) for start in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return wrong
