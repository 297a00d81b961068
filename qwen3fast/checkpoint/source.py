"""From the name of a model to the local folder, or GGUF file, that holds it."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

from qwen3fast.checkpoint.vocab_files import VOCAB_FILES

TINY_FOLDER = Path(__file__).parent.parent / "assets" / "tiny"

LATER_PART = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$")

# What a Qwen3 needs, so that nothing else (other formats, pictures) is downloaded.
HUB_PATTERNS = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
]


def resolve_source(source: str | Path, revision: str | None = None) -> Path:
    """The local folder of a checkpoint: "tiny", an existing folder, or a hub id that is downloaded (or found cached).

    A GGUF file stands for itself, and for a folder that holds it alone (or its parts) and no safetensors.

    Downloads show huggingface_hub's progress bars and follow HF_TOKEN, HF_HOME and HF_HUB_OFFLINE. A connection that
    breaks is taken up where it broke; after a download that failed, the next call keeps the files that were finished
    (recent versions of huggingface_hub begin the unfinished one anew).

    Raises: FileNotFoundError if nothing of that name exists or the hub cannot be reached and holds no cached copy;
    ValueError for a folder with several GGUF files.
    """
    if str(source) == "tiny":
        return TINY_FOLDER
    folder = Path(source).expanduser()
    if folder.is_dir():
        return _gguf_inside(folder) or folder
    if folder.is_file() and folder.suffix == ".gguf":
        return folder
    if folder.is_file():
        raise FileNotFoundError(
            f"{folder} is a file; expected the folder that holds config.json and the weights, or a .gguf file"
        )
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise FileNotFoundError(
            f"no folder {str(source)!r}; expected a local folder, a hub id such as 'Qwen/Qwen3-0.6B', a .gguf file, "
            "'tiny', or 'random:0.6b'"
        )
    try:
        downloaded = Path(snapshot_download(str(source), revision=revision, allow_patterns=HUB_PATTERNS))
        if not (downloaded / "tokenizer.json").is_file():
            snapshot_download(str(source), revision=revision, allow_patterns=list(VOCAB_FILES))
        return downloaded
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as err:
        at = f" at revision {revision!r}" if revision else ""
        raise FileNotFoundError(
            f"{str(source)!r}{at} is neither a local folder nor available from the hub ({type(err).__name__}: {err})"
        ) from err


def _gguf_inside(folder: Path) -> Path | None:
    """The GGUF file, or the first of its parts, of a folder without safetensors.

    Raises: ValueError if there are several.
    """
    if any(folder.glob("*.safetensors")):
        return None
    files = sorted(file for file in folder.glob("*.gguf") if not LATER_PART.search(file.name))
    if len(files) > 1:
        raise ValueError(f"{folder} holds {', '.join(file.name for file in files)}; name one of them")
    return files[0] if files else None
