"""AdapterRegistry: the adapters of one Generator by name, loaded and unloaded while requests run."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path

from qwen3fast.checkpoint.lora.unmerged import read_lora
from qwen3fast.checks import checked_text
from qwen3fast.scheduling.request import Adapter
from qwen3fast.scheduling.worker import EngineWorker


class AdapterRegistry:
    """Names of adapters, and the slots that hold them. Thread-safe."""

    def __init__(
        self, worker: EngineWorker, sources: Mapping[str, str | Path] | None = None, check_weights: bool = False
    ) -> None:
        """Load the first adapters.

        worker: of the engine with the slots, which has not started; the engine may have no slots.
        sources: folders or hub ids by name. check_weights: refuse NaN and infinity in these and all later ones.
        Raises: as `load`.
        """
        self._worker, self._check_weights = worker, check_weights
        slots = worker.scheduler.engine.adapters
        self._free = [] if slots is None else list(range(1, 1 + slots.max_adapters))
        self._num_slots = len(self._free)
        self._adapters: dict[str, Adapter] = {}
        self._changing: set[str] = set()  # names that are being loaded or unloaded
        self._lock = threading.Lock()
        for name, source in (sources or {}).items():
            self._load(name, source, check_weights, is_started=False)

    @property
    def names(self) -> list[str]:
        """The names that requests may use, in the order of loading."""
        return list(self._adapters)

    def find(self, name: str) -> Adapter:
        """Return the adapter of that name. Raises: ValueError naming the loaded ones."""
        adapter = self._adapters.get(name)
        if adapter is not None:
            return adapter
        if not self._num_slots:
            raise ValueError(
                f"adapter {name!r:.200} is not loaded; this Generator has no room for adapters: build it with "
                "adapters={name: folder}, or max_adapters"
            )
        raise ValueError(f"adapter {name!r:.200} is not loaded; loaded: {', '.join(self.names) or 'none'}")

    def load(self, name: str, source: str | Path, check_weights: bool = False) -> None:
        """Read an adapter, in this thread, and copy it to a free slot between two steps.

        Raises: FileNotFoundError; ValueError for a name in use, without a free slot, and as `read_lora`; RuntimeError
        as `EngineWorker.check_caller`.
        """
        self._worker.check_caller()
        self._load(name, source, check_weights or self._check_weights, is_started=True)

    def _load(self, name: str, source: str | Path, check_weights: bool, is_started: bool) -> None:
        """Load an adapter. is_started: False before the first request: writing must not start the worker (`FORKED`)."""
        if not isinstance(name, str) or not name:
            raise ValueError(f"an adapter's name must be a non-empty string, got {name!r:.200}")
        slot = self._take_slot(checked_text("an adapter's name", name))
        engine = self._worker.scheduler.engine
        assert engine.adapters is not None, "it has a free slot"
        try:
            matrices = read_lora(source, engine.model, engine.adapters.layers, engine.adapters.max_rank, check_weights)
            if is_started:
                self._worker.call(engine.write_adapter, slot, matrices)
            else:
                engine.write_adapter(slot, matrices)
        except ValueError as err:
            self._give_back(name, slot)
            raise ValueError(f"adapter {name!r} ({source}): {err}") from err
        except BaseException:
            self._give_back(name, slot)
            raise
        with self._lock:
            self._adapters[name] = Adapter(name, slot)
            self._changing.discard(name)

    def unload(self, name: str) -> None:
        """Refuse new requests with an adapter, wait for those that wait or run to finish, and free its slot.

        Raises: ValueError for an unknown name; RuntimeError as `EngineWorker.check_caller`, also if the Generator is
        closed meanwhile.
        """
        self._worker.check_caller()
        with self._lock:
            adapter = self.find(name)
            del self._adapters[name]
            self._changing.add(name)
        scheduler = self._worker.scheduler
        self._worker.call(scheduler.retire, adapter).result()
        self._give_back(name, adapter.slot)

    def _take_slot(self, name: str) -> int:
        with self._lock:
            if name in self._adapters or name in self._changing:
                state = "loaded already" if name in self._adapters else "being loaded or unloaded"
                raise ValueError(f"adapter {name!r} is {state}; unload it first, or choose another name")
            if not self._free:
                raise ValueError(
                    f"no room for adapter {name!r}: max_adapters is {self._num_slots}, "
                    f"loaded: {', '.join(self._adapters) or 'none'}; unload one, or build the Generator with room for "
                    f"more (max_adapters={self._num_slots + 1})"
                )
            self._changing.add(name)
            return self._free.pop(0)

    def _give_back(self, name: str, slot: int) -> None:
        with self._lock:
            self._changing.discard(name)
            self._free.insert(0, slot)
