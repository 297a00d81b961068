"""4 bits with errors corrected: calibrated on the first load of a checkpoint, kept, and read by later loads.

The rule of which checkpoints are calibrated depends on the checkpoint and the kind of device, and on no measured speed.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from qwen3fast.checkpoint.choices import choose_dtype
from qwen3fast.checkpoint.empty import empty_model
from qwen3fast.checkpoint.kept import KeptCopy
from qwen3fast.checkpoint.loaders import Loader
from qwen3fast.checkpoint.lora.files import find_adapter
from qwen3fast.checkpoint.metadata import read_checkpoint_config, read_tokenizer
from qwen3fast.checkpoint.safetensors import has_output_projection
from qwen3fast.checks import checked_variable
from qwen3fast.engine.own_text import own_text
from qwen3fast.model import Qwen3, build_on_meta
from qwen3fast.model.memory import free_bytes
from qwen3fast.quantization.calibrate import CALIBRATED, fast_dtype, quantize_calibrated
from qwen3fast.quantization.convert import formats_of, prepare_quantization, quantize_model

logger = logging.getLogger(__name__)

VARIABLE = "QWEN3FAST_CALIBRATE"
TOKENS = 2048  # of the text
MAX_PARAMETERS_ON_CPU = 2_000_000_000
COMMAND = "python -m qwen3fast quantize"


def is_to_be_calibrated(
    calibrate: bool | None,
    source: Path | None,
    quantization: str | None,
    device: torch.device,
    is_split: bool = False,
) -> bool:
    """Return whether to calibrate a checkpoint's weights.

    calibrate: False never; True always; None where it is reasonable: on CPUs for up to MAX_PARAMETERS_ON_CPU
    parameters, and not with QWEN3FAST_CALIBRATE=0 in the environment.
    source: as `resolve_source` returns it; None for random weights. is_split: over several processes.
    Raises: ValueError where True is impossible, saying why; otherwise as `checked_variable`.
    """
    if calibrate is False or (calibrate is None and checked_variable(VARIABLE) == "0"):
        return False
    if quantization not in CALIBRATED:
        reason: str | None = f"only {' and '.join(CALIBRATED)} are calibrated, not quantization={quantization!r}"
    elif source is None:
        reason = "random weights are not calibrated"
    elif is_split:
        reason = f"a model that is split over processes is not calibrated; load what `{COMMAND}` writes in one process"
    else:
        reason = _why_not(source)
    if calibrate and reason is not None:
        raise ValueError(f"calibrate=True is impossible: {reason}")
    if reason is not None or source is None:
        return False
    num_parameters = read_checkpoint_config(source).model.num_parameters
    if calibrate is None and device.type == "cpu" and num_parameters > MAX_PARAMETERS_ON_CPU:
        logger.info(
            "%s: %s without calibration, which takes long for %.1f billion parameters on a CPU; calibrate=True does it "
            "once and keeps the result, and so does `%s`, in a folder that you choose",
            source, quantization, num_parameters / 1e9, COMMAND,
        )  # fmt: skip
        return False
    return True


def _why_not(source: Path) -> str | None:
    """Return why a checkpoint cannot be calibrated; None if it can. Raises: as `read_checkpoint_config`."""
    stored = read_checkpoint_config(source)
    if stored.model.num_experts:
        return "experts are not calibrated"
    is_quantized = stored.quantization is not None or stored.prequantized is not None
    if is_quantized or (source.is_file() and formats_of(empty_model(source))):
        return f"{source} is quantized already"
    if source.is_dir() and not has_output_projection(stored.model, source):
        return f"{source} has no output projection, without which it writes no text to be calibrated on"
    return None


@dataclass(frozen=True)
class CalibratedLoader:
    """Loading of one checkpoint in 4 bits with errors corrected.

    source: as `resolve_source` returns it. loader: of 4 bits without calibration; its progress shows a bar while a kept
    copy loads, and calibrating always shows bars, as downloads do. calibrate: True requires calibration; with None,
    `loader` is used where it is impossible or its result cannot be kept, with a warning.
    """

    source: Path
    loader: Loader
    calibrate: bool | None = None

    @property
    def quantization(self) -> str:
        """The format of 4 bits."""
        return str(self.loader.quantization)

    def load(self) -> Qwen3:
        """Return the model: read from the cache folder, where the first load of a checkpoint keeps it.

        Raises: as `load_model`; ValueError if calibrate=True is impossible, since the model's logits are not finite.
        """
        prepare_quantization(self.quantization, self.loader.device)
        try:
            kept = self.place()
        except RuntimeError as err:
            return self._load_unkept(str(err))
        if (model := self._read(kept)) is not None:
            return model
        if (problem := kept.why_not(self._num_bytes())) is not None:
            return self._load_unkept(problem)
        with kept.locked():
            if (model := self._read(kept, warn=True)) is not None:  # another process has written it
                return model
            logger.info("%s: calibrating %s, once; kept in %s", self.source, self.quantization, kept.folder)
            model, num_tokens = self._calibrate()
            if num_tokens:
                try:
                    kept.write(model, num_tokens)
                except OSError as err:
                    logger.warning("the calibrated weights cannot be kept (%s); the next load calibrates again", err)
        return model

    def place(self) -> KeptCopy:
        """Return where the calibrated copy is kept. Raises: RuntimeError if there is no home folder."""
        device, adapter = self.loader.device, self.loader.adapter
        dtype = choose_dtype(self.loader.dtype, read_checkpoint_config(self.source).model)
        way = {"format": self.quantization, "dtype": dtype, "device": device.type, "tokens": TOKENS}
        file = None if adapter is None else find_adapter(adapter)[1]
        files = () if file is None else (file, file.with_name("adapter_config.json"))
        return KeptCopy.of(self.source, files, **way, computed_in=fast_dtype(dtype, device))

    def _read(self, kept: KeptCopy, warn: bool = False) -> Qwen3 | None:
        """Return the kept model; None if there is none, or it is damaged. warn: say so."""
        if not kept.exists():
            return None
        try:
            model = replace(self.loader, quantization=None, adapter=None).load(kept.folder)
        except (OSError, ValueError) as err:
            if warn:
                logger.warning("the calibrated copy of %s is damaged and is made again: %s", self.source, err)
            return None
        kept.mark_as_read()
        logger.info("%s: calibrated %s, kept in %s", self.source, self.quantization, kept.folder)
        return model

    def _load_unkept(self, problem: str) -> Qwen3:
        """Load where no copy can be kept."""
        choice = "calibrating for this load alone" if self.calibrate else f"{self.quantization} without calibration"
        advice = f"set XDG_CACHE_HOME to a folder with room, or use `{COMMAND}`, which writes a folder that you choose"
        logger.warning("a calibrated copy cannot be kept: %s; %s (%s)", problem, choice, advice)
        if self.calibrate:
            return self._calibrate()[0]
        return self.loader.load(self.source)

    def _calibrate(self) -> tuple[Qwen3, int]:
        """Return the quantized model and the number of tokens that it was calibrated on, 0 if it could not be."""
        plain = replace(self.loader, quantization=None, output_projection=True)
        model, tokenizer, device = None, None, self.loader.device
        try:
            size, free = self._num_bytes(is_plain=True), free_bytes(device)
            if not self.calibrate and free is not None and free < size:
                raise MemoryError(f"it reads {size / 1e9:.1f} GB of weights many times; {free / 1e9:.1f} GB are free")
            model = plain.load(self.source)
            with suppress(FileNotFoundError):  # without one, no text begins as a conversation
                tokenizer = read_tokenizer(self.source)
            token_BT = own_text(model, tokenizer, TOKENS, progress=True)
            quantize_calibrated(model, token_BT, self.quantization, progress=True)
            return model, token_BT.numel()
        except (ValueError, MemoryError, RuntimeError) as err:  # RuntimeError: of PyTorch, too little memory above all
            if self.calibrate:
                raise
            logger.warning("%s: %s without calibration: %s", self.source, self.quantization, err)
        del model  # parts of it may be quantized already
        return self.loader.load(self.source), 0

    def _num_bytes(self, is_plain: bool = False) -> int:
        """Return the size of the copy, or of the plain weights."""
        config = read_checkpoint_config(self.source).model
        model, dtype = build_on_meta(config), choose_dtype(self.loader.dtype, config)
        if is_plain:
            return sum(parameter.numel() * dtype.itemsize for parameter in model.parameters())
        quantize_model(model, self.quantization, dtype)
        return model.num_bytes()
