"""Engine: a model, its cache and its compiled parts, run row by row (prefill) and step by step (decode).

It knows tokens and rows; requests are the scheduler's, text is the Generator's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from qwen3fast.engine.compile import CompileMode, StepCompiler
from qwen3fast.engine.cuda_graph import GraphCache
from qwen3fast.engine.decode import DecodeState, decode_step
from qwen3fast.engine.parts import Parts
from qwen3fast.engine.prefill import prefill
from qwen3fast.engine.token_ring import TokenRing
from qwen3fast.kv_cache import StaticKVCache
from qwen3fast.model import Qwen3, rope_tables
from qwen3fast.sampling import SamplerKind, SamplerRows

MIN_UNCACHED_TOKENS = 16
# Steps that are launched before the tokens of the one before them are looked at, on CUDA. Enough that launching hides
# behind the device's work; what is computed after a stop token, so many steps at most, is thrown away.
LOOKAHEAD = 4


class Engine:
    """Everything that a forward pass needs, with fixed addresses.

    compile=False runs the same code eagerly; cuda_graphs=False launches each kernel of a step from the host.
    lookahead: steps in flight beside the one waited for, see `launch`; by default LOOKAHEAD on CUDA, otherwise 0.
    """

    def __init__(
        self,
        model: Qwen3,
        cache: StaticKVCache,
        device: torch.device,
        compile: CompileMode = True,
        cuda_graphs: bool = True,
        lookahead: int | None = None,
    ) -> None:
        self.model, self.cache, self.device = model, cache, device
        self.compiler = StepCompiler(compile, device)
        self.parts = Parts.build(self.compiler, model, cache)
        self.state = DecodeState.allocate(cache.max_batch_size, device)
        self.graphs = GraphCache() if cuda_graphs and device.type == "cuda" else None
        self.lookahead = lookahead if lookahead is not None else LOOKAHEAD if device.type == "cuda" else 0
        self.ring = TokenRing(cache.max_batch_size, self.lookahead + 1, device)
        config = model.config
        self.cos_SD, self.sin_SD = rope_tables(config.head_dim, config.rope_theta, cache.allocated_len, device)

    @torch.no_grad()
    def prefill(self, row: int, token_ids: list[int]) -> Iterator[Tensor | None]:
        """Fill row `row` of the cache with a prompt, a chunk at each step of the iterator; steps of other rows may run
        between them.

        Yields: None after each chunk; instead of it, after the last one, the logits after the last token, (1, V).
        """
        # A decode step writes keys and values in every row that it covers: in this one, where its own next ones go.
        self.clear_row(row)
        self.state.position_R[row : row + 1].fill_(len(token_ids))
        chunks = prefill(self.model, self.parts, self.cache, self.cos_SD, self.sin_SD, row, token_ids)
        while True:
            self.compiler.share_processor()
            logits_1V = next(chunks)
            yield logits_1V
            if logits_1V is not None:
                return

    def prefill_whole(self, row: int, token_ids: list[int]) -> Tensor:
        """`prefill` at once. Returns the logits after the last token, (1, V)."""
        *_, logits_1V = self.prefill(row, token_ids)
        assert logits_1V is not None, "the last step gives them"
        return logits_1V

    @torch.no_grad()
    def set_row(
        self, row: int, length: int, temperature: float, top_k: int, top_p: float, min_p: float, seed: int
    ) -> None:
        """Begin a request in a row whose cache holds `length` tokens."""
        state, numbers = self.state, (length, 1, 0, temperature, top_k, top_p, min_p, seed)
        names = ("position_R", "advance_R", "step_R", "temperature_R", "top_k_R", "top_p_R", "min_p_R", "seed_R")
        for name, number in zip(names, numbers, strict=True):
            getattr(state, name)[row : row + 1].fill_(number)  # assigning to [row] would wait for the device

    @torch.no_grad()
    def sample_first(self, row: int, logits_1V: Tensor, kind: SamplerKind) -> int:
        """Sample a row's first token from prefill's logits and make it the row's next input; -1 if they are invalid."""
        rows = self.state.sampler_rows(torch.tensor([row], device=self.device))
        token_1 = self.parts.samplers[kind](None, logits_1V, *rows)
        self.state.input_R[row : row + 1] = token_1.clamp(min=0)
        self.state.step_R[row] += 1
        return int(token_1.item())

    @torch.no_grad()
    def clear_row(self, row: int) -> None:
        """Make a row empty: it may run along in a batch, but stays where it is."""
        for tensor in (self.state.advance_R, self.state.input_R, self.state.temperature_R):
            tensor[row : row + 1].zero_()

    @torch.no_grad()
    def launch(self, num_rows: int, used_length: int, kind: SamplerKind) -> None:
        """Start one step for rows 0..num_rows-1 (rounded up to a bucket); `collect` gives its tokens.

        used_length: positions in use after this step by the longest row. The step feeds itself, so up to `lookahead`
        more steps may be started before its tokens are collected.
        """
        self.compiler.share_processor()
        bucket_rows, length = self.batch_bucket(num_rows), self.cache.bucket(used_length)

        def step() -> None:
            decode_step(
                self.model, self.parts, self.cache, self.cos_SD, self.sin_SD, self.state, bucket_rows, length, kind
            )

        if self.graphs is not None:
            self.graphs.run((bucket_rows, length, kind), step)
        else:
            step()
        self.ring.push(self.state.output_R[:num_rows])

    def collect(self) -> list[int]:
        """The new tokens of the oldest step that was launched, one for each of its rows (and more, of no meaning)."""
        return self.ring.pop()

    def decode(self, num_rows: int, used_length: int, kind: SamplerKind) -> list[int]:
        """One step at once: `launch` and `collect`. Returns the new token of each of these rows."""
        self.launch(num_rows, used_length, kind)
        return self.collect()[:num_rows]

    @torch.no_grad()
    def logits_uncached(self, token_ids: list[int]) -> Tensor:
        """The reference without a cache: the whole sequence computed anew. Returns the last token's logits, (1, V)."""
        # Rows after the last token are ignored by causality; a minimum keeps one compiled form for all lengths.
        padded = token_ids + [0] * (MIN_UNCACHED_TOKENS - len(token_ids))
        token_1T = torch.tensor([padded], device=self.device)
        cos_1TD, sin_1TD = self.cos_SD[None, : len(padded)].clone(), self.sin_SD[None, : len(padded)].clone()
        x_1TE = self.model.embed(token_1T)
        for block in self.model.model.layers:
            x_1TE = self.parts.block_uncached(block, x_1TE, cos_1TD, sin_1TD)
        last = len(token_ids) - 1
        return self.parts.logits(
            self.parts.head, x_1TE[:, last : last + 1].clone(memory_format=torch.contiguous_format)
        ).squeeze(1)

    @torch.no_grad()
    def sample(self, logits_1V: Tensor, rows: SamplerRows, kind: SamplerKind) -> int:
        """Sample with explicit parameters of one row; -1 if the logits are invalid."""
        return int(self.parts.samplers[kind](None, logits_1V, *rows).item())

    def batch_bucket(self, num_rows: int) -> int:
        """Rows that a step for `num_rows` runs: the next power of two, at most max_batch_size."""
        return min(1 << (num_rows - 1).bit_length(), self.cache.max_batch_size)

    def batch_buckets(self) -> list[int]:
        """All sizes that `batch_bucket` can give."""
        return sorted({self.batch_bucket(n) for n in range(1, self.cache.max_batch_size + 1)})

    @torch.no_grad()
    def warmup(self, report: Callable[[str], None] = lambda part: None) -> None:
        """Compile (and on CUDA capture) everything that a request can need. All rows must be empty.

        report: called with the name of each part before it is made.
        """
        self.compiler.close(wait=True)  # "auto" ends here
        report("prefill")
        logits_1V = self.prefill_whole(0, [0])
        for kind in SamplerKind:
            report(f"{kind.value} sampler")
            self.sample_first(0, logits_1V, kind)
        # The smallest cache bucket serves to compile; graphs are recorded for each one, largest first.
        lengths = self.cache.buckets if self.graphs is not None else [1]
        for num_rows in reversed(self.batch_buckets()):
            report(f"decode step, batch {num_rows}")
            for used in reversed(lengths):
                for kind in SamplerKind:
                    self.decode(num_rows, used, kind)
        self.clear_all()

    def clear_all(self) -> None:
        """Make all rows empty."""
        for row in range(self.cache.max_batch_size):
            self.clear_row(row)

    def num_warmup_parts(self) -> int:
        """How often `warmup` reports."""
        return 1 + len(SamplerKind) + len(self.batch_buckets())

    def close(self) -> None:
        """Release recorded graphs; stop compiling."""
        self.compiler.close()
        if self.graphs is not None:
            self.graphs.clear()
