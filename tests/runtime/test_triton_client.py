"""TritonPipeline where there is no server: tests/model_repository/test_client.py has the rest."""

from __future__ import annotations

import socket
import subprocess
import sys

import grpc
import pytest

from rtp_llm.errors import GenerationTimeout, NotReady, UserError
from rtp_llm.runtime.triton_client import TritonPipeline

CODE = """
import sys
for name in ("fastapi", "prometheus_client", "pydantic", "starlette", "tritonclient", "uvicorn"):
    sys.modules[name] = None
from rtp_llm.runtime.triton_client import TritonPipeline
try:
    TritonPipeline()
except Exception as e:
    print(type(e).__name__, e)
"""


@pytest.mark.slow
def test_it_needs_no_server_packages_and_without_tritonclient_names_the_pip_command():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("MissingDependency") and "pip install" in done.stdout, done.stderr


def test_wrong_tls_files_are_told_at_each_call():
    pipeline = TritonPipeline("127.0.0.1:1", ssl=True, root_certificates="/no/such/file")
    for _ in range(2):
        with pytest.raises(UserError, match="127.0.0.1:1 cannot be connected to: .*/no/such/file"):
            next(iter(pipeline("hi")))


def test_a_server_of_this_machine_is_reached_without_the_proxy(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        proxy.settimeout(3)
        for name in ("http_proxy", "https_proxy", "grpc_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.getsockname()[1]}")
        for name in ("no_proxy", "no_grpc_proxy"):
            monkeypatch.delenv(name, raising=False)
        pipeline = TritonPipeline("127.0.0.1:1", timeout=2)
        with pytest.raises(NotReady, match="no Triton server answers"):
            next(iter(pipeline("hi")))
        pipeline.stop()


class Died(grpc.RpcError):
    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.DEADLINE_EXCEEDED

    def details(self) -> str:
        return "upstream request timeout"


def test_a_deadline_of_a_proxy_is_told_too():
    """An error within it would leave the caller waiting for good."""
    error = TritonPipeline("127.0.0.1:1")._connection.error(Died(), None)
    assert isinstance(error, GenerationTimeout)
