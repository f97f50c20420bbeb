"""Graphs are opened when needed, once, also when several threads ask at the same moment."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from mammut_runtime.engines.fake import FakeEngine
from mammut_runtime.errors import BundleError, EngineError
from mammut_runtime.graphs import Graphs


def test_opened_once_and_only_when_used() -> None:
    opened: list[str] = []

    def open_graph(name: str) -> FakeEngine:
        opened.append(name)
        time.sleep(0.02)
        return FakeEngine(lambda feeds: feeds)

    graphs = Graphs(("vision", "text"), open_graph)
    threads = [threading.Thread(target=graphs.engine, args=("vision",)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert opened == ["vision"]
    assert graphs.run("text", {"x": np.ones(1)})["x"] == 1 and opened == ["vision", "text"]


def test_a_graph_that_the_bundle_lacks() -> None:
    graphs = Graphs(("vision", "text"), lambda name: FakeEngine(lambda feeds: feeds))
    with pytest.raises(BundleError, match="no 'decoder' graph, which captions need; it has vision, text; export it"):
        graphs.engine("decoder")


def test_close_closes_every_engine() -> None:
    graphs = Graphs(("vision",), lambda name: FakeEngine(lambda feeds: feeds))
    engine = graphs.engine("vision")
    graphs.close()
    graphs.close()
    for run in (lambda: graphs.run("vision", {}), lambda: engine.run({}), lambda: graphs.engine("vision")):
        with pytest.raises(EngineError, match="closed"):
            run()


def test_an_engine_that_does_not_open_may_be_tried_again() -> None:
    attempts: list[str] = []

    def open_graph(name: str) -> FakeEngine:
        attempts.append(name)
        if len(attempts) == 1:
            raise EngineError("busy")
        return FakeEngine(lambda feeds: feeds)

    graphs = Graphs(("vision",), open_graph)
    with pytest.raises(EngineError, match="busy"):
        graphs.engine("vision")
    assert graphs.engine("vision") is graphs.engine("vision") and len(attempts) == 2
