"""Train a small Qwen3 on English prose, on the CPU, from the texts and documentation in Debian's packages.

    python tools/train_english.py --output ~/english --hours 2
    python tools/train_english.py --output ~/english --hours 4 --resume     (go on to 4 hours in all)
    python -m qwen3fast.bench --suite quality --model ~/english/model --text ~/english/held_out.txt

For comparing formats on language instead of random weights: 15 million parameters, a byte-level BPE vocabulary of 8,192
tokens. About 250 MB of packages are downloaded by apt-get (no root needed) and unpacked, never installed; their prose
(some 65 MB) is split by document into training and held-out text. The output folder holds the packages, the text, the
checkpoint, and in model/ a checkpoint in Hugging Face layout with README.md and training.json (seed, sources, curve).
model/ is written every --save-minutes: it can be used while training goes on, and Ctrl-C loses no more than that.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path
from typing import Any

import english_corpus
import torch
from english_training import CONFIG, LENGTH, Run, held_out_loss

from qwen3fast.checkpoint.save import save_model
from qwen3fast.model import Qwen3

FINAL_TOKENS = 65_536  # of held-out text, for the perplexity in the README


def export(run: Run, folder: Path, sources: list[dict[str, Any]], command: str, tokens: int) -> None:
    """Write the checkpoint in Hugging Face layout, in bfloat16, with a model card."""
    model = Qwen3(CONFIG)
    model.load_state_dict(run.model.state_dict())
    model = model.to(torch.bfloat16).requires_grad_(False)
    companions = folder / "tokenizer"
    companions.mkdir(exist_ok=True)
    shutil.copyfile(folder / "tokenizer.json", companions / "tokenizer.json")
    ids = english_corpus.read_ids(folder, "held_out")
    facts = {
        "command": command, "seed": run.seed, "parameters": CONFIG.num_parameters,
        "threads": torch.get_num_threads(), "torch": torch.__version__,
        "hours": round(run.state.seconds / 3600, 3), "cpu_hours": round(run.state.cpu_seconds / 3600, 3),
        "steps": run.state.step, "tokens": run.state.tokens, "context": LENGTH,
        "held_out_tokens": min(tokens, len(ids)),
        "held_out_perplexity": round(math.exp(held_out_loss(model, ids, tokens)), 3),
        "sources": sources, "curve": run.state.curve,
    }  # fmt: skip
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }
    _write_json(companions / "tokenizer_config.json", settings)
    end = int(english_corpus.VOCAB_SIZE - len(english_corpus.SPECIAL))
    _write_json(companions / "generation_config.json", {"eos_token_id": end, "pad_token_id": end})
    save_model(model, folder / "model", companions)
    _write_json(folder / "model" / "training.json", facts)
    (folder / "model" / "README.md").write_text(describe(facts), encoding="utf-8")


def describe(facts: dict[str, Any]) -> str:
    """Return the model card."""
    sources = "\n".join(
        f"| {s['package']} | {s['version']} | {s['bytes'] / 1e6:.1f} | {s['prose_characters'] / 1e6:.2f} |"
        for s in facts["sources"]
    )
    points = "\n".join(
        f"| {p['step']:,} | {p['tokens']:,} | {p['seconds'] / 60:.0f} | {p['train_loss']} | {p['held_out_loss']} |"
        for p in facts["curve"]
    )
    return f"""# english: a small Qwen3 trained on the prose in Debian's packages

A Qwen3 of {facts["parameters"]:,} parameters for comparing formats of weights and caches on language. Made by
`{facts["command"]}` in {facts["hours"]:.2f} hours, pauses included, with {facts["threads"]} CPU threads
({facts["cpu_hours"]:.2f} hours of CPU time); seed {facts["seed"]}, torch {facts["torch"]}.
Perplexity of {facts["held_out_tokens"]:,} tokens of held-out documents, {facts["context"]} at a time: \
{facts["held_out_perplexity"]}.

| package | version | download, MB | prose, MB |
| --- | --- | --- | --- |
{sources}

| step | tokens | minutes | training loss | held-out loss |
| --- | --- | --- | --- | --- |
{points}
"""


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Parse the command line, make the corpus and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write; texts there are used again")
    parser.add_argument(
        "--hours",
        type=float,
        default=2.0,
        help="of training in all, each thread's processor time; the learning rate ends at 0 then [%(default)s]",
    )
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in --output")
    parser.add_argument("--seed", type=int, default=0, help="[%(default)s]")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak; half of it for embeddings [%(default)s]")
    parser.add_argument("--batch-tokens", type=int, default=4096, help="per step [%(default)s]")
    parser.add_argument("--eval-tokens", type=int, default=8192, help="held-out, at every checkpoint [%(default)s]")
    parser.add_argument("--save-minutes", type=float, default=5.0, help="between checkpoints [%(default)s]")
    parser.add_argument("--threads", type=int, default=2, help="1 where other programs run [%(default)s]")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    english_corpus.build(args.output, args.seed)
    sources = json.loads((args.output / "sources.json").read_text(encoding="utf-8"))
    run = Run(args.output / "checkpoint.pt", args.lr, args.seed, args.resume)
    run.model.compile()
    command = f"python tools/train_english.py --hours {args.hours:g} --seed {args.seed} --lr {args.lr:g} "
    command += f"--batch-tokens {args.batch_tokens}"
    ids, held_out = (english_corpus.read_ids(args.output, name) for name in ("train", "held_out"))
    run.train(ids, held_out, args, lambda run: export(run, args.output, sources, command, args.eval_tokens))
    export(run, args.output, sources, command, FINAL_TOKENS)
    print((args.output / "model" / "README.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
