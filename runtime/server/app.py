"""The routes, put together."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from ... import __version__
from ...errors import RtpLlmError
from ..service import Service
from . import chat, failures, info, raw
from .guard import Guard
from .schemas import ErrorResponse


def make_app(service: Service) -> Guard:
    """The whole ASGI application."""
    app = FastAPI(
        title="rtp-llm",
        version=__version__,
        docs_url=None,  # FastAPI's pages load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        responses=failures.described(ErrorResponse),
    )
    app.state.service = service
    for kind in (RtpLlmError, HTTPException, RequestValidationError, Exception):
        app.exception_handler(kind)(failures.handle)
    for module in (chat, raw, info):
        app.include_router(module.router)
    return Guard(app, service)
