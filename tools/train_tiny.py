"""Train the tiny Qwen3 that ships with the package, on the CPU, from data that this program makes.

    python tools/train_tiny.py --steps 3000 --output qwen3fast/assets/tiny

Writes a folder in Hugging Face layout (config, tokenizer, chat template, bf16 safetensors) and a README.md with the
seed, the loss curve and the accuracy on held-out examples. Interrupting with Ctrl-C writes nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import tiny_tasks
import torch
import torch.nn.functional as F
from huggingface_hub.utils import tqdm
from safetensors.torch import save_file
from tiny_tasks import Example
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from qwen3fast.checkpoint.hf_config import CheckpointConfig
from qwen3fast.model import Qwen3
from qwen3fast.model.config import ModelConfig

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARKERS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
EMPTY_THOUGHT = "<think>\n\n</think>\n\n"
VOCAB_SIZE = 1024
MAX_WORDS = 2000  # about 2,150 tokens of context
IGNORE = -100
MICRO_BATCHES = 6  # of different lengths in every step: short tasks and long contexts pull together
# Words with their leading space, single digits, punctuation, white space: the scheme of Qwen's tokenizer, shortened.
WORD_PATTERN = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

CONFIG = ModelConfig(
    vocab_size=VOCAB_SIZE,
    hidden_size=192,
    intermediate_size=576,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=4096,
    tie_word_embeddings=True,
)


def train_tokenizer(rng: random.Random) -> Tokenizer:
    """A byte-level BPE tokenizer over the tasks' own text; every byte is in the vocabulary, so any text encodes."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL) - len(MARKERS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    examples = [make_example(rng, 1.0) for _ in range(4000)]
    text = [content for e in examples for _, content in e.messages] + [e.thought for e in examples]
    tokenizer.train_from_iterator(text + [tiny_tasks.plain_text(rng) for _ in range(1000)], trainer)
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.add_tokens(list(MARKERS))
    return tokenizer


def make_example(rng: random.Random, progress: float) -> Example:
    """One training example; the contexts to look facts up in grow with `progress` (0 to 1)."""
    kind = rng.random()
    if kind < 0.30:
        return tiny_tasks.addition(rng)
    if kind < 0.42:
        return tiny_tasks.counting(rng)
    if kind < 0.56:
        return tiny_tasks.copying(rng)
    if kind < 0.66:
        return tiny_tasks.reversing(rng)
    if kind < 0.76:
        return tiny_tasks.talk(rng)
    longest = 60 * (MAX_WORDS / 60) ** min(1.0, max(0.0, progress - 0.15) / 0.35)
    # Log-uniform: most contexts stay short; long ones do not use up the whole budget.
    words = int(math.exp(rng.uniform(math.log(20), math.log(longest))))
    return tiny_tasks.lookup(rng, words, rng.randint(1, 8))


def encode(tokenizer: Tokenizer, example: Example, thinking: bool) -> tuple[list[int], list[int]]:
    """Token ids and labels (IGNORE where no loss is taken) of one conversation, in the chat template's format."""
    pieces: list[tuple[str, bool]] = []
    for index, (role, content) in enumerate(example.messages):
        last = index == len(example.messages) - 1
        if role == "user":
            pieces.append((f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n", False))
        elif last and thinking:
            pieces.append((f"<think>\n{example.thought}\n</think>\n\n{content}<|im_end|>", True))
        else:
            pieces += [(EMPTY_THOUGHT, False), (f"{content}<|im_end|>", last or example.every_turn)]
            pieces += [] if last else [("\n", False)]
    return _join(tokenizer, pieces)


def _join(tokenizer: Tokenizer, pieces: list[tuple[str, bool]]) -> tuple[list[int], list[int]]:
    ids: list[int] = []
    labels: list[int] = []
    for text, trained in pieces:
        piece = tokenizer.encode(text, add_special_tokens=False).ids
        ids += piece
        labels += piece if trained else [IGNORE] * len(piece)
    return ids, labels


def make_batches(
    tokenizer: Tokenizer, rng: random.Random, progress: float, tokens: int, pool: int = 1500
) -> list[tuple[Tensor, Tensor]]:
    """A pool of examples, sorted by length and cut into padded batches of about `tokens` tokens, in random order."""
    rows = []
    for _ in range(pool):
        kind = rng.random()
        if kind < (0.4 if progress < 0.15 else 0.05):
            words = tiny_tasks.repeated_words(rng)
            rows.append(_join(tokenizer, [(words, False), (words, True)]))
        elif kind > 0.95:
            rows.append(_join(tokenizer, [(tiny_tasks.plain_text(rng) + "<|endoftext|>", True)]))
        else:
            rows.append(encode(tokenizer, make_example(rng, progress), thinking=rng.random() < 0.3))
    rows.sort(key=lambda row: len(row[0]))
    batches: list[list[tuple[list[int], list[int]]]] = [[]]
    for row in rows:
        if batches[-1] and (len(batches[-1]) + 1) * len(row[0]) > tokens:
            batches.append([])
        batches[-1].append(row)
    rng.shuffle(batches)
    return [pad(batch) for batch in batches]


def pad(rows: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    """Rows of ids and labels as two (rows, longest) tensors; padding never enters the loss."""
    width = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    labels = torch.full((len(rows), width), IGNORE)
    for i, (row_ids, row_labels) in enumerate(rows):
        ids[i, : len(row_ids)] = torch.tensor(row_ids)
        labels[i, : len(row_labels)] = torch.tensor(row_labels)
    return ids, labels


def loss_of(model: Qwen3, ids: Tensor, labels: Tensor) -> Tensor:
    """Weighted sum of the cross-entropy of the trained tokens; only their positions get logits.

    A row of n trained tokens has the total weight sqrt(n): between every token and every example counting the same.
    """
    hidden = model.hidden(ids)[:, :-1]
    targets = labels[:, 1:]
    chosen = targets != IGNORE
    losses = F.cross_entropy(model.logits(hidden[chosen]).float(), targets[chosen], reduction="none")
    return (losses * row_weights(labels)[chosen]).sum()


def row_weights(labels: Tensor) -> Tensor:
    """The weight of each trained token, shaped as the targets `labels[:, 1:]`."""
    trained = labels[:, 1:] != IGNORE
    return trained / trained.sum(dim=1, keepdim=True).clamp(min=1).sqrt()


def initialize(model: Qwen3) -> None:
    """Normal weights of standard deviation 0.02; projections back into the residual stream scaled down by depth.

    One channel of every token's embedding starts at the same value. Queries and keys have no bias, so this constant is
    there for heads that attend by position alone ("the token before"), which looking facts up builds on.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            deep = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = 0.02 / math.sqrt(2 * CONFIG.num_hidden_layers) if deep else 0.02
            torch.nn.init.normal_(parameter, std=std)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 10 * 0.02


def train(model: Qwen3, tokenizer: Tokenizer, args: argparse.Namespace) -> list[tuple[int, float]]:
    """Run the training steps. Returns the loss curve as (step, mean loss since the last point)."""
    rng = random.Random(args.seed)
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.dim() != 2 or "embed" in n]
    # Muon orthogonalizes the update of each matrix.
    peaks = [args.lr, args.lr / 4]
    optimizers = [
        torch.optim.Muon(matrices, lr=peaks[0], weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=peaks[1], betas=(0.9, 0.95), weight_decay=0.0),
    ]
    for block in model.model.layers:
        block.forward = torch.compile(block.forward, dynamic=True)
    curve: list[tuple[int, float]] = []
    recent: list[float] = []
    batches: list[tuple[Tensor, Tensor]] = []
    for step in (bar := tqdm(range(args.steps), desc="training", unit="step")):
        progress = step / args.steps
        scale = min(1.0, (step + 1) / 100) * min(1.0, (1 - progress) / 0.5)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * scale
        if len(batches) < MICRO_BATCHES:
            batches = make_batches(tokenizer, rng, progress, args.batch_tokens // MICRO_BATCHES)
        micro_batches = [batches.pop() for _ in range(MICRO_BATCHES)]
        weight = sum(float(row_weights(labels).sum()) for _, labels in micro_batches)
        loss = 0.0
        for ids, labels in micro_batches:
            with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
                part = loss_of(model, ids, labels) / weight
            part.backward()
            loss += part.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        recent.append(loss)
        if (step + 1) % max(1, args.steps // 48) == 0:
            curve.append((step + 1, sum(recent) / len(recent)))
            recent = []
            bar.set_postfix(loss=f"{curve[-1][1]:.3f}")
            if len(curve) % 4 == 0:
                bar.write(f"step {step + 1}: loss {curve[-1][1]:.3f}, accuracy {evaluate(model, tokenizer, 20)}")
    return curve


@torch.no_grad()
def evaluate(model: Qwen3, tokenizer: Tokenizer, count: int, seed: int = 1_000_003) -> dict[str, float]:
    """Return the share of examples that greedy decoding answers exactly, without and (additions) with reasoning.

    All answer tokens being the most likely given the right ones before them is the same as greedy decoding being right.
    """
    rng = random.Random(seed)
    tasks = {
        "addition": lambda: tiny_tasks.addition(rng, held_out=True),
        "addition, thinking": lambda: tiny_tasks.addition(rng, held_out=True),
        "counting": lambda: tiny_tasks.counting(rng),
        "copying": lambda: tiny_tasks.copying(rng),
        "reversing": lambda: tiny_tasks.reversing(rng),
        "lookup at 300 tokens": lambda: tiny_tasks.lookup(rng, 275),
        "lookup at 2000 tokens": lambda: tiny_tasks.lookup(rng, 1900),
    }
    accuracy = {}
    for name, make in tasks.items():
        right = 0
        for _ in range(count):
            ids, labels = pad([encode(tokenizer, make(), thinking=name.endswith("thinking"))])
            with torch.compiler.set_stance("force_eager"):  # no decorator, which would import the compiler at once
                predicted = model(ids)[:, :-1].argmax(-1)
            trained = labels[:, 1:] != IGNORE
            right += bool((predicted[trained] == labels[:, 1:][trained]).all())
        accuracy[name] = right / count
    return accuracy


def save(
    model: Qwen3, tokenizer: Tokenizer, folder: Path, curve: list[tuple[int, float]], args: argparse.Namespace, s: float
) -> None:
    """Write the checkpoint in Hugging Face layout: into a temporary folder first: a failure leaves the old one."""
    end, eos = (tokenizer.token_to_id(t) for t in ("<|endoftext|>", "<|im_end|>"))
    template = (Path(__file__).parent / "tiny_chat_template.jinja").read_text(encoding="utf-8")
    state = {k: v.to(torch.bfloat16).contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    model.load_state_dict(state, strict=False)  # evaluate the saved weights, which are rounded to bfloat16
    accuracy = evaluate(model, tokenizer, args.eval_examples)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        new = Path(temporary)
        save_file(state, new / "model.safetensors", metadata={"format": "pt"})
        tokenizer.save(str(new / "tokenizer.json"))
        _write_json(new / "config.json", CheckpointConfig(replace(CONFIG, eos_token_ids=(eos,))).to_dict())
        generation = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}
        _write_json(new / "generation_config.json", {**generation, "eos_token_id": [eos, end], "pad_token_id": end})
        added = {
            str(tokenizer.token_to_id(t)): {
                "content": t, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False,
                "special": t in SPECIAL,
            }
            for t in SPECIAL + MARKERS
        }  # fmt: skip
        tokenizer_config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "added_tokens_decoder": added,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "clean_up_tokenization_spaces": False,
            "model_max_length": CONFIG.max_position_embeddings,
            "chat_template": template,
        }
        _write_json(new / "tokenizer_config.json", tokenizer_config)
        (new / "README.md").write_text(describe(curve, accuracy, args, s), encoding="utf-8")
        folder.mkdir(exist_ok=True)
        for file in new.iterdir():
            file.replace(folder / file.name)


def describe(curve: list[tuple[int, float]], accuracy: dict[str, float], args: argparse.Namespace, s: float) -> str:
    """The model card: how it was made and what it can do."""
    points = "\n".join(f"| {step} | {loss:.3f} |" for step, loss in curve)
    scores = "\n".join(f"| {task} | {share:.1%} |" for task, share in accuracy.items())
    return f"""# tiny: a small Qwen3 for tests and examples

A real Qwen3 (QK-norm, grouped queries, tied embeddings; {CONFIG.num_parameters:,} parameters) trained by
`tools/train_tiny.py` on text that the tool makes itself: to add, count, copy, reverse, and look facts up in up to 2,000
tokens of context, with and without `<think>`. The table says how well it does each; it knows nothing else.

- Command: `python tools/train_tiny.py --steps {args.steps} --seed {args.seed} --lr {args.lr} --batch-tokens \
{args.batch_tokens}{" --bf16" if args.bf16 else ""}`
- Seed {args.seed}, {args.steps} steps, {s / 60:.0f} minutes on {torch.get_num_threads()} CPU thread(s), \
torch {torch.__version__}.
- Trained on up to about 2,200 tokens of context; `max_position_embeddings` is larger than that.

Exact greedy answers on {args.eval_examples} freshly drawn examples a task (only the additions are known to be unseen:
their operand pairs were never trained), weights in bfloat16 as shipped, computed in float32:

| task | accuracy |
| --- | --- |
{scores}

| step | mean training loss |
| --- | --- |
{points}
"""


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--lr", type=float, default=2e-3, help="peak learning rate of the matrices; a quarter for the rest"
    )
    parser.add_argument("--batch-tokens", type=int, default=6144, help="tokens a step, padding included")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16 autocast (weights stay float32)")
    parser.add_argument("--eval-examples", type=int, default=200, help="held-out examples a task at the end")
    parser.add_argument("--output", type=Path, default=Path("qwen3fast/assets/tiny"))
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    tokenizer = train_tokenizer(random.Random(args.seed))
    model = Qwen3(CONFIG)
    initialize(model)
    started = time.perf_counter()
    curve = train(model, tokenizer, args)
    save(model, tokenizer, args.output, curve, args, time.perf_counter() - started)
    print((args.output / "README.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
