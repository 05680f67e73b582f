from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.threads import single_thread


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    with single_thread():
        yield
