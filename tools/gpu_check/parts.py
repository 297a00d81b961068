"""The measurements of each part, most important first: without time for all, the last ones are left out."""

from __future__ import annotations

from collections.abc import Callable

from gpu_check.variants import Variant

COORDINATE, PDL = "coordinate_descent_tuning", "triton.enable_pdl"
FORMATS = ("int8", "fp8", "int4")
# The fused step, of up to 8 rows, knows neither options of Inductor nor other attentions.
UNFUSED = {"fused": False}


def _random(part: str, size: str, **fields: object) -> Variant:
    return Variant(part, f"random:{size}", size, **fields)  # type: ignore[arg-type]


def _decode() -> list[Variant]:
    def variant(**fields: object) -> Variant:
        return _random("decode", "0.6b", **fields)

    return [
        variant(),
        variant(label="without pdl", switches={"pdl": False}),
        variant(label="by Inductor", switches=UNFUSED),
        variant(label="by Inductor without pdl", options={PDL: False}, switches=UNFUSED),
        variant(label="by Inductor without coordinate descent", options={COORDINATE: False}, switches=UNFUSED),
        variant(label="by Inductor without both", options={COORDINATE: False, PDL: False}, switches=UNFUSED),
        variant(mode="compiled"),
        variant(mode="eager", rounds=2, new_tokens=40),
        variant(label="by Inductor, sdpa attention", switches=UNFUSED | {"attention": "sdpa"}),
    ]


def _formats() -> list[Variant]:
    shape = {"contexts": (32, 1000)}
    small = [_random("formats", "0.6b", weights=weights, **shape) for weights in ("bf16", *FORMATS)]
    large = [_random("formats", "8b", weights=weights, rounds=2, **shape) for weights in ("bf16", *FORMATS)]
    # As in FP8 checkpoints: a scale per block.
    blocks = [_random("formats", size, weights="fp8-block", rounds=2, **shape) for size in ("8b", "0.6b")]
    return [large[0], large[1], large[2], small[0], small[1], small[2], large[3], small[3], *blocks]


def _large() -> list[Variant]:
    def variant(size: str, **fields: object) -> Variant:
        return _random("large", size, contexts=(32, 4000), rounds=2, **fields)

    return [
        variant("8b"),
        variant("8b", mode="eager", new_tokens=40),
        variant("8b", label="by Inductor, sdpa attention", switches=UNFUSED | {"attention": "sdpa"}, profiled=False),
        variant("4b", profiled=False),
        variant("1.7b", profiled=False),
        variant("14b", profiled=False),
        variant("30b-a3b", profiled=False),
        variant("32b", profiled=False),
    ]


def _batches() -> list[Variant]:
    def variant(size: str, batch_size: int, **fields: object) -> Variant:
        return _random("batches", size, **{"batch_size": batch_size, "contexts": (128, 1000), **fields})

    return [
        variant("0.6b", 64, rounds=2),
        variant("0.6b", 16, rounds=2),
        variant("0.6b", 8, rounds=2, contexts=(128, 4000)),
        variant("0.6b", 64, rounds=2, label="sdpa attention", switches={"attention": "sdpa"}, profiled=False),
        variant("8b", 16, rounds=2, profiled=False),
        variant("8b", 64, rounds=2, profiled=False),
        variant("0.6b", 16, rounds=1, mode="eager", new_tokens=40, profiled=False),
    ]


def _prefill() -> list[Variant]:
    def variant(size: str, **fields: object) -> Variant:
        return _random("prefill", size, new_tokens=2, **{"profiled": False, "rounds": 5, **fields})

    lengths = (32, 128, 1000, 4096, 16000)
    return [
        variant("0.6b", contexts=lengths),
        variant("0.6b", contexts=(128, 1000), batch_size=64, rounds=2),
        variant("8b", contexts=(32, 1000, 4096)),
        variant("0.6b", contexts=lengths, mode="compiled"),
        variant("0.6b", contexts=lengths, mode="eager"),
        variant("8b", contexts=(32, 1000, 4096), weights="fp8"),
    ]


def _peers() -> list[Variant]:
    def variant(size: str, mode: str, **fields: object) -> Variant:
        shape = {"contexts": (32, 1000), "profiled": False, "rounds": 2, **fields}
        return _random("peers", size, kind="transformers", mode=mode, **shape)

    ours = [_random("peers", size, contexts=(32, 1000), profiled=False) for size in ("0.6b", "8b")]
    static = [variant("0.6b", "static"), variant("8b", "static")]
    return [ours[0], static[0], variant("0.6b", "eager", new_tokens=60), ours[1], static[1]]


def _uncached() -> list[Variant]:
    shape = {"contexts": (32, 1000), "new_tokens": 8, "rounds": 2, "profiled": False}
    modes = ("eager", "compiled")
    small = [_random("uncached", "0.6b", kind="uncached", mode=mode, **shape) for mode in modes]
    cached = _random("uncached", "0.6b", contexts=(32, 1000), profiled=False)
    return [cached, *small, *(_random("uncached", "8b", kind="uncached", mode=mode, **shape) for mode in modes)]


MEASURED: dict[str, Callable[[], list[Variant]]] = {
    "decode": _decode,
    "formats": _formats,
    "large": _large,
    "batches": _batches,
    "prefill": _prefill,
    "peers": _peers,
    "uncached": _uncached,
}
PARTS = ("tests", *MEASURED)


def variants_of(part: str, device: str, only: str = "") -> list[Variant]:
    """Return the variants of a part: for CUDA, or for a dry run elsewhere. only: a part of the wanted names.

    In a dry run, variants that would be the same are kept once.
    """
    variants = [variant for variant in MEASURED[part]() if only in variant.name]
    if device.startswith("cuda"):
        return variants
    return list({variant.name: variant for variant in (v.dry() for v in variants)}.values())
