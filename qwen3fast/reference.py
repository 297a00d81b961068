"""All of a dense Qwen3 in one file of plain PyTorch. Read it from top to bottom.

The rest of this package computes the same numbers faster: on a preallocated cache, for many requests, compiled, with
quantized weights. Nothing below is fast. A test holds it equal to the engine: same logits, same greedy tokens.

    token ids -> embedding -> 28 blocks -> norm -> output projection -> one score for each token of the vocabulary

    a block:  x = x + attention(norm(x))         each token looks at itself and the tokens before it
              x = x + feed_forward(norm(x))      each token is processed on its own

The name of a tensor ends in its dimensions. On the right, their sizes in Qwen3-0.6B:

    B  batch: texts at once                1     H  query heads              16
    T  tokens in this call        any number     K  key/value heads           8
    S  tokens so far, cached ones included       D  channels of a head      128
    E  hidden size: channels of a token 1024     F  feed-forward size      3072
    V  vocabulary                     151936     28 layers, 596,049,920 parameters in all

Modules are named as in published checkpoints, whose tensors load unchanged:

    from qwen3fast import load_model
    from qwen3fast.reference import Qwen3, generate

    source = load_model("tiny", device="cpu", dtype="float32")
    model = Qwen3(source.config)  # it has all fields of Config below
    model.load_state_dict(source.state_dict())
    generate(model, prompt_ids=[1, 2, 3], max_tokens=16)

Source: Qwen3 technical report, arXiv:2505.09388, section 2.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    """The numbers that define a dense Qwen3, by their names in config.json. The defaults are Qwen3-0.6B's."""

    vocab_size: int = 151_936
    hidden_size: int = 1024
    intermediate_size: int = 3072
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    num_key_value_heads: int = 8
    head_dim: int = 128  # a number of its own: hidden_size / num_attention_heads would be 64
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1_000_000.0
    tie_word_embeddings: bool = True  # the output projection is the embedding (0.6B, 1.7B, 4B)


class RMSNorm(nn.Module):
    """Scaling of each vector to root mean square 1, then of each channel by a learned weight (arXiv:1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return x, (..., size), normalized over its last dimension; the statistics are computed in float32."""
        mean_square = x.float().square().mean(dim=-1, keepdim=True)
        return (x.float() * torch.rsqrt(mean_square + self.eps)).to(x.dtype) * self.weight


# --- Positions -------------------------------------------------------------------------------------------------------
# Attention alone does not know the order of tokens. RoPE encodes it as rotation: channels i and i + D/2 of a query or
# key form a point in a plane, turned by an angle proportional to the token's position. The dot product of two rotated
# vectors then depends on their distance only. Pair 0 turns by 1 radian per token, the last of the 64 pairs once in
# about 5 million tokens: some pairs distinguish neighbors, others chapters (RoFormer, arXiv:2104.09864, section 3.2).


def rope_tables(config: Config, position_T: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of every rotation angle, (T, D) each, float32, for tokens at these positions (int64)."""
    exponent = torch.arange(0, config.head_dim, 2, device=position_T.device) / config.head_dim  # (64,): 0 to 126/128
    angles = torch.outer(position_T.float(), 1.0 / config.rope_theta**exponent)  # (T, 64)
    angles_TD = torch.cat([angles, angles], dim=-1)  # the two channels of a pair share an angle: (T, 128)
    return angles_TD.cos(), angles_TD.sin()


def apply_rope(x_BHTD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Return every head vector rotated to its position; same shape and dtype."""
    first, second = x_BHTD.float().chunk(2, dim=-1)
    turned_BHTD = torch.cat([-second, first], dim=-1)  # by 90 degrees
    return (x_BHTD.float() * cos_TD + turned_BHTD * sin_TD).to(x_BHTD.dtype)


# --- The KV cache ----------------------------------------------------------------------------------------------------
# A new token looks at the keys and values of all tokens before it. These never change, as a token sees only earlier
# tokens: they are computed once and kept. The first call (prefill) stores them for the whole prompt; every later call
# (a decode step) computes one token and reads the rest. Without the cache, each new token would cost a forward pass
# over the whole text. In 0.6B, a token takes 2 (k and v) x 28 layers x 8 heads x 128 channels x 2 bytes = 112 KiB.


class LayerCache:
    """Keys and values of one layer, (B, K, S, D) each, in memory allocated once for `max_seq_len` tokens."""

    def __init__(self, config: Config, batch_size: int, max_seq_len: int, dtype: torch.dtype, device: torch.device):
        shape = (batch_size, config.num_key_value_heads, max_seq_len, config.head_dim)
        self.k_BKSD = torch.zeros(shape, dtype=dtype, device=device)
        self.v_BKSD = torch.zeros(shape, dtype=dtype, device=device)
        self.length = 0  # tokens stored so far

    def append(self, k_BKTD: Tensor, v_BKTD: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values of the next T tokens. Returns all keys and all values so far, (B, K, S, D) each."""
        start, self.length = self.length, self.length + k_BKTD.shape[2]
        self.k_BKSD[:, :, start : self.length] = k_BKTD
        self.v_BKSD[:, :, start : self.length] = v_BKTD
        return self.k_BKSD[:, :, : self.length], self.v_BKSD[:, :, : self.length]


# --- The two halves of a block ---------------------------------------------------------------------------------------
class Attention(nn.Module):
    """Grouped-query attention with QK-norm: each token takes a weighted average of the values up to its own.

    Two query heads share each of the 8 key/value heads, which halves the cache (arXiv:2305.13245).
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.H, self.K, self.D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, self.H * self.D, bias=False)  # 1024 -> 16 * 128 = 2048
        self.k_proj = nn.Linear(config.hidden_size, self.K * self.D, bias=False)  # 1024 ->  8 * 128 = 1024
        self.v_proj = nn.Linear(config.hidden_size, self.K * self.D, bias=False)  # 1024 ->  8 * 128 = 1024
        self.o_proj = nn.Linear(self.H * self.D, config.hidden_size, bias=False)  # 2048 -> 1024
        self.q_norm = RMSNorm(self.D, config.rms_norm_eps)  # one weight per channel, shared by all heads
        self.k_norm = RMSNorm(self.D, config.rms_norm_eps)

    def forward(
        self, x_BTE: Tensor, cos_TD: Tensor, sin_TD: Tensor, mask_TS: Tensor, cache: LayerCache | None
    ) -> Tensor:
        """Return (B, T, E). mask_TS: bool, True where token t of this call may look at token s."""
        B, T, _ = x_BTE.shape
        q_BHTD = self.q_proj(x_BTE).view(B, T, self.H, self.D).transpose(1, 2)
        k_BKTD = self.k_proj(x_BTE).view(B, T, self.K, self.D).transpose(1, 2)
        v_BKTD = self.v_proj(x_BTE).view(B, T, self.K, self.D).transpose(1, 2)

        # QK-norm: RMSNorm over the D channels of each head's query and key, which makes their length sqrt(D), and a
        # learned weight per channel. It bounds the scores. (Qwen2 had no QK-norm, but biases on q, k and v.)
        q_BHTD, k_BKTD = self.q_norm(q_BHTD), self.k_norm(k_BKTD)  # before RoPE: weights would distort rotated pairs
        q_BHTD, k_BKTD = apply_rope(q_BHTD, cos_TD, sin_TD), apply_rope(k_BKTD, cos_TD, sin_TD)

        k_BKSD, v_BKSD = (k_BKTD, v_BKTD) if cache is None else cache.append(k_BKTD, v_BKTD)
        k_BHSD = k_BKSD.repeat_interleave(self.H // self.K, dim=1)  # query heads 0 and 1 use key head 0, and so on
        v_BHSD = v_BKSD.repeat_interleave(self.H // self.K, dim=1)

        scores_BHTS = q_BHTD @ k_BHSD.transpose(2, 3) / self.D**0.5
        scores_BHTS = scores_BHTS.masked_fill(~mask_TS, float("-inf"))
        share_BHTS = scores_BHTS.softmax(dim=-1, dtype=torch.float32).to(x_BTE.dtype)  # sums to 1 over S
        y_BHTD = share_BHTS @ v_BHSD
        return self.o_proj(y_BHTD.transpose(1, 2).reshape(B, T, self.H * self.D))


class FeedForward(nn.Module):
    """SwiGLU: two projections up, one of which gates the other, and one down. Source: arXiv:2002.05202, equation 6."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)  # 1024 -> 3072
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)  # 1024 -> 3072
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)  # 3072 -> 1024

    def forward(self, x_BTE: Tensor) -> Tensor:
        """Return (B, T, E). silu(x) = x * sigmoid(x)."""
        return self.down_proj(F.silu(self.gate_proj(x_BTE)) * self.up_proj(x_BTE))


# --- The model -------------------------------------------------------------------------------------------------------
class Block(nn.Module):
    """Attention, then feed-forward; each reads a normalized copy of x and adds its result to x."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FeedForward(config)

    def forward(
        self, x_BTE: Tensor, cos_TD: Tensor, sin_TD: Tensor, mask_TS: Tensor, cache: LayerCache | None
    ) -> Tensor:
        """Return (B, T, E)."""
        x_BTE = x_BTE + self.self_attn(self.input_layernorm(x_BTE), cos_TD, sin_TD, mask_TS, cache)
        return x_BTE + self.mlp(self.post_attention_layernorm(x_BTE))


class Body(nn.Module):
    """Everything below the output projection; `model.*` in a checkpoint."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)  # 151936 vectors of 1024
        self.layers = nn.ModuleList([Block(config) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, token_BT: Tensor, cache: list[LayerCache] | None) -> Tensor:
        """Return the final state of each token, (B, T, E)."""
        start = cache[0].length if cache is not None else 0
        seen_S = torch.arange(start + token_BT.shape[1], device=token_BT.device)  # positions of all tokens so far
        position_T = seen_S[start:]  # positions of the tokens of this call
        mask_TS = seen_S <= position_T[:, None]  # causal: no token sees a later one
        cos_TD, sin_TD = rope_tables(self.config, position_T)
        x_BTE = self.embed_tokens(token_BT)
        for layer, block in enumerate(self.layers):
            x_BTE = block(x_BTE, cos_TD, sin_TD, mask_TS, cache[layer] if cache is not None else None)
        return self.norm(x_BTE)


class Qwen3(nn.Module):
    """A Qwen3 language model."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.model = Body(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)  # 1024 -> 151936
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, token_BT: Tensor, cache: list[LayerCache] | None = None) -> Tensor:
        """Return logits, (B, T, V): at each token, a score for every token that could come next.

        token_BT: int64 ids; with a cache, only the tokens that it does not hold yet.
        """
        return self.lm_head(self.model(token_BT, cache))

    def new_cache(self, batch_size: int, max_seq_len: int) -> list[LayerCache]:
        """Return an empty cache, one entry per layer, for texts of up to `max_seq_len` tokens."""
        config, weight = self.model.config, self.lm_head.weight
        return [LayerCache(config, batch_size, max_seq_len, weight.dtype, weight.device) for _ in self.model.layers]


@torch.inference_mode()
def generate(
    model: Qwen3, prompt_ids: list[int], max_tokens: int, stop_ids: tuple[int, ...] = (), use_cache: bool = True
) -> list[int]:
    """Return the greedy continuation of a prompt: `max_tokens` ids, or fewer if the last one is a stop id."""
    output_ids: list[int] = []
    cache = model.new_cache(1, len(prompt_ids) + max_tokens) if use_cache else None
    new_ids = prompt_ids  # prefill: the whole prompt at once
    while len(output_ids) < max_tokens:
        logits_BTV = model(torch.tensor([new_ids], device=model.lm_head.weight.device), cache)
        output_ids.append(int(logits_BTV[0, -1].argmax()))  # the last token's scores say what comes next
        if output_ids[-1] in stop_ids:
            break
        new_ids = output_ids[-1:] if use_cache else [*prompt_ids, *output_ids]  # a decode step needs one token only
    return output_ids
