"""A private cluster on a machine that is too busy for it.  pytest tests/test_connect.py"""

from __future__ import annotations

from typing import Any

import pytest
import ray

from cluster import connect

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Ray's, about itself
]
TOO_SLOW = "The current node timed out during startup. This could happen because ..."


@pytest.mark.parametrize("failures", [1, connect.STARTS])
def test_a_start_that_took_too_long_is_tried_again(
    failures: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, begun = ray.init, 0

    def init(**options: Any) -> Any:
        nonlocal begun
        begun += 1
        if begun <= failures:
            raise Exception(TOO_SLOW)
        return begin(**options)

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", init)
    try:
        if failures < connect.STARTS:
            assert connect.connect(env_vars={}).is_private and ray.is_initialized()
        else:
            with pytest.raises(RuntimeError, match="Run the same command again"):
                connect.connect(env_vars={})
        assert begun == min(failures + 1, connect.STARTS)
    finally:
        ray.shutdown()
