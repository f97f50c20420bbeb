"""The graphs of a bundle as engines, each opened when it is first used and kept open.

So an application that only searches never loads the decoder, and one that only captions never loads the text tower.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from mammut_runtime.engines import Engine
from mammut_runtime.errors import BundleError, EngineError

_USERS = {
    "vision": "pictures",
    "video": "clips",
    "text": "texts to match",
    "memory": "captions",
    "decoder": "captions",
    "detector": "detections",
}
"""Graph -> what cannot be had without it, for messages."""


class Graphs:
    """Engines by the names of their graphs. Safe to use from several threads."""

    def __init__(self, names: tuple[str, ...], open_graph: Callable[[str], Engine]) -> None:
        """names: the graphs that exist. open_graph: name -> Engine; called once per name."""
        self._names, self._open_graph = names, open_graph
        self._engines: dict[str, Engine] = {}
        self._lock = threading.Lock()
        self._closed = False

    def engine(self, name: str) -> Engine:
        """The engine, opened if need be. Raises BundleError where there is no such graph, EngineError after close()."""
        engine = self._engines.get(name)
        if engine is not None and not self._closed:
            return engine
        with self._lock:
            if self._closed:
                raise EngineError("this model is closed; load it again")
            if name not in self._names:
                raise BundleError(
                    f"this bundle has no {name!r} graph, which {_USERS.get(name, 'this call')} need; it has "
                    f"{', '.join(self._names)}; export it with the tasks that you need"
                )
            if name not in self._engines:
                self._engines[name] = self._open_graph(name)
            return self._engines[name]

    def run(self, name: str, feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run a graph: inputs by name to outputs by name."""
        return self.engine(name).run(feeds)

    def close(self) -> None:
        """Closes every engine. A call that is running in another thread may fail with EngineError."""
        with self._lock:
            self._closed = True
            for engine in self._engines.values():
                engine.close()
            self._engines.clear()
