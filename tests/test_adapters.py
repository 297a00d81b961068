"""Adapters at run time: tokens as of the merged model, alone and together; loading and unloading while others run."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest
import torch
from conftest import assert_near, randomized, small_config, wait_until, write_text_checkpoint
from safetensors.torch import load_file, save_file
from test_lora import ALL, ATTENTION, delta, modules_of, write_adapter
from torch import nn

from qwen3fast import ChatSession, Generator, SamplingParams
from qwen3fast.checkpoint.lora.merge import merge_lora
from qwen3fast.engine import adapters as engine_adapters
from qwen3fast.kernels import cpu
from qwen3fast.kernels.cpu.decode_layers import DecodeLayersCall
from qwen3fast.kernels.cpu.decode_step import DecodeStepCall
from qwen3fast.model import Qwen3
from qwen3fast.quantization.convert import quantize_model
from qwen3fast.scheduling.worker import ClosedError

PROMPTS = [[1, 2, 3], [4, 5, 6, 7], list(range(40)), [9]]
# Other modules, ranks and scales each; "small" leaves a part of its slot empty.
KINDS = {
    "all": {"targets": ALL, "r": 4, "lora_alpha": 2},
    "small": {"targets": ["q_proj", "down_proj"], "r": 2, "lora_alpha": 3},
    "scaled": {"targets": ATTENTION, "r": 4, "lora_alpha": 3, "use_rslora": True},
}
OPTIONS = {"max_seq_len": 128, "max_batch_size": 4, "compile": False}

pytestmark = pytest.mark.usefixtures("one_thread")


def make_model(**changes) -> Qwen3:
    return randomized(small_config(**{"eos_token_ids": (), "tie_word_embeddings": False, **changes}))


def write(folder: Path, model: Qwen3, targets: list[str], r: int, **config) -> Path:
    write_adapter(folder, model, modules_of(model, targets), rank=r, r=r, **config)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """An adapter of each kind for the model of `make_model`."""
    root, model = tmp_path_factory.mktemp("adapters"), make_model()
    return {name: write(root / name, model, **kind) for name, kind in KINDS.items()}


@pytest.fixture(scope="module")
def expected(folders) -> dict[str | None, list[list[int]]]:
    """The replies to PROMPTS of each merged model, and of the base model."""
    replies = {}
    for name in (None, *folders):
        model = make_model()
        if name is not None:
            merge_lora(model, folders[name])
        with Generator(model, **OPTIONS) as generator:
            replies[name] = [result.token_ids for result in generator.generate(PROMPTS, greedy())]
    assert len({tuple(map(tuple, each)) for each in replies.values()}) == 4, "each adapter changes the replies"
    return replies


@pytest.fixture
def generator(folders):
    with Generator(make_model(), adapters=folders, max_adapters=4, **OPTIONS) as generator:
        yield generator


def greedy(adapter: str | None = None, max_tokens: int = 12, **more) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, adapter=adapter, **more)


def tokens(generator: Generator, adapter: str | None, **options) -> list[list[int]]:
    return [result.token_ids for result in generator.generate(PROMPTS, greedy(adapter), **options)]


@pytest.mark.parametrize("name", [None, *KINDS])
def test_an_adapter_gives_the_tokens_of_the_merged_model(generator, expected, name):
    assert [generator.generate(prompt, greedy(name)).token_ids for prompt in PROMPTS] == expected[name]
    assert tokens(generator, name) == tokens(generator, name, use_cache=False) == expected[name]


def test_rows_of_different_adapters_in_a_batch_do_not_change_each_other(generator, expected):
    for shift in range(4):
        names = [[None, *KINDS][(i + shift) % 4] for i in range(4)]
        together = generator.generate(PROMPTS, [greedy(name) for name in names])
        assert [r.token_ids for r in together] == [expected[name][i] for i, name in enumerate(names)]


def test_requests_that_come_and_go_keep_their_adapters(generator, expected):
    """More requests than slots, of different lengths: rows move, and free rows are filled while others run."""
    names = [[None, *KINDS][i % 4] for i in range(12)]
    lengths = [3 + 7 * i % 10 for i in range(12)]
    params = [greedy(name, length) for name, length in zip(names, lengths, strict=True)]
    together = generator.generate([PROMPTS[i % 3] for i in range(12)], params)
    for i, (result, name, length) in enumerate(zip(together, names, lengths, strict=True)):
        assert result.token_ids == expected[name][i % 3][:length]


def test_compiled_steps_give_the_same_and_compile_nothing_after_warmup(folders, expected):
    options = OPTIONS | {"compile": True, "max_batch_size": 2}
    with Generator(make_model(), adapters={"all": folders["all"]}, max_adapters=2, **options) as generator:
        generator.warmup()
        compiled = generator.stats.compilations
        generator.load_adapter("small", folders["small"])
        with torch.compiler.set_stance("fail_on_recompile"):
            for names in ((None, "all"), ("small", "all"), ("small", None), (None, None)):
                together = generator.generate(PROMPTS[1:3], [greedy(name) for name in names])
                assert [r.token_ids for r in together] == [expected[name][1 + i] for i, name in enumerate(names)]
            assert generator.generate(PROMPTS[0], greedy("all")).token_ids == expected["all"][0]
        assert generator.stats.compilations == compiled


def test_adapters_are_checked_as_the_weights_are(folders, tmp_path, tokenizer_folder):
    shutil.copytree(folders["small"], tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] = torch.nan
    save_file(tensors, file)
    bad, found = tmp_path / "adapter", r"adapter 'bad'(?s:.*)1 NaN and 0 infinite"
    checkpoint = write_text_checkpoint(tmp_path / "checkpoint", make_model(vocab_size=1024), tokenizer_folder)
    Generator.from_pretrained(checkpoint, adapters={"bad": bad}, **OPTIONS).close()
    with pytest.raises(ValueError, match=found):
        Generator.from_pretrained(checkpoint, adapters={"bad": bad}, check_weights=True, **OPTIONS)
    options = OPTIONS | {"max_adapters": 1, "max_adapter_rank": 4, "check_weights": True}
    with Generator.from_pretrained(checkpoint, **options) as generator:
        with pytest.raises(ValueError, match=found):
            generator.load_adapter("bad", bad)
        generator.load_adapter("good", folders["small"])


def test_prefixes_are_reused_by_the_same_adapter_only(generator, expected):
    prompt, reused = PROMPTS[2], []
    for name in (None, "all", "all", None, "small", "all"):
        result = generator.generate(prompt, greedy(name))
        assert result.token_ids == expected[name][2]
        reused.append(result.metrics.reused_tokens)
    assert reused == [0, 0, 40, 40, 0, 40]


def test_a_new_adapter_of_the_same_name_does_not_reuse_the_old_ones_keys_and_values(generator, folders, expected):
    assert generator.generate(PROMPTS[2], greedy("all")).token_ids == expected["all"][2]
    generator.unload_adapter("all")
    generator.load_adapter("all", folders["small"])
    result = generator.generate(PROMPTS[2], greedy("all"))
    assert (result.token_ids, result.metrics.reused_tokens) == (expected["small"][2], 0)


def test_steps_without_adapters_run_the_model_itself(generator, expected, monkeypatch):
    """They cost nothing more, whatever is loaded."""
    called = []
    real = engine_adapters.low_rank
    monkeypatch.setattr(engine_adapters, "low_rank", lambda *arguments: called.append(1) or real(*arguments))
    assert tokens(generator, None) == expected[None] and not called
    assert tokens(generator, "all") == expected["all"] and called
    model = generator.model
    assert not any(isinstance(module, engine_adapters.AdaptedLinear) for module in model.modules())
    with Generator(model, **OPTIONS) as plain:
        assert plain.debug.engine.adapters is None and plain.stats.adapter_bytes == 0


@pytest.mark.skipif(not cpu.load(), reason="no C++ operations on this machine")
@pytest.mark.parametrize("vocab_size", [96, 97], ids=["whole steps", "blocks alone"])
def test_in_bfloat16_steps_with_adapters_run_in_one_operation_as_others_do(vocab_size, tmp_path, monkeypatch):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "vocab_size": vocab_size}
    folder = write(tmp_path / "own", make_model(**sizes), ALL, 4, lora_alpha=8)
    options = OPTIONS | {"compile": "auto"}
    with Generator(make_model(**sizes).bfloat16(), **options) as plain:
        alone = tokens(plain, None)
    with Generator(make_model(**sizes).bfloat16(), adapters={"own": folder}, **options) as generator:
        assert generator.debug.engine.parts.decode_layers.runs_steps == (vocab_size == 96)
        slots, operation, step = [], DecodeLayersCall.__call__, DecodeStepCall.choose
        monkeypatch.setattr(
            DecodeLayersCall, "__call__", lambda self, *args: slots.append(args[4]) or operation(self, *args)
        )
        monkeypatch.setattr(
            DecodeStepCall, "choose", lambda self, *args: slots.append(self._adapters) or step(self, *args)
        )
        adapted = tokens(generator, "own")
        assert slots and None not in slots
        slots.clear()
        assert tokens(generator, None) == alone != adapted
        assert set(slots) == {None}


class Sum(nn.Module):
    """A layer's output and an adapter's product, written out."""

    def __init__(self, base: nn.Module, delta_NK: torch.Tensor) -> None:
        super().__init__()
        self.base, self.delta_NK = base, delta_NK

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.delta_NK.T.to(x.dtype)


@pytest.mark.parametrize("format", ["int8", "int4", "fp8"])
def test_over_quantized_weights_the_product_is_added_to_the_layers_output(tmp_path, format):
    def quantized() -> Qwen3:
        model = make_model(hidden_size=64, intermediate_size=96)
        quantize_model(model, format, torch.float32)
        return model

    base = make_model(hidden_size=64, intermediate_size=96)
    matrices = write_adapter(tmp_path, base, modules_of(base, ALL))
    plain = quantized()
    for name in modules_of(base, ALL):
        owner, _, last = name.rpartition(".")
        setattr(plain.get_submodule(owner), last, Sum(plain.get_submodule(name), delta(matrices, name, 2)))
    with Generator(quantized(), adapters={"own": tmp_path}, **OPTIONS) as generator:
        found_V = generator.debug.engine.logits_uncached(PROMPTS[2], 1)[0]
        assert_near(found_V, plain(torch.tensor([PROMPTS[2]]))[0, -1])
        for prompt in PROMPTS:
            reply, ids = generator.generate(prompt, greedy("own")).token_ids, list(prompt)
            for token in reply:
                assert token == int(plain(torch.tensor([ids]))[0, -1].argmax())
                ids.append(token)
        assert reply != generator.generate(PROMPTS[-1], greedy()).token_ids


def test_log_probabilities_and_scores_are_the_adapters_own(generator, folders):
    merged = make_model()
    merge_lora(merged, folders["all"])
    prompt, continuation = PROMPTS[2], [5, 6, 7]
    logprobs = merged(torch.tensor([prompt + continuation])).log_softmax(-1)[0]
    expected = [logprobs[len(prompt) - 1 + i, token].item() for i, token in enumerate(continuation)]
    score = generator.score(prompt, continuation, adapter="all")
    assert score.logprobs == pytest.approx(expected, abs=1e-4)
    assert generator.score(prompt, continuation).logprobs != pytest.approx(expected, abs=1e-2)
    result = generator.generate(prompt, greedy("all", 1, prompt_logprobs=0))
    assert result.prompt_logprobs[5].logprob == pytest.approx(logprobs[4, prompt[5]].item(), abs=1e-4)


@pytest.mark.filterwarnings("ignore:greedy decoding")
def test_conversations_use_the_adapter_of_their_parameters(tmp_path, tokenizer_folder):
    model = make_model(vocab_size=1024)
    folder = write(tmp_path / "own", model, ALL, 4, lora_alpha=8)
    checkpoint = write_text_checkpoint(tmp_path / "base", model, tokenizer_folder)
    options = {**OPTIONS, "device": "cpu", "max_seq_len": 256}
    params, messages = greedy(ignore_eos=True), [{"role": "user", "content": "Hello"}]
    with Generator.from_pretrained(checkpoint, adapter=folder, **options) as merged:
        expected = merged.chat(messages, params).token_ids
    with Generator.from_pretrained(checkpoint, adapters={"own": folder}, **options) as generator:
        base = generator.chat(messages, params)
        mine = greedy("own", ignore_eos=True)
        assert generator.chat(messages, mine).token_ids == expected != base.token_ids
        session = ChatSession(generator)
        assert session.send("Hello", params).token_ids == base.token_ids
        reply = session.send("Hello", mine)  # with an adapter, it reuses the prompt of the same adapter's chat at most
        assert reply.metrics.reused_tokens <= base.metrics.prompt_tokens
        assert "".join(chunk.text for chunk in generator.stream_chat(messages, mine)) == (
            generator.chat(messages, mine).text
        )


class Gate:
    """A logits_processor that changes nothing and waits until it is opened."""

    def __init__(self) -> None:
        self.is_waiting, self._open = threading.Event(), threading.Event()

    def __call__(self, logits_V: torch.Tensor, output_T: torch.Tensor) -> torch.Tensor:
        self.is_waiting.set()
        assert self._open.wait(60)
        return logits_V

    def open(self) -> None:
        self._open.set()


def test_unloading_lets_earlier_requests_finish_and_refuses_later_ones(generator, folders, expected):
    gate = Gate()
    running = generator.submit(PROMPTS[0], greedy("all", logits_processor=gate))
    waiting = [generator.submit(prompt, greedy("all")) for prompt in PROMPTS for _ in range(2)]  # more than slots
    not_begun = generator.stream(PROMPTS[0], greedy("all"))
    gate.is_waiting.wait(60)
    unloading = threading.Thread(target=generator.unload_adapter, args=["all"])
    unloading.start()
    wait_until(lambda: "all" not in generator.adapters)
    with pytest.raises(ValueError, match="adapter 'all' is not loaded; loaded: small, scaled"):
        generator.generate(PROMPTS[0], greedy("all"))
    with pytest.raises(ValueError, match="adapter 'all' is being loaded or unloaded"):
        generator.load_adapter("all", folders["all"])
    other = generator.submit(PROMPTS[1], greedy("small"))
    gate.open()
    unloading.join(60)
    assert not unloading.is_alive()
    assert running.is_done and all(handle.is_done for handle in waiting)
    assert running.result().token_ids == expected["all"][0]
    assert [h.result().token_ids for h in waiting[::2]] == [h.result().token_ids for h in waiting[1::2]]
    assert [h.result().token_ids for h in waiting[::2]] == expected["all"]
    assert other.result().token_ids == expected["small"][1]
    with pytest.raises(RuntimeError, match="adapter 'all' was unloaded before this request began"):
        next(not_begun)
    generator.load_adapter("again", folders["all"])
    assert tokens(generator, "again") == expected["all"] and tokens(generator, None) == expected[None]


def test_a_canceled_request_does_not_keep_its_adapter(generator):
    gate = Gate()
    handle = generator.submit(PROMPTS[0], greedy("all", logits_processor=gate))
    gate.is_waiting.wait(60)
    handle.cancel()
    unloading = threading.Thread(target=generator.unload_adapter, args=["all"])
    unloading.start()
    gate.open()
    unloading.join(60)
    assert not unloading.is_alive() and generator.adapters == ["small", "scaled"]


def test_adapters_are_loaded_while_others_run(folders, expected):
    with Generator(make_model(), max_adapters=2, max_adapter_rank=4, **OPTIONS) as generator:
        gate = Gate()
        running = generator.submit(PROMPTS[0], greedy(logits_processor=gate))
        gate.is_waiting.wait(60)
        loading = threading.Thread(target=generator.load_adapter, args=["all", folders["all"]])
        loading.start()
        gate.open()
        loading.join(60)
        assert tokens(generator, "all") == expected["all"]
        assert running.result().token_ids == expected[None][0]


def test_closing_ends_a_call_that_unloads(generator):
    gate, errors = Gate(), []
    generator.submit(PROMPTS[0], greedy("all", logits_processor=gate))
    gate.is_waiting.wait(60)

    def unload() -> None:
        try:
            generator.unload_adapter("all")
        except ClosedError as err:
            errors.append(err)

    threads = [threading.Thread(target=unload), threading.Thread(target=generator.close)]
    threads[0].start()
    wait_until(lambda: "all" not in generator.adapters)
    threads[1].start()
    gate.open()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    # Closed before or after the last request with the adapter ended.
    assert len(errors) <= 1


def test_an_unused_generator_may_still_be_forked(generator):
    assert generator.debug.worker.thread is None  # adapters given at the start are written without it


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x", r"adapter 'x' is not loaded; loaded: all, small, scaled"),
        ("", r"adapter must be the name of a loaded adapter, or None, got ''"),
        (5, r"adapter must be the name of a loaded adapter, or None, got 5"),
    ],
)
def test_an_unknown_adapter_is_refused_with_the_known_ones(generator, name, message):
    with pytest.raises(ValueError, match=message):
        generator.generate([1], SamplingParams(adapter=name))


def test_a_generator_without_room_says_how_to_get_it(folders):
    with Generator(make_model(), **OPTIONS) as generator:
        with pytest.raises(ValueError, match="has no room for adapters: build it with adapters="):
            generator.generate([1], greedy("all"))
        with pytest.raises(ValueError, match=r"max_adapters is 0.*\(max_adapters=1\)"):
            generator.load_adapter("all", folders["all"])


def test_loading_refuses_names_in_use_and_a_full_generator(generator, folders):
    with pytest.raises(ValueError, match="adapter 'all' is loaded already"):
        generator.load_adapter("all", folders["all"])
    generator.load_adapter("more", folders["small"])
    with pytest.raises(
        ValueError, match=r"no room for adapter 'fifth': max_adapters is 4, loaded: all, small, scaled, more"
    ):
        generator.load_adapter("fifth", folders["small"])
    for name in ("", 3, None):
        with pytest.raises(ValueError, match="an adapter's name must be a non-empty string"):
            generator.load_adapter(name, folders["small"])
    with pytest.raises(ValueError, match="adapter 'x' is not loaded"):
        generator.unload_adapter("x")


def test_loading_refuses_misfits_and_keeps_the_slot_free(generator, folders, tmp_path, expected):
    model, other = make_model(), make_model(hidden_size=64)
    misfits = {
        r"'bad'.*rank exceeds max_adapter_rank 4.*\n.*q_proj: rank 8": write(tmp_path / "a", model, ["q_proj"], 8),
        r"q_proj\.lora_A\.weight: shape \(4, 64\), expected \(4, 48\)": write(tmp_path / "b", other, ["q_proj"], 4),
        "use_dora=True is not supported": write(tmp_path / "c", model, ["q_proj"], 4, use_dora=True),
        "input_layernorm: in modules_to_save": write(
            tmp_path / "d", model, ["q_proj"], 4, modules_to_save=["input_layernorm"]
        ),
    }
    for message, folder in misfits.items():
        with pytest.raises(ValueError, match=message):
            generator.load_adapter("bad", folder)
    with pytest.raises(FileNotFoundError):
        generator.load_adapter("bad", tmp_path / "nowhere")
    generator.load_adapter("good", folders["all"])
    assert tokens(generator, "good") == expected["all"]


def test_options_are_checked_before_weights_are_read(tmp_path):
    with pytest.raises(ValueError, match="adapters must map names to folders or hub ids"):
        Generator.from_pretrained("tiny", adapters=["x"])
    with pytest.raises(ValueError, match=r"max_adapters must be an integer from 2 to 1024 \(adapters has 2\), got 1"):
        Generator.from_pretrained("tiny", adapters={"a": "x", "b": "y"}, max_adapters=1)
    with pytest.raises(ValueError, match="max_adapter_rank must be an integer from 1 to 1024, got 0"):
        Generator.from_pretrained("tiny", max_adapters=1, max_adapter_rank=0)
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json not found"):
        Generator.from_pretrained(tmp_path / "no model either", adapters={"a": tmp_path})
