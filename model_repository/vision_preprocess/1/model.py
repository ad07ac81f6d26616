"""A picture's file → pixels: all of it is the runtime's."""

from rtp_llm.runtime.tritonserver.vision import Preprocess as TritonPythonModel  # noqa: F401
