"""A Python function in the place of a graph: for tests of applications that should not need a model or an engine.

model = Model(bundle, open_graph=lambda name: FakeEngine(my_functions[name]))
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from mammut_runtime.errors import EngineError

GraphFunction = Callable[[dict[str, NDArray[Any]]], dict[str, NDArray[Any]]]


class FakeEngine:
    """An Engine that calls `function` and remembers what it was fed.

    function: all inputs by name to all outputs by name. As thread-safe as the function is.
    """

    def __init__(self, function: GraphFunction) -> None:
        self._function: GraphFunction | None = function
        self.calls: list[dict[str, NDArray[Any]]] = []
        """The feeds of every call so far, oldest first."""

    def run(self, feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Raises EngineError after close(); what the function raises goes through."""
        if self._function is None:
            raise EngineError("this engine is closed")
        self.calls.append(feeds)
        return self._function(feeds)

    def close(self) -> None:
        self._function = None
