"""The HTTP server: OpenAI's chat endpoint, the raw form, and what operators need, on FastAPI and uvicorn."""
