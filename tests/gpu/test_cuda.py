"""On a GPU: the tokens of the CPU reference in float32, with and without graphs, in every bucket."""

import copy

import pytest
import torch
from conftest import assert_near, assert_same, random_ids, random_tensor, randomised, small_config
from published_layouts import AWQ, FP8, GPTQ, publish
from torch import nn

from qwen3fast import Generator, SamplingParams, load_model
from qwen3fast.engine import Engine
from qwen3fast.kernels import cuda
from qwen3fast.model.attention import attend, attend_last
from qwen3fast.model.kv_cache import StaticKVCache
from qwen3fast.quantization import quantize_model
from qwen3fast.quantization.formats import FORMATS, quantize
from qwen3fast.scheduling import Request, Scheduler

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

MAX_SEQ_LEN, ROWS = 600, 4
MODES = {"eager": (False, False), "compiled": (True, False), "graphs": (True, True)}


@pytest.fixture(scope="module", autouse=True)
def exact_products():
    """float32 products in float32, not in TensorFloat-32: tokens are to be compared."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(scope="module")
def model():
    return randomised(small_config(head_dim=32, hidden_size=64, max_position_embeddings=1024, eos_token_ids=()), seed=3)


@pytest.fixture(scope="module")
def cpu_generator(model):
    with Generator(model, max_seq_len=MAX_SEQ_LEN, max_batch_size=ROWS, compile=False) as generator:
        yield generator


@pytest.fixture(scope="module", params=MODES)
def cuda_generator(request, model):
    compile, graphs = MODES[request.param]
    twin = randomised(model.config, seed=3).to("cuda")
    sizes = {"max_seq_len": MAX_SEQ_LEN, "max_batch_size": ROWS}
    with Generator(twin, compile=compile, cuda_graphs=graphs, **sizes) as generator:
        yield generator
        assert not graphs or not generator.debug.engine.graphs.failure


def prompts():
    """Lengths on both sides of the chunks' and buckets' borders."""
    rng = torch.Generator().manual_seed(1)
    return [torch.randint(97, (n,), generator=rng).tolist() for n in (1, 31, 33, 127, 130, 255, 300, 520)]


SAMPLED = [SamplingParams(30.0, top_k, 0.9, seed=i, max_tokens=40) for i, top_k in enumerate((0, 20, 64, 65) * 2)]
GREEDY = [SamplingParams(temperature=0, max_tokens=40)] * 8


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_tokens_equal_those_of_the_cpu(cpu_generator, cuda_generator, params):
    expected = [r.token_ids for r in cpu_generator.generate(prompts(), params)]
    assert [r.token_ids for r in cuda_generator.generate(prompts(), params)] == expected
    alone = [cuda_generator.generate(p, s).token_ids for p, s in zip(prompts(), params, strict=True)]
    assert alone == expected
    assert cuda_generator.generate(prompts()[3], params[3], use_cache=False).token_ids == expected[3]


def test_every_bucket_is_recorded_and_right(model, cpu_generator):
    twin = randomised(model.config, seed=3).to("cuda")
    params = SamplingParams(temperature=0, max_tokens=3)
    with Generator(twin, max_seq_len=MAX_SEQ_LEN, max_batch_size=ROWS, compile=True) as generator:
        generator.warmup()
        engine = generator.debug.engine
        assert not engine.graphs.failure
        assert generator.stats.cuda_graphs == len(engine.cache.buckets) * len(engine.batch_buckets()) * 3
        compilations = generator.stats.compilations
        for bucket in engine.cache.buckets:
            for rows in range(1, ROWS + 1):
                texts = [[(7 * i + row) % 97 for i in range(min(bucket, MAX_SEQ_LEN - 8) - 4)] for row in range(rows)]
                expected = [r.token_ids for r in cpu_generator.generate(texts, params)]
                assert [r.token_ids for r in generator.generate(texts, params)] == expected, (bucket, rows)
        assert generator.stats.compilations == compilations


def test_steps_run_ahead_and_stop_tokens_are_never_passed(model):
    twin = randomised(model.config, seed=3).to("cuda")
    cache = StaticKVCache(twin.config, 2, MAX_SEQ_LEN, torch.float32, torch.device("cuda"))
    engine = Engine(twin, cache, torch.device("cuda"), compile=True)
    scheduler = Scheduler(engine)

    def run(stop_ids):
        request = Request([1, 2, 3], 30.0, 0, 1.0, 0.0, 7, 30, stop_ids)
        scheduler.add(request)
        while request.finish_reason is None:
            scheduler.step()
        return request.output_ids

    reply = run(frozenset())
    stop = next(token for i, token in enumerate(reply) if i >= 8 and token not in reply[:i])
    assert reply.index(stop) < 20
    assert run(frozenset([stop])) == reply[: reply.index(stop) + 1]
    assert scheduler.dropped_tokens == engine.lookahead
    assert not engine.graphs.failure
    engine.close()


def test_bfloat16_tokens_are_the_argmax_up_to_rounding():
    from qwen3fast.bench.measure import check_tokens

    config = small_config(head_dim=64, hidden_size=128, dtype=torch.bfloat16, eos_token_ids=())
    model = randomised(config).bfloat16().to("cuda")
    with Generator(model, max_seq_len=256, compile=True) as generator:
        prompt = list(range(90))
        reply = generator.generate(prompt, SamplingParams(temperature=0, max_tokens=40)).token_ids
    assert check_tokens(model, [prompt], [reply]).passed


@pytest.mark.parametrize("name", FORMATS)
def test_quantised_tokens_equal_those_of_the_rounded_weights(name):
    config = small_config(vocab_size=96, hidden_size=64, intermediate_size=96, head_dim=32, eos_token_ids=())
    rounded, quantised = randomised(config, seed=5), randomised(config, seed=5).to("cuda")
    format = FORMATS[name]
    with torch.no_grad():
        for module in rounded.modules():
            if isinstance(module, nn.Linear | nn.Embedding):  # a tied weight is on the grid already, the second time
                module.weight.copy_(format.dequantize(quantize(module.weight, format)))
    quantize_model(quantised, name, torch.float32)
    params = SamplingParams(temperature=0, max_tokens=30)
    texts = [[1, 2, 3], list(range(70))]
    with Generator(rounded, max_seq_len=128, max_batch_size=2, compile=False) as generator:
        expected = [r.token_ids for r in generator.generate(texts, params)]
    for compile, graphs in MODES.values():
        with Generator(quantised, max_seq_len=128, max_batch_size=2, compile=compile, cuda_graphs=graphs) as generator:
            assert [r.token_ids for r in generator.generate(texts, params)] == expected
            assert not graphs or not generator.debug.engine.graphs.failure


@pytest.mark.parametrize("name", FORMATS)
def test_tokens_of_quantised_experts_equal_those_of_the_plain_form(name, monkeypatch):
    monkeypatch.setattr("qwen3fast.kernels.cpu.is_loaded", lambda: False)  # on the CPU, the form in PyTorch
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "eos_token_ids": ()}
    plain = randomised(
        small_config(vocab_size=96, hidden_size=64, intermediate_size=96, head_dim=32, **experts), seed=5
    )
    quantize_model(plain, name, torch.float32)
    quantised = copy.deepcopy(plain).to("cuda")
    params = SamplingParams(temperature=0, max_tokens=30)
    texts = [[1, 2, 3], list(range(70))]
    with Generator(plain, max_seq_len=128, max_batch_size=2, compile=False) as generator:
        expected = [r.token_ids for r in generator.generate(texts, params)]
    for compile, graphs in MODES.values():
        with Generator(quantised, max_seq_len=128, max_batch_size=2, compile=compile, cuda_graphs=graphs) as generator:
            assert [r.token_ids for r in generator.generate(texts, params)] == expected
            assert not graphs or not generator.debug.engine.graphs.failure


@pytest.mark.parametrize("cache_dtype", ["auto", "int8"])
@pytest.mark.parametrize("attention", ["flex", "split"])
def test_other_attention_gives_the_tokens_of_pytorchs(model, attention, cache_dtype, monkeypatch):
    assert attention != "split" or cuda.load(), "without Triton, PyTorch's would be compared with itself"
    twin = randomised(model.config, seed=3).to("cuda")
    sizes = {"max_seq_len": MAX_SEQ_LEN, "max_batch_size": ROWS, "kv_cache_dtype": cache_dtype}
    replies = []
    for decode_attention in ("sdpa", attention):
        monkeypatch.setattr(cuda, "decode_attention", decode_attention)
        with Generator(twin, compile=True, **sizes) as generator:
            replies.append([r.token_ids for r in generator.generate(prompts(), GREEDY)])
            assert not generator.debug.engine.graphs.failure
    assert replies[0] == replies[1]


@pytest.mark.parametrize(("tokens", "length"), [(1, 1), (32, 32), (32, 96), (33, 1000), (512, 1536)])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (16, 8), (8, 1)])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_flash_attention_over_the_last_positions_equals_the_masked_form(tokens, length, heads, kv_heads, head_dim):
    q_BTHD = random_tensor(1, tokens, heads, head_dim).bfloat16().to("cuda")
    k, v = (random_tensor(1, kv_heads, length, head_dim, seed=s).bfloat16().to("cuda") for s in (1, 2))
    assert cuda.can_flash_attention(q_BTHD)
    mask_BTL = torch.arange(length) <= torch.arange(length - tokens, length)[None, :, None]
    expected = attend(q_BTHD.float(), k.float(), v.float(), mask_BTL.to("cuda"))
    assert_near(attend_last(q_BTHD, k, v), expected, torch.bfloat16)


@pytest.mark.parametrize("compile", [False, True])
def test_prefill_in_bfloat16_equals_the_plain_model(compile):
    """In chunks, the later ones over what is in the cache already."""
    sizes = {"head_dim": 64, "hidden_size": 128, "max_position_embeddings": 2048}
    model = randomised(small_config(**sizes, dtype=torch.bfloat16), seed=3)
    ids = random_ids(1, 1100)
    with Generator(copy.deepcopy(model).bfloat16().to("cuda"), max_seq_len=1300, compile=compile) as generator:
        logits_1V = generator.debug.engine.prefill_whole(0, ids[0].tolist())
    assert_near(logits_1V.cpu(), model(ids)[:, -1], torch.bfloat16)


@pytest.mark.parametrize("layout", [FP8, AWQ, GPTQ], ids=lambda layout: layout["quant_method"])
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_published_weights_are_those_of_the_cpu(tmp_path, layout, quantization):
    publish(tmp_path, small_config(vocab_size=96, hidden_size=128, intermediate_size=256, head_dim=32), layout)
    loaded = {device: load_model(tmp_path, device, quantization=quantization) for device in ("cpu", "cuda")}
    expected = dict(loaded["cpu"].named_parameters())
    for name, parameter in loaded["cuda"].named_parameters():
        assert parameter.device.type == "cuda"
        assert_same(parameter.cpu(), expected[name])
