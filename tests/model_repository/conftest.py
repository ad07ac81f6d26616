"""The real server on a bundle's repository; its program is in tests/conftest.py."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from rtp_llm.export.bundle import read
from rtp_llm.runtime.tritonserver import binary, repository
from rtp_llm.runtime.tritonserver.launch import Tritonserver

Serve = Callable[..., Tritonserver]


@pytest.fixture(scope="session")
def serve(triton_binary: binary.Binary, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """serve(bundle, own=False, extra=(), drain=30, **options of assemble) → a ready server.

    Servers of equal arguments are one and the same, until the session ends; own=True gives the test one that
    it may break and should stop.
    """
    running: dict[str, Tritonserver] = {}
    with ExitStack() as stack, ThreadPoolExecutor() as stopping:

        def start(bundle: Path, own: bool = False, extra: Any = (), drain: float = 30, **options: Any) -> Any:
            key = json.dumps([str(bundle), list(extra), drain, options], sort_keys=True)
            if not own and key in running:
                return running[key]
            folder = tmp_path_factory.mktemp("repository") / "models"
            repository.assemble(read(bundle), folder, **options)
            server = Tritonserver(folder, extra=extra, binary=triton_binary, drain=drain)
            stack.enter_context(server)
            if not own:
                running[key] = server
            return server

        yield start
        list(stopping.map(Tritonserver.stop, running.values()))  # each takes seconds
