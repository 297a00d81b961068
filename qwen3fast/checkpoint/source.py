"""From the name of a model or an adapter to the local folder, or GGUF file, that holds it."""

from __future__ import annotations

import functools
import logging
import re
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from qwen3fast.checkpoint.vocab_files import VOCAB_FILES

logger = logging.getLogger(__name__)

TINY_FOLDER = Path(__file__).parent.parent / "assets" / "tiny"

HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")  # not ./folder
HUB_ERRORS = (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError)
NO_SAFETENSORS = "of .gguf files, name one (NAME:Q4_K_M); of other files, look for a converted checkpoint"
LATER_PART = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$")

# The sampling preset, and the tokenizer without VOCAB_FILES, which only older ones need.
SMALL_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
)
# The files that a Qwen3 needs; nothing else (other formats, pictures) is downloaded.
HUB_PATTERNS = [
    "config.json",
    *SMALL_FILES,
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
    "modules.json",  # this one and the next three: sentence-transformers
    "*_Pooling/config.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
]
ADAPTER_FILES = ["adapter_config.json", "adapter_model.safetensors"]


def resolve_source(source: str | Path, revision: str | None = None) -> Path:
    """Return the local folder of a checkpoint: "tiny", an existing folder, or a hub id (downloaded, or found cached).

    A GGUF file stands for itself, and for a folder that holds it alone (or its parts) and no safetensors. On the hub,
    "OWNER/NAME:Q4_K_M" names the GGUF file (or its parts) with that format in its name, and "OWNER/NAME:FILE.gguf" a
    file. Local checkpoints have no revisions: one that is given is ignored, with a warning.

    Downloads show huggingface_hub's progress bars and follow HF_TOKEN, HF_HOME and HF_HUB_OFFLINE. A broken connection
    is resumed; after a failed download, the next call keeps the files that were complete (recent versions of
    huggingface_hub start the incomplete one again).

    Raises: FileNotFoundError if nothing of that name exists, it holds an adapter alone, it has no safetensors on the
    hub, or the hub cannot be reached and no copy is cached; ValueError for several GGUF files.
    """
    expected = (
        "a local folder, a hub id such as 'Qwen/Qwen3-0.6B' (or 'Qwen/Qwen3-0.6B-GGUF:Q8_0'), a .gguf file, 'tiny', or "
        "'random:0.6b'"
    )
    if not str(source):
        raise FileNotFoundError(f"the name of the model is empty; expected {expected}")
    folder = TINY_FOLDER if str(source) == "tiny" else Path(source).expanduser()
    if revision is not None and folder.exists():
        _say_ignored(revision, str(source))
    if folder.is_dir():
        if (folder / ADAPTER_FILES[0]).is_file() and not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{folder} holds a LoRA adapter; load its base model with adapter={str(source)!r}")
        return _gguf_inside(folder) or folder
    if folder.is_file() and folder.suffix.lower() == ".gguf":
        return folder
    if folder.is_file():
        raise FileNotFoundError(
            f"{folder} is a file; expected the folder that holds config.json and the weights, or a .gguf file"
        )
    name, _, format = str(source).partition(":")
    if format and HUB_ID.fullmatch(name):
        return _gguf_on_hub(name, format, revision)
    if not HUB_ID.fullmatch(str(source)):
        raise FileNotFoundError(
            f"no {'file' if folder.suffix.lower() == '.gguf' else 'folder'} {str(source)!r}; expected {expected}"
        )
    try:
        downloaded = Path(snapshot_download(str(source), revision=revision, allow_patterns=HUB_PATTERNS))
        if not (downloaded / "tokenizer.json").is_file():
            snapshot_download(str(source), revision=revision, allow_patterns=list(VOCAB_FILES))
    except HUB_ERRORS as err:
        at = f" at revision {revision!r}" if revision else ""
        raise not_on_hub(f"{str(source)!r}{at}", err) from err
    if not any(downloaded.glob("*.safetensors")):
        raise FileNotFoundError(f"{str(source)!r} has no safetensors on the hub; {NO_SAFETENSORS}")
    return downloaded


def resolve_adapter(source: str | Path) -> Path:
    """Return the local folder of an adapter: an existing folder, or a hub id (downloaded, or found cached).

    Raises: FileNotFoundError if there is neither.
    """
    folder = Path(source).expanduser()
    if folder.is_dir() or not HUB_ID.fullmatch(str(source)):
        return folder
    try:
        return Path(snapshot_download(str(source), allow_patterns=ADAPTER_FILES))
    except HUB_ERRORS as err:
        raise not_on_hub(f"adapter {str(source)!r}", err) from err


@functools.cache  # once each: one load resolves its source several times
def _say_ignored(revision: str, source: str) -> None:
    logger.warning("revision %r is ignored: %s is local; only checkpoints on the hub have revisions", revision, source)


def not_on_hub(name: str, error: Exception) -> FileNotFoundError:
    """Return the error for a name that the hub did not give. Without a connection, it may also be misspelled."""
    if isinstance(error, RepositoryNotFoundError | RevisionNotFoundError | HFValidationError):
        advice = "the hub has no such name, or keeps it private: check the spelling, or set HF_TOKEN"
    else:
        advice = (
            "no copy of it is cached, and either the hub cannot be reached or the name is wrong: check the spelling, "
            "the network and HF_HUB_OFFLINE, or pass a local folder"
        )
    reason = f"{type(error).__name__}: {error}".partition("\n")[0]
    return FileNotFoundError(f"{name} is neither a local folder nor available from the hub ({reason}); {advice}")


def _gguf_on_hub(name: str, format: str, revision: str | None) -> Path:
    """Return the GGUF file of a hub id, or the first of its parts. format: in the file's name, or the name itself."""
    is_file = format.lower().endswith(".gguf")
    patterns = [format] if is_file else [f"*{x}*.gguf" for x in dict.fromkeys((format, format.upper(), format.lower()))]
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except HUB_ERRORS as err:
        raise not_on_hub(repr(name), err) from err
    names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*.gguf"))
    found = [x for x in names if any(fnmatchcase(x, each) for each in patterns) and not LATER_PART.search(x)]
    if not found:
        raise FileNotFoundError(f"{name!r} has no file {patterns[0]!r} on the hub; see its list of files there")
    if len(found) > 1:
        raise ValueError(
            f"{name} has several files {patterns[0]!r}: {', '.join(found)}; pass {name}:{found[0]} or another"
        )
    return folder / found[0]


def _gguf_inside(folder: Path) -> Path | None:
    """Return the GGUF file, or the first of its parts, of a folder without safetensors.

    Raises: ValueError if there are several.
    """
    if any(folder.glob("*.safetensors")):
        return None
    files = sorted(file for file in folder.glob("*.gguf") if not LATER_PART.search(file.name))
    if len(files) > 1:
        raise ValueError(f"{folder} holds {', '.join(file.name for file in files)}; name one of them")
    return files[0] if files else None
