"""`vlm`, whole answers only: all of it is the runtime's."""

from rtp_llm.runtime.tritonserver.complete import VlmComplete as TritonPythonModel  # noqa: F401
