"""What several tests of passes look at."""

from __future__ import annotations

from typing import Any

import pytest
from torch import fx

from kvsink.graph import backend


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[fx.Graph]:
    """Graphs behind the passes of the backend, as they come."""
    graphs: list[fx.Graph] = []
    run = backend.run_passes

    def keep(gm: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        report = run(gm, *args, **kwargs)
        graphs.append(gm.graph)
        return report

    monkeypatch.setattr(backend, "run_passes", keep)
    return graphs
