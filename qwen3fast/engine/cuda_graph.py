"""CUDA graphs: a whole decode step recorded once and replayed with one launch. Used on CUDA devices only."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch


class GraphCache:
    """Records a step the first time that a key (batch bucket, cache bucket, sampler) is seen, then replays it.

    All graphs share one memory pool. A step reads and writes static buffers only (see decode.py), so a replay needs no
    arguments and gives no result. Not yet run on a GPU: no machine with one was at hand.
    Source: PyTorch documentation, "CUDA semantics", section on CUDA graphs.
    """

    def __init__(self) -> None:
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, key: Hashable, step: Callable[[], None]) -> None:
        """Run the step for this key, recording it if it is new."""
        graph = self._graphs.get(key)
        if graph is not None:
            graph.replay()
            return
        # The first run, outside of any capture, compiles and does this call's work; capturing itself runs nothing.
        step()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        self._graphs[key] = graph

    def __len__(self) -> int:
        return len(self._graphs)

    def clear(self) -> None:
        """Release all graphs and their memory."""
        self._graphs.clear()
