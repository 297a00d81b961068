"""The score head of a `Qwen3ForSequenceClassification`: a linear layer from the last token's state to its labels.

L labels   E hidden_size
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from qwen3fast.checkpoint.checks import FLOATS, non_finite, refuse
from qwen3fast.checkpoint.hf_config import CheckpointConfig
from qwen3fast.checkpoint.safetensors import open_tensors, tensors_by_file
from qwen3fast.files import read_json

ARCHITECTURE, WEIGHT = "Qwen3ForSequenceClassification", "score.weight"
MULTI_LABEL = "multi_label_classification"


class ScoreHead(NamedTuple):
    """A score head. labels: the name of each row. is_multi_label: a text may have several labels, or none."""

    weight_LE: Tensor
    labels: tuple[str, ...]
    is_multi_label: bool

    def config_fields(self) -> dict[str, Any]:
        """Return the fields of config.json that describe the head."""
        return {
            "architectures": [ARCHITECTURE],
            "id2label": {str(i): label for i, label in enumerate(self.labels)},
            "label2id": {label: i for i, label in enumerate(self.labels)},
            **({"problem_type": MULTI_LABEL} if self.is_multi_label else {}),
        }


def find_score_head(source: Path, check_weights: bool = False) -> ScoreHead | None:
    """Return the score head of a checkpoint in float32; None if its architecture has none.

    source: as `resolve_source` returns it. check_weights: refuse NaN and infinity.
    Raises: FileNotFoundError or ValueError, as `load_model`; ValueError for a head that is missing or does not fit.
    """
    if source.is_file():  # GGUF files have none
        return None
    raw = read_json(source / "config.json")
    if raw.get("architectures") != [ARCHITECTURE]:
        return None
    weight_LE = _read_weight(source, CheckpointConfig.from_folder(source).model.hidden_size)
    if check_weights and (counts := non_finite(weight_LE)) is not None:
        refuse([f"{WEIGHT}: {counts}"], f"the score head in {source} is not finite in float32")
    labels = _labels(raw, len(weight_LE))
    return ScoreHead(weight_LE, labels, raw.get("problem_type") == MULTI_LABEL)


def _read_weight(folder: Path, hidden_size: int) -> Tensor:
    file = next((file for file, names in tensors_by_file(folder).items() if WEIGHT in names), None)
    if file is None:
        raise ValueError(f"{folder}: a {ARCHITECTURE} needs {WEIGHT}, which no file holds")
    with open_tensors(file) as tensors:
        stored = tensors.get_slice(WEIGHT) if WEIGHT in tensors.keys() else None  # noqa: SIM118  no dictionary
        shape = tuple(stored.get_shape()) if stored is not None else ()
        if stored is None or len(shape) != 2 or shape[1] != hidden_size or stored.get_dtype() not in FLOATS:
            raise ValueError(f"{WEIGHT} in {file}: shape {shape}, expected floats of shape (labels, {hidden_size})")
        weight_LE: Tensor = tensors.get_tensor(WEIGHT).float()
    return weight_LE


def _labels(raw: dict[str, Any], num_labels: int) -> tuple[str, ...]:
    """Return the labels of config.json; transformers' names LABEL_0, ... where it has none, or another number."""
    named = raw.get("id2label")
    given = [named.get(str(i)) for i in range(num_labels)] if isinstance(named, dict) else []
    if len(given) == num_labels and all(isinstance(label, str) for label in given):
        return tuple(map(str, given))
    return tuple(f"LABEL_{i}" for i in range(num_labels))
