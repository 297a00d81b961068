"""Products by tiles against PyTorch's. Where there is no AMX, the same code runs with tiles in plain C++."""

import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_near, random_tensor

from qwen3fast.kernels import cpu
from qwen3fast.kernels.cpu import building, levels, library, tiles
from qwen3fast.kernels.cpu.ops import dequantized_linear
from qwen3fast.kernels.cpu.structures import LinearPointers, Tiles, bfloat16_scales, has_int8_tiles, packed_linear
from qwen3fast.model.kv_cache import quantize_vectors
from qwen3fast.quantization.formats import FORMATS, SAVED_FORMATS, SHORT_NL4, quantize
from qwen3fast.quantization.uint4 import Layout

pytestmark = pytest.mark.skipif(not cpu.load(), reason="no compiler for the C++ operations on this machine")

ZERO_POINTS = FORMATS["uint4"].with_layout(lambda K: Layout(K, has_zero=True))
PACKED = [*SAVED_FORMATS.values(), SHORT_NL4, ZERO_POINTS, FORMATS["fp8"].with_blocks()]
NAMES = [*SAVED_FORMATS, "short nl4", "zero points", "fp8 blocks"]
IN_FEWER_BITS = ("int4", "uint4", "int6", "uint5", "nl4", "short nl4", "zero points")
ROWS = [1, 15, 16, 17, 31, 32, 33, 48, 49, 64, 70]


def plain(weight_NK):
    return LinearPointers(weight_NK.data_ptr(), None, *weight_NK.shape, 16, 0, 0)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("format", PACKED, ids=NAMES)
def test_packed_weights(format, rows):
    K = max(160, format.multiple)
    weights = [format.operands(quantize(random_tensor(n, K, seed=n), format)) for n in (48, 16, 64)]
    x = random_tensor(rows, K).bfloat16()
    y = tiles.tile_linear(x, [packed_linear(*weight) for weight in weights])
    expected = torch.cat([dequantized_linear(x, *weight).float() for weight in weights], dim=-1)
    assert_near(y, expected, torch.bfloat16)


def test_scales_of_6_bits_are_read():
    weight = quantize(random_tensor(48, 512), FORMATS["uint4"].with_layout(lambda _: Layout(256, is_short=True)))
    x = random_tensor(33, 512).bfloat16()
    y = tiles.tile_linear(x, [packed_linear(*weight)])
    assert_near(y, dequantized_linear(x, *weight).float(), torch.bfloat16)


MIXED = [("int8", 48), ("int4", 16), ("bf16", 80), ("fp8", 272), ("int4", 304), ("bf16", 16), ("int8", 560)]


@pytest.mark.parametrize("kind", [Tiles.BFLOAT16, Tiles.INT8])
@pytest.mark.parametrize("rows", [5, 40])
def test_many_weights_side_by_side_equal_each_one_alone(rows, kind, monkeypatch):
    """One thread multiplies up to eight panels of 32 columns at a time, of which some have 16."""
    kept, all_blocks = [], []
    for n, (name, columns) in enumerate(MIXED):
        weight, count = random_tensor(columns, 192, seed=n), columns // 16
        kept.append([weight.bfloat16()] if name == "bf16" else FORMATS[name].operands(quantize(weight, FORMATS[name])))
        all_blocks += zip(*(tensor.chunk(count) for tensor in kept[n]), strict=True)  # of 16 rows
    x = random_tensor(rows, 192).bfloat16()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    together, *alone = (
        tiles.tile_linear(x, [plain(*w) if len(w) == 1 else packed_linear(*w) for w in weights], kind)
        for weights in (kept, *([block] for block in all_blocks))
    )
    assert torch.equal(together, torch.cat(alone, dim=-1))


def test_more_rows_than_are_kept_in_tiles_at_a_time():
    x, weight = random_tensor(4096 + 19, 64).bfloat16(), random_tensor(48, 64)
    packed = quantize(weight, FORMATS["int8"])
    y = tiles.tile_linear(x, [plain(weight := weight.bfloat16())])
    assert_near(y, F.linear(x.float(), weight.float()), torch.bfloat16)
    for run in (torch.ops.qwen3fast.linear, lambda x, _: tiles.tile_linear(x, [packed_linear(*packed)], Tiles.INT8)):
        assert torch.equal(run(x, weight), torch.cat([run(part, weight) for part in x.split(4096)]))
    y = torch.ops.qwen3fast.quantized_linear(x, [packed[0]], [packed[1]])
    parts = [torch.ops.qwen3fast.quantized_linear(part, [packed[0]], [packed[1]]) for part in x.split(4096)]
    assert torch.equal(y, torch.cat(parts))


@pytest.mark.parametrize("rows", ROWS)
def test_weights_in_bfloat16(rows):
    weights = [random_tensor(n, 160, seed=n).bfloat16() for n in (16, 80)]
    x = random_tensor(rows, 160).bfloat16()
    y = tiles.tile_linear(x, [plain(weight) for weight in weights])
    assert_near(y, torch.cat([F.linear(x.float(), weight.float()) for weight in weights], dim=-1), torch.bfloat16)


def assert_rounded(actual, expected):
    """Check that bfloat16 numbers equal float64 numbers up to rounding, of the sums to float32 as well."""
    torch.testing.assert_close(actual.double(), expected, rtol=2**-8, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("rows", [2, *ROWS])
@pytest.mark.parametrize("K", [64, 192, 256, 320, 1088])
def test_int8_tiles_scale_x_by_spans_of_256_channels(rows, K):
    weights = [quantize(random_tensor(n, K, seed=n), FORMATS["int8"]) for n in (48, 16, 64)]
    levels = random_tensor(rows, K).mul(40).round().clamp(-126, 126)
    levels[:, 17::256] = 127.0  # the largest of each span, so that all numbers are exact in int8
    scales = 2.0 ** torch.arange(rows * 5).reshape(rows, 5).remainder(7)
    x = (levels * scales.repeat_interleave(256, dim=1)[:, :K]).bfloat16()
    y = tiles.tile_linear(x, [packed_linear(*weight) for weight in weights], Tiles.INT8)
    exact = [x.double() @ FORMATS["int8"].dequantize(weight).double().T for weight in weights]
    assert_rounded(y, torch.cat(exact, dim=-1))


@pytest.mark.parametrize("rows", [1, 16, 33])
def test_int8_tiles_round_x_to_the_nearest_level(rows):
    weight, x = quantize(random_tensor(48, 1088), FORMATS["int8"]), random_tensor(rows, 1088).bfloat16()
    y = tiles.tile_linear(x, [packed_linear(*weight)], Tiles.INT8)
    assert_near(y, dequantized_linear(x, *weight).float(), torch.bfloat16)


def test_int8_tiles_give_the_results_of_other_operations_where_all_groups_have_one_scale():
    weights = [quantize(random_tensor(n, 576, seed=n), FORMATS["int8"]) for n in (48, 64)]
    x = random_tensor(37, 576).bfloat16()
    x[:, ::32] = 8.0  # the largest of each group
    y = tiles.tile_linear(x, [packed_linear(*weight) for weight in weights], Tiles.INT8)
    packed, scale = ([weight[i] for weight in weights] for i in (0, 1))
    expected = torch.ops.qwen3fast.quantized_linear(x, packed, scale).double()
    torch.testing.assert_close(y.double(), expected, rtol=2**-7, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("level", [0, 255])
@pytest.mark.parametrize("number", [-3.0, 0.0, 1e30])
def test_int8_tiles_with_the_largest_levels(level, number):
    N, K, rows = 32, 1280, 33
    packed, scale = torch.full((N // 16, K // 4, 16, 4), level, dtype=torch.uint8), torch.rand(N)
    x = torch.full((rows, K), number).bfloat16()
    y = tiles.tile_linear(x, [packed_linear(packed, scale)], Tiles.INT8)
    assert_rounded(y, (x.double().sum(dim=-1, keepdim=True) * (level - 128) * scale.double()))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_int8_tiles_keep_what_is_not_finite_in_its_row(number):
    weight = quantize(random_tensor(32, 320), FORMATS["int8"])
    x = random_tensor(37, 320).bfloat16()
    expected = tiles.tile_linear(x, [packed_linear(*weight)], Tiles.INT8)
    x[3, 300] = x[36, 5] = number
    y = tiles.tile_linear(x, [packed_linear(*weight)], Tiles.INT8)
    is_odd = torch.ops.qwen3fast.quantized_linear(x, [weight[0]], [weight[1]]).isnan()
    assert is_odd[3].all() and is_odd[36].all() and torch.equal(y.isnan(), is_odd)
    assert torch.equal(y[~is_odd], expected[~is_odd])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_int8_tiles_beside_weights_that_are_multiplied_in_bfloat16(threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    names = ["int4", "int8", "fp8", "int8"]
    linears, kept = [], []
    for n, name in enumerate(names):
        kept.append(FORMATS[name].operands(quantize(random_tensor(48, 192, seed=n), FORMATS[name])))
        linears.append(packed_linear(*kept[n]))
    x = random_tensor(40, 192).bfloat16()
    together = tiles.tile_linear(x, linears, Tiles.INT8).split(48, dim=-1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    for name, linear, y in zip(names, linears, together, strict=True):
        assert has_int8_tiles(linear) == (name in ("int4", "int8"))
        int8, plain = (tiles.tile_linear(x, [linear], kind) for kind in (Tiles.INT8, Tiles.BFLOAT16))
        assert torch.equal(y, int8) and torch.equal(int8, plain) != has_int8_tiles(linear)


FEWER_BITS = [(name, format) for name, format in zip(NAMES, PACKED, strict=True) if name in IN_FEWER_BITS]


@pytest.mark.parametrize("format", [format for _, format in FEWER_BITS], ids=[name for name, _ in FEWER_BITS])
def test_weights_in_fewer_bits_are_quantized_to_int8_for_int8_tiles(format):
    K = 1280 if format.multiple > 64 else 1344  # the last span is shorter
    loud = torch.linspace(0.1, 3, K // 32).repeat_interleave(32).roll(100)
    packed = quantize(random_tensor(48, K, seed=1) * loud, format)
    weight, linear = format.dequantize(packed), packed_linear(*format.operands(packed))
    x = torch.eye(K).bfloat16()  # each result is one weight
    y = tiles.tile_linear(x, [linear], Tiles.INT8).float().T
    for start in range(0, K, 256):
        span = slice(start, start + 256)
        most = weight[:, span].abs().amax(dim=1, keepdim=True)
        levels = (y[:, span] - weight[:, span]).abs() / most * 127
        assert levels.max() < (3.5 if format.name.startswith("uint") else 1.5)
        assert levels.square().mean().sqrt() < (1.0 if format.name.startswith("uint") else 0.45)
    assert_near(tiles.tile_linear(x, [linear]), weight.T, torch.bfloat16)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_scales_that_are_not_finite_stay_in_their_row_of_int8_tiles(number):
    packed, scale = FORMATS["int4"].operands(quantize(random_tensor(32, 320), FORMATS["int4"]))
    scale = bfloat16_scales(scale)
    scale[1, 3, 5] = number
    y = tiles.tile_linear(random_tensor(33, 320).bfloat16(), [packed_linear(packed, scale)], Tiles.INT8)
    assert not y[:, 21].isfinite().any() and y[:, :21].isfinite().all() and y[:, 22:].isfinite().all()


def test_int8_tiles_leave_other_numbers_of_channels_to_bfloat16():
    weight, x = quantize(random_tensor(32, 160), FORMATS["int8"]), random_tensor(33, 160).bfloat16()
    linear = packed_linear(*weight)
    assert not has_int8_tiles(linear)
    assert torch.equal(*(tiles.tile_linear(x, [linear], kind) for kind in (Tiles.INT8, Tiles.BFLOAT16)))


@pytest.mark.parametrize("kind", [Tiles.BFLOAT16, Tiles.INT8])
@pytest.mark.parametrize("format", [None, *PACKED], ids=["bfloat16", *NAMES])
def test_a_row_does_not_depend_on_the_rows_beside_it(format, kind):
    K = 64 if format is None else max(64, format.multiple)
    weight = random_tensor(32, K, seed=1)
    weight = weight.bfloat16() if format is None else format.operands(quantize(weight, format))
    linear = plain(weight) if format is None else packed_linear(*weight)
    x = random_tensor(70, K).bfloat16()
    whole = tiles.tile_linear(x, [linear], kind)
    for rows in (slice(0, 1), slice(3, 20), slice(16, 70)):
        assert torch.equal(tiles.tile_linear(x[rows], [linear], kind), whole[rows])


def test_not_a_number_stays_in_its_row():
    x = random_tensor(20, 64).bfloat16()
    x[3, 5] = float("nan")
    y = tiles.tile_linear(x, [packed_linear(*quantize(random_tensor(32, 64), FORMATS["int8"]))])
    assert y[3].isnan().all() and not y[:3].isnan().any() and not y[4:].isnan().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize(("tokens", "first"), [(1, 0), (7, 90), (40, 0), (70, 3), (150, 0)])
@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (8, 1)])
def test_attention_of_prefill(heads, tokens, first, dtype, monkeypatch):
    monkeypatch.setattr(tiles, "_are_usable", True)
    (H, K), D, S = heads, 64, 160
    q = random_tensor(1, tokens, H, D).bfloat16()
    k, v = (random_tensor(2, K, S, D, seed=s).bfloat16() for s in (1, 2))
    k[:, :, first + tokens :] = v[:, :, first + tokens :] = float("nan")  # unused positions
    (keys, k_scale), (values, v_scale) = (
        ((k, None), (v, None)) if dtype == torch.bfloat16 else map(quantize_vectors, (k, v))
    )
    position = torch.arange(first, first + tokens)[None]
    y = torch.ops.qwen3fast.prefill_attention(
        q, keys, values, position, torch.tensor([1]), k_scale, v_scale, [], [0] * 3
    )
    used = first + tokens
    k, v = (
        (x if s is None else x * s[..., None])[1:, :, :used].float() for x, s in ((keys, k_scale), (values, v_scale))
    )
    mask = torch.arange(used) <= position[0, :, None]
    expected = F.scaled_dot_product_attention(q.transpose(1, 2).float(), k, v, attn_mask=mask, enable_gqa=True)
    assert_near(y, expected.transpose(1, 2), torch.bfloat16)


@pytest.mark.parametrize(("N", "K"), [(16, 48), (24, 64)])
def test_sizes_that_are_not_served_are_refused(N, K):
    with pytest.raises(ValueError, match="K must be a multiple of 32, N of 16"):
        tiles.tile_linear(random_tensor(4, K).bfloat16(), [plain(random_tensor(N, K).bfloat16())])


@pytest.mark.parametrize("is_right", [True, False])
def test_tiles_that_are_announced_are_used_only_after_a_trial(is_right, monkeypatch):
    fake = SimpleNamespace(qwen3fast_try_tiles=lambda: is_right)
    monkeypatch.setattr(tiles, "are_announced", lambda: True)
    monkeypatch.setattr(tiles, "functions", lambda: fake)
    for name in ("_are_usable", "_are_refused"):
        monkeypatch.setattr(tiles, name, False)  # restored afterwards
    tiles.try_tiles()
    assert tiles.are_usable() is is_right


@pytest.mark.parametrize(("pin", "expected"), [("", True), ("amx", True), ("native", True), ("avx512", False)])
def test_tiles_are_not_announced_where_another_level_is_pinned(pin, expected, monkeypatch):
    amx = next(level for level in levels.LEVELS if level.name == "amx")
    monkeypatch.setattr(tiles, "processor_features", lambda: " ".join(amx.needs))
    monkeypatch.setattr(library, "this_machine", lambda: levels.LEVELS[:2])
    monkeypatch.setattr(library, "pinned_level", lambda name: next(x for x in levels.LEVELS if x.name == name))
    monkeypatch.setenv(library.PIN, pin)
    assert tiles.are_announced() == expected


@pytest.mark.skipif(tiles.are_announced(), reason="this processor has tiles")
def test_the_trial_fails_where_there_are_no_tiles():
    assert cpu.library.functions().qwen3fast_try_tiles() is False


@pytest.fixture(scope="module")
def amx_object(tmp_path_factory):
    """tiles.cpp compiled for AMX: the compiler, and the path."""
    [amx] = [level for level in levels.LEVELS if level.name == "amx"]
    compiler = building.find_compiler()
    if not compiler or building.target_machine(compiler) != amx.machine:
        pytest.skip("no compiler, or one for another kind of machine")
    path = tmp_path_factory.mktemp("amx") / "tiles.o"
    source = building.FOLDER / "tiles.cpp"
    subprocess.run([*compiler, *building.FLAGS, *amx.flags, "-O1", "-c", str(source), "-o", str(path)], check=True)
    return compiler, path


@pytest.mark.skipif(not shutil.which("objdump"), reason="no objdump")
def test_the_level_of_amx_multiplies_by_its_instructions(amx_object):
    code = subprocess.run(["objdump", "-d", amx_object[1]], capture_output=True, text=True, check=True).stdout
    assert {"ldtilecfg", "tileloadd", "tdpbf16ps", "tdpbsud", "tilestored", "tilerelease"} <= set(code.split())


# The child calls signal() before its first tile instruction, which the emulator of tools/ handles unless it "dies".
TRIAL = """
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>
#include <cerrno>
#include <cstdio>
#include <string>
extern "C" bool qwen3fast_try_tiles();
std::string how;
extern "C" long syscall(long, ...) noexcept { return 0; }  // the permission is given
extern "C" sighandler_t signal(int number, sighandler_t) noexcept {
  if (prctl(PR_GET_DUMPABLE) != 0) _exit(2);
  while (how == "hangs") pause();
  struct sigaction action = {};
  if (how == "dies") sigaction(number, &action, nullptr);
  return nullptr;
}
extern "C" int poll(pollfd* files, nfds_t count, int timeout_ms) {
  const timespec timeout{0, timeout_ms * (how == "hangs" ? 10'000L : 1'000'000L)};
  return ppoll(files, count, &timeout, nullptr);
}
int main(int, char** arguments) {
  how = arguments[1];
  struct sigaction action = {};
  action.sa_handler = [](int) {};
  sigaction(SIGALRM, &action, nullptr);
  const itimerval timer{{0, 5000}, {0, 5000}};
  if (how == "is interrupted") setitimer(ITIMER_REAL, &timer, nullptr);
  action.sa_handler = SIG_IGN;
  if (how == "ignores children") sigaction(SIGCHLD, &action, nullptr);
  const bool are_used = qwen3fast_try_tiles();
  std::printf("%d %d", are_used, waitpid(-1, nullptr, 0) == -1 && errno == ECHILD);
}
"""


@pytest.fixture(scope="module")
def trial(amx_object):
    """A program that tries tiles, with AMX's instructions emulated."""
    if tiles.are_announced() or "avx512" not in [level.name for level in levels.this_machine()]:
        pytest.skip("no processor to emulate AMX on")
    compiler, object_file = amx_object
    program, emulator = object_file.with_name("trial"), Path(__file__).parents[2] / "tools" / "emulate_amx.cpp"
    program.with_suffix(".cpp").write_text(TRIAL)
    sources = [str(program.with_suffix(".cpp")), str(emulator), str(object_file)]
    linking = "-Wl,--wrap=syscall,--unresolved-symbols=ignore-all"  # the latter: operations that are not called
    flags = ["-std=c++20", "-O1", "-fopenmp", "-no-pie", linking]
    subprocess.run([*compiler, *flags, *sources, "-o", str(program)], check=True)
    return program


@pytest.mark.parametrize("how", ["works", "is interrupted", "ignores children", "dies", "hangs"])
def test_a_trial_of_tiles_ends_and_leaves_no_child(trial, how):
    done = subprocess.run([trial, how], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == f"{int(how not in ('dies', 'hangs'))} 1"
