"""rtp_llm: compile vision-language models into bundles and answer from them."""

__version__ = "0.1.0"
