"""The language model, one answer token by token: all of it is the runtime's."""

from rtp_llm.runtime.tritonserver.vlm import Vlm as TritonPythonModel  # noqa: F401
