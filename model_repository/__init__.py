"""What Triton Inference Server loads: thin models around the runtime; `rtp-llm tritonserver` fills it in."""
