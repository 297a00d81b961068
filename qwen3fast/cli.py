"""The command line: `python -m qwen3fast generate|chat|bench|info`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from qwen3fast._version import __version__
from qwen3fast.bench.__main__ import main as bench_main
from qwen3fast.checkpoint import empty_model, read_checkpoint_config, read_config, resolve_source
from qwen3fast.engine.compile import CompileMode
from qwen3fast.generator import Generator
from qwen3fast.model import Qwen3, build_on_meta
from qwen3fast.model.kv_cache import CACHE_DTYPES
from qwen3fast.quantization import DEQUANTIZE, formats_of, plain_modules, quantize_model
from qwen3fast.quantization.formats import FORMATS
from qwen3fast.sampling_params import SamplingParams
from qwen3fast.text.tokenizer import Message

COMPILE_MODES: dict[str, CompileMode] = {"auto": "auto", "always": True, "never": False}
MODEL_HELP = "hub id (Qwen/Qwen3-0.6B), local folder or .gguf file, 'tiny' (shipped), or 'random:0.6b' (random weights)"


QUANTIZATION_HELP = "round the weights while loading; dequantize: plain weights of a checkpoint that others quantised"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit status: 0, 1 (failed, with a message), 2 (bad options), 130 (Ctrl-C)."""
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, FileNotFoundError, MemoryError, FloatingPointError, RuntimeError, ImportError) as err:
        print(f"qwen3fast: error: {err}", file=sys.stderr)
        return 2 if isinstance(err, ValueError | FileNotFoundError) else 1
    except KeyboardInterrupt:
        return 130


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each sets `run`."""
    parser = argparse.ArgumentParser(prog="qwen3fast", description="Run Qwen3 models fast, in plain PyTorch.")
    parser.add_argument("--version", action="version", version=f"qwen3fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="generate|chat|bench|info")

    generate = commands.add_parser("generate", help="answer one prompt, streamed to standard output")
    generate.add_argument("prompt", help="a question (sent through the chat template), or any text with --raw")
    generate.add_argument("--raw", action="store_true", help="continue the text as it is, without a chat template")
    generate.add_argument("--stats", action="store_true", help="print speed to standard error at the end")
    _add_model_arguments(generate)
    _add_sampling_arguments(generate)
    generate.set_defaults(run=_generate)

    chat = commands.add_parser("chat", help="talk to a model; /reset forgets the conversation, /exit leaves")
    chat.add_argument("--system", help="system message at the start of the conversation")
    _add_model_arguments(chat)
    _add_sampling_arguments(chat)
    chat.set_defaults(run=_chat)

    # Its options are those of `python -m qwen3fast.bench`, which also answers --help: no word is an option here.
    text = "tokens per second with and without the KV cache, and more: see bench --help"
    bench = commands.add_parser("bench", help=text, add_help=False, prefix_chars="\0")
    bench.add_argument("options", nargs="*")
    bench.set_defaults(run=_bench)

    info = commands.add_parser("info", help="what a model is: sizes, memory for weights and KV cache")
    info.add_argument("--model", default="tiny", help=MODEL_HELP)
    info.add_argument("--revision", help="branch, tag or commit of a hub id")
    info.add_argument("--quantization", choices=list(FORMATS), help="as if the weights were rounded while loading")
    info.set_defaults(run=_info)
    return parser


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--model", default="tiny", help=MODEL_HELP + " [%(default)s]")
    group.add_argument("--revision", help="branch, tag or commit of a hub id")
    group.add_argument("--device", default="auto", help="auto, cpu or cuda [%(default)s]")
    group.add_argument("--dtype", default="auto", help="auto, bfloat16, float16, float32 [%(default)s]")
    group.add_argument("--quantization", choices=[*FORMATS, DEQUANTIZE], help=QUANTIZATION_HELP)
    group.add_argument("--max-seq-len", type=int, help="prompt and reply together, tokens [4096 or the model's most]")
    group.add_argument("--kv-cache-dtype", choices=CACHE_DTYPES, default="auto", help="int8 halves it [%(default)s]")
    group.add_argument("--check-weights", action="store_true", help="refuse NaN and infinity (reads all weights once)")
    group.add_argument("--threads", type=int, help="CPU threads [one a core]")
    group.add_argument(
        "--compile",
        choices=list(COMPILE_MODES),
        default="auto",
        help="auto: while it answers; always: first; never [%(default)s]",
    )


def _add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling (unset values come from the checkpoint)")
    group.add_argument("--temperature", type=float, help="0 is greedy")
    group.add_argument("--top-k", type=int, help="keep the k likeliest tokens; 0 keeps all")
    group.add_argument("--top-p", type=float, help="keep the smallest set of this probability")
    group.add_argument("--min-p", type=float, help="keep tokens this likely, relative to the likeliest")
    group.add_argument("--max-tokens", type=int, help="new tokens at most [what fits the context]")
    group.add_argument("--stop", action="append", default=[], help="end before this text; may be given again")
    group.add_argument("--seed", type=int, help="same seed, same reply")
    group.add_argument("--think", action="store_true", help="let the model think before it answers")


def _open(args: argparse.Namespace) -> Generator:
    max_seq_len = args.max_seq_len
    if max_seq_len is None:
        max_seq_len = min(4096, read_config(args.model, args.revision).longest_context)
    generator = Generator.from_pretrained(
        args.model,
        revision=args.revision,
        device=args.device,
        dtype=args.dtype,
        quantization=args.quantization,
        max_seq_len=max_seq_len,
        kv_cache_dtype=args.kv_cache_dtype,
        compile=COMPILE_MODES[args.compile],
        threads=args.threads,
        check_weights=args.check_weights,
        progress=sys.stderr.isatty() and os.environ.get("RANK", "0") == "0",
        tensor_parallel=_num_processes() > 1,
    )
    if args.compile == "always":
        generator.warmup(progress=sys.stderr.isatty())
    return generator


def _num_processes() -> int:
    """Those that torchrun has started, or 1."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _params(args: argparse.Namespace) -> SamplingParams:
    return SamplingParams(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        max_tokens=args.max_tokens,
        stop=tuple(args.stop),
        seed=args.seed,
    )


def _generate(args: argparse.Namespace) -> int:
    params = _params(args)
    with _open(args) as generator:
        has_template = generator.tokenizer is not None and generator.tokenizer.chat_template is not None
        if args.raw or not has_template:
            chunks = generator.stream(args.prompt, params)
        else:
            messages = [{"role": "user", "content": args.prompt}]
            chunks = generator.stream_chat(messages, params, enable_thinking=args.think)
        for chunk in chunks:
            print(chunk.text, end="", flush=True)
            result = chunk.result
        print()
        if args.stats and result is not None:
            m = result.metrics
            print(
                f"{m.prompt_tokens} prompt tokens, first token after {m.time_to_first_token_s:.2f} s; "
                f"{m.new_tokens} new tokens, {m.decode_tok_s:.1f} tokens/s; ended by {result.finish_reason}",
                file=sys.stderr,
            )
    return 0


def _chat(args: argparse.Namespace) -> int:
    params = _params(args)
    start: list[Message] = [{"role": "system", "content": args.system}] if args.system else []
    messages = list(start)
    with _open(args) as generator:
        print(f"{args.model}: /reset forgets the conversation, /exit leaves", file=sys.stderr)
        while True:
            try:
                line = input("> " if sys.stdin.isatty() else "").strip()
            except EOFError:
                return 0
            if line == "/exit":
                return 0
            if line == "/reset":
                messages = list(start)
                print("(conversation forgotten)", file=sys.stderr)
            elif line.startswith("/"):
                print("commands: /reset, /exit", file=sys.stderr)
            elif line:
                reply = _reply(generator, [*messages, {"role": "user", "content": line}], params, args.think)
                if reply is not None:
                    messages += [{"role": "user", "content": line}, {"role": "assistant", "content": reply}]


def _reply(generator: Generator, messages: list[Message], params: SamplingParams, think: bool) -> str | None:
    """Stream one reply. Returns its text, or None if it failed or was interrupted (the turn is then forgotten)."""
    text = ""
    try:
        for chunk in generator.stream_chat(messages, params, enable_thinking=think):
            print(chunk.text, end="", flush=True)
            text += chunk.text
        print()
        return text
    except KeyboardInterrupt:
        print("\n(interrupted; this turn is forgotten)", file=sys.stderr)
    except ValueError as err:
        print(f"(cannot reply: {err})", file=sys.stderr)
    return None


def _bench(args: argparse.Namespace) -> int:
    if _num_processes() > 1:
        raise ValueError("bench measures one process; start it without torchrun")
    return bench_main(args.options)


def _info(args: argparse.Namespace) -> int:
    prequantized = None
    if args.model.startswith("random:"):
        model = build_on_meta(read_config(args.model))
    else:
        source = resolve_source(args.model, args.revision)
        prequantized, model = read_checkpoint_config(source).prequantized, empty_model(source)
    if args.quantization is not None and not formats_of(model):
        quantize_model(model, args.quantization, model.config.dtype)
    config = model.config
    kv_bytes = config.kv_bytes_per_token(config.dtype)
    rows: dict[str, object] = {
        "parameters": f"{config.num_parameters:,}",
        "weights": f"{model.num_bytes():,} bytes in {_formats(model)}",
        "read per decoded token": f"{model.num_bytes(per_token=True) / 1e9:.3f} GB of weights",
        "KV cache": f"{kv_bytes / 1024:g} KiB a token; {kv_bytes * 4096 / 1e9:.3f} GB for 4,096",
        "layers": config.num_hidden_layers,
        "hidden / intermediate size": f"{config.hidden_size} / {config.intermediate_size}",
        "heads": f"{config.num_attention_heads} query, {config.num_key_value_heads} key/value, of {config.head_dim}",
        "vocabulary": f"{config.vocab_size:,}" + (" (embedding tied)" if config.tie_word_embeddings else ""),
        "longest context": f"{config.longest_context:,}",
        "RoPE theta": f"{config.rope_theta:g}" + (f", YaRN factor {config.yarn.factor:g}" if config.yarn else ""),
    }
    if prequantized is not None:
        rows["stored in"] = prequantized.describe()
    if config.num_experts:
        rows["parameters"] = f"{rows['parameters']}, of which a token runs {config.decode_parameters:,}"
        rows["experts"] = (
            f"{config.num_experts}, {config.num_experts_per_tok} a token, of {config.moe_intermediate_size}"
        )
    print(args.model)
    for name, value in rows.items():
        print(f"  {name:27} {value}")
    return 0


def _formats(model: Qwen3) -> str:
    """Return the names of the formats and dtypes that the linear layers and the embedding are stored in."""
    plain = {str(model.get_submodule(name).weight.dtype).removeprefix("torch.") for name in plain_modules(model)}
    return ", ".join([*formats_of(model), *sorted(plain)])
