"""Pixels → what the decoder reads: all of it is the runtime's."""

from rtp_llm.runtime.tritonserver.vision import Tower as TritonPythonModel  # noqa: F401
