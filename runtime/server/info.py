"""What is served, how it fares, and how texts become tokens."""

from __future__ import annotations

import dataclasses
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.responses import HTMLResponse, PlainTextResponse, Response

from ...errors import BadField, shown
from ..service import Service, check_parts
from .failures import HttpError
from .metrics import CONTENT_TYPE
from .page import page
from .schemas import ChatRequest, DetokenizeRequest, EncodeRequest, TokenizeRequest
from .wire import Json, StrictRoute

NOT_READY: dict[int | str, dict[str, Any]] = {503: {"description": "Loading or draining"}}
router = APIRouter(route_class=StrictRoute)


@router.get("/", response_class=HTMLResponse, tags=["playground"])
@router.head("/", include_in_schema=False)
async def playground() -> Response:
    """The playground page."""
    return page()


@router.get("/v1/models", tags=["OpenAI"])
async def models(http: HttpRequest) -> Response:
    """The one model that is served."""
    return Json({"object": "list", "data": [_model(http.app.state.service)]})


@router.get("/v1/models/{name:path}", tags=["OpenAI"])
async def model(name: str, http: HttpRequest) -> Response:
    """The model, if it bears this name."""
    service: Service = http.app.state.service
    if name != service.model_name:
        raise HttpError(404, f"there is no model {shown(name)}, only {service.model_name!r}", "404_NOT_FOUND")
    return Json(_model(service))


def _model(service: Service) -> dict[str, Any]:
    bundle = service.pipeline.model.bundle
    return {
        "id": service.model_name,
        "object": "model",
        "created": service.created,
        "owned_by": "rtp-llm",
        "max_model_len": service.max_model_len,
        "family": bundle.model.family,
        "precision": bundle.precision,
        "input": ["text", "image"],
        "output": ["text"],
        "max_images": service.settings.max_images,
        "max_image_pixels": service.settings.max_pixels,
        "image_tokens": bundle.vision.tokens,
    }


# ---------------------------------------------------------------------------------------- operation


@router.get("/health", tags=["operation"], responses=NOT_READY)
@router.get("/health/ready", tags=["operation"], responses=NOT_READY)
async def ready(http: HttpRequest) -> Response:
    """200 while requests are taken, else 503."""
    phase = http.app.state.service.phase
    return Json({"status": "ok" if phase == "ready" else phase}, 200 if phase == "ready" else 503)


@router.get("/health/live", tags=["operation"])
async def live() -> Response:
    """200 as long as the process answers."""
    return Json({"status": "ok"})


@router.get("/status", tags=["operation"])
async def status(http: HttpRequest) -> Response:
    """Phase, model and load in one answer."""
    service: Service = http.app.state.service
    if not service.loaded:
        return Json({"status": service.phase, "model": None})
    return Json({"status": service.phase, "model": service.model_name} | _load(service))


@router.get("/worker_status", tags=["operation"])
async def worker_status(http: HttpRequest) -> Response:
    """Requests running and waiting, and what the engine has done since it was made."""
    return Json(_load(http.app.state.service))


@router.get("/cache_status", tags=["operation"])
async def cache_status(http: HttpRequest) -> Response:
    """Use and hit rates of the two caches: keys and values of prompts, encoded images."""
    service: Service = http.app.state.service
    s = service.pipeline.model.engine.stats()
    free = s.blocks - s.blocks_running - s.blocks_retained
    return Json(
        {
            "block_size": 16,
            "block_bytes": s.block_bytes,
            "total_blocks": s.blocks,
            "running_blocks": s.blocks_running,
            "retained_blocks": s.blocks_retained,
            "free_blocks": free,
            "total_kv_cache": 16 * s.blocks,
            "available_kv_cache": 16 * (free + s.blocks_retained),
            "prompt_tokens": s.prompt_tokens,
            "reused_tokens": s.reused_tokens,
            "hit_rate": _rate(s.reused_tokens, s.prompt_tokens),
            "image_bytes": s.image_bytes,
            "image_budget": s.image_budget,
            "images": s.images,
            "image_hits": s.image_hits,
            "image_hit_rate": _rate(s.image_hits, s.images),
        }
    )


def _load(service: Service) -> dict[str, Any]:
    stats = dataclasses.asdict(service.pipeline.model.engine.stats())
    return {
        "running": stats.pop("running"),
        "waiting": stats.pop("waiting"),
        "concurrency_limit": service.settings.concurrency_limit,
        "max_model_len": service.max_model_len,
        **stats,
        "prefix_hit_rate": _rate(stats["reused_tokens"], stats["prompt_tokens"]),
        "image_hit_rate": _rate(stats["image_hits"], stats["images"]),
    }


def _rate(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


# ------------------------------------------------------------------------------------------- tokens


@router.post("/chat/render", tags=["tokens"])
@router.post("/v1/chat/render", tags=["tokens"])
async def render(body: ChatRequest, http: HttpRequest) -> Response:
    """The exact prompt text and token ids that a chat request becomes; no picture is fetched."""
    check_parts(body.messages)
    body.config()
    text, ids = await _rendered(http.app.state.service, body.messages)
    return Json({"prompt": text, "token_ids": ids, "count": len(ids)})


@router.post("/tokenize", tags=["tokens"])
async def tokenize(body: TokenizeRequest, http: HttpRequest) -> Response:
    """Token ids of a raw prompt, or of a conversation."""
    service: Service = http.app.state.service
    prompt = body.prompt
    if body.messages is not None:
        check_parts(body.messages)
        _, ids = await _rendered(service, body.messages)
    else:
        assert prompt is not None
        ids = await service.text(lambda: service.pipeline.encode(prompt), prompt)
    return Json({"tokens": ids, "count": len(ids), "max_model_len": service.max_model_len})


@router.post("/tokenizer/encode", tags=["tokens"])
async def encode(body: EncodeRequest, http: HttpRequest) -> Response:
    """Token ids of a raw prompt, and how each is spelled."""
    service: Service = http.app.state.service
    ids = await service.text(lambda: service.pipeline.encode(body.prompt), body.prompt)
    tokenizer = service.pipeline.tokenizer
    return Json({"token_ids": ids, "tokens": [tokenizer.id_to_token(i) if i >= 0 else None for i in ids]})


@router.post("/detokenize", tags=["tokens"])
async def detokenize(body: DetokenizeRequest, http: HttpRequest) -> Response:
    """The text of token ids, control tokens shown."""
    service: Service = http.app.state.service
    bundle = service.pipeline.model.bundle
    for at, i in enumerate(body.tokens):
        if not 0 <= i < bundle.model.vocab_size and i != bundle.prompt.image.token_id:
            raise BadField(
                "tokens",
                f"tokens[{at}] is {shown(i)}, outside the vocabulary, 0 to {bundle.model.vocab_size - 1}",
            )
    return Json({"prompt": await service.text(lambda: service.pipeline.decode(body.tokens))})


async def _rendered(service: Service, messages: list[Any]) -> tuple[str, list[int]]:
    return await service.text(lambda: service.pipeline.render(messages), messages)


@router.get("/metrics", tags=["operation"], response_class=PlainTextResponse)
async def metrics(http: HttpRequest) -> Response:
    """Prometheus text."""
    return Response(http.app.state.service.metrics.render(), media_type=CONTENT_TYPE)
