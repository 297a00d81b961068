"""The models of one server, by the names that requests use."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field, replace
from typing import Any

from qwen3fast.embedder import Embedder
from qwen3fast.generator import Generator
from qwen3fast.reranker import Reranker
from qwen3fast.server.errors import ApiError
from qwen3fast.server.fields import Fields
from qwen3fast.text.tokenizer import Tokenizer

AnyModel = Generator | Embedder | Reranker
KINDS: dict[str, type] = {"generate": Generator, "embed": Embedder, "rerank": Reranker}


@dataclass
class ServedModel:
    """A model under a name.

    adapter: the LoRA adapter of the Generator that its requests run with; None for the model itself. parent: the name
    of the adapter's model. enable_thinking: for conversations that do not say.
    lock: held while an Embedder or Reranker computes, which serve one request at a time.
    """

    name: str
    model: AnyModel
    adapter: str | None = None
    parent: str | None = None
    enable_thinking: bool = True
    created: int = field(default_factory=lambda: int(time.time()))
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def kind(self) -> str:
        """The kind of work: "generate", "embed" or "rerank"."""
        return next(kind for kind, cls in KINDS.items() if isinstance(self.model, cls))

    @property
    def max_length(self) -> int:
        """The maximum number of tokens: of a prompt and its reply, or of one text."""
        return self.model.max_seq_len if isinstance(self.model, Generator) else self.model.max_length

    def to_openai(self) -> dict[str, Any]:
        """Return the model object of `/v1/models`."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "qwen3fast",
            "root": self.parent or self.name,
            "parent": self.parent,
            "max_model_len": self.max_length,
            "task": self.kind,
        }


class Models:
    """The models of a server, and the LoRA adapters of its Generators, which are models of their own to clients.

    Requests without `model` get the first model of their kind, without adapter. An adapter that a Generator loads while
    the server runs is served as soon as it is loaded.

    Attributes:
        served: the models themselves.
    """

    def __init__(self, models: dict[str, AnyModel], enable_thinking: bool = True) -> None:
        """Raises: ValueError for no models, and for an adapter with the name of a model or of another adapter."""
        if not models:
            raise ValueError("a server needs at least one model")
        self.served = [ServedModel(name, model, enable_thinking=enable_thinking) for name, model in models.items()]
        names = [served.name for served in self.with_adapters]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"models and adapters of a server need names of their own; duplicates: {', '.join(twice)}")

    @property
    def with_adapters(self) -> list[ServedModel]:
        """The models in their order, then their adapters."""
        adapted = [
            replace(own, name=name, adapter=name, parent=own.name)
            for own in self.served
            if isinstance(own.model, Generator)
            for name in own.model.adapters
        ]
        return [*self.served, *adapted]

    def find(self, name: str) -> ServedModel:
        """Return the model of that name. Raises: ApiError (404)."""
        known = self.with_adapters
        for served in known:
            if served.name == name:
                return served
        names = ", ".join(served.name for served in known)
        raise ApiError(404, f"model {name!r:.200} does not exist; this server has {names}", "model", "model_not_found")

    def choose(self, fields: Fields, kind: str) -> ServedModel:
        """Return the model that a request names, or the first that can do this kind of work.

        Raises: ApiError (404 for an unknown name or without such a model, 400 for a model of another kind).
        """
        name = fields.text("model")
        if name is None:
            served = next((served for served in self.served if served.kind == kind), None)
            if served is None:
                raise ApiError(404, f"this server has no model that can {kind}", "model", "model_not_found")
            return served
        served = self.find(name)
        if served.kind != kind:
            message = f"model {name!r} is for {served.kind!r}; this endpoint needs one for {kind!r}"
            raise ApiError(400, message, "model", "wrong_kind_of_model")
        return served

    def close(self) -> None:
        """Close all Generators."""
        for served in self.served:
            if isinstance(served.model, Generator):
                served.model.close()


def generator_of(served: ServedModel) -> Generator:
    """Return the Generator of a model that was chosen for kind "generate"."""
    assert isinstance(served.model, Generator), f"{served.name} was chosen as a generator"
    return served.model


def tokenizer_of(served: ServedModel) -> Tokenizer:
    """Return a model's tokenizer. Raises: ApiError (400) if it has none."""
    if served.model.tokenizer is None:
        raise ApiError(400, f"model {served.name!r} has no tokenizer; send token ids, to /v1/completions", "model")
    return served.model.tokenizer
