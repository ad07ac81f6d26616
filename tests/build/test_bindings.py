"""What the other tests here stand on: the bindings are the real ones, over empty libraries."""

from __future__ import annotations

from typing import Any


def test_the_real_bindings_import_without_the_libraries(bindings: Any) -> None:
    code = """
import tensorrt as trt, tensorrt.plugin as trtp
result = {
    "version": trt.__version__,
    "documented": "MemoryPoolType" in trt.IBuilderConfig.set_memory_pool_limit.__doc__,
    "plugin": callable(trtp.register) and callable(trtp.aot_impl),
}
"""
    assert bindings.run(code) == {"version": bindings.version, "documented": True, "plugin": True}


def test_code_run_against_the_bindings_finds_this_package(bindings: Any) -> None:
    assert bindings.run("import rtp_llm.errors as e; result = [e.__name__, given]", given=3) == [
        "rtp_llm.errors",
        3,
    ]
