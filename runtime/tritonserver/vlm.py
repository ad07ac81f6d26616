"""Triton's model `vlm`: the Service on an event loop of its own, a response for each step."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import threading
import uuid
from contextlib import aclosing
from typing import Any

import numpy as np

from ...errors import BadField, InternalError, RtpLlmError
from ...export.bundle import read as read_bundle
from ..sequence import answers_of
from ..server import logs
from ..server.loading import open_pipeline
from ..service import SANE_ID, Call, Service, check_size, told
from . import codes
from .cancellation import Sender, Watch
from .metrics import Mirror
from .remote_vision import remote_encode
from .tensors import (
    Asked,
    Deltas,
    answer,
    check_fingerprint,
    failure,
    flag,
    loading,
    parameters_of,
    read,
    settings_of,
    with_pictures,
)

CLIENT_GONE = 499  # in the log
log = logging.getLogger(__name__)


class Vlm:
    """The methods that the Python backend calls."""

    def initialize(self, args: dict[str, str]) -> None:
        with loading():
            settings, parameters = settings_of(args["model_config"])
            logs.setup(settings.json_logs)
            where = parameters["vision"]
            elsewhere = where != "in-process"
            encode = remote_encode(where, read_bundle(parameters["bundle"])) if elsewhere else None
            pipeline = open_pipeline(settings, encode)
        self._name = args["model_name"]
        self._service = Service(settings)
        self._service.ready(pipeline)
        self._loop = asyncio.new_event_loop()
        self._running: dict[str, set[asyncio.Task[Any]]] = {}  # by Triton's request id
        self._thread = threading.Thread(target=self._loop.run_forever, name="serve", daemon=True)
        self._thread.start()
        self._watch = Watch()
        labels = {"model": self._name, "version": args["model_version"]}
        self._mirror = Mirror(self._service.metrics.registry, labels)

    def execute(self, requests: list[Any]) -> None:
        """Hands over: responses come from the loop's thread."""
        for request in requests:
            work = self._serve(request, Sender(request))
            asyncio.run_coroutine_threadsafe(work, self._loop)

    def finalize(self) -> None:
        """Triton has waited for the running requests."""
        self._watch.close()
        self._mirror.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()
        self._service.close()

    async def _serve(self, request: Any, sender: Sender) -> None:
        """Exactly one final response, whatever happens."""
        try:
            name, parameters = request.request_id(), parameters_of(request)
            # copies (of numbers; pictures are Python's own): what the request holds goes with it
            tensors = {t.name(): t.as_numpy().copy() for t in request.inputs()}
            stop = flag(tensors, "stop", False)
            if stop and not name:
                raise BadField("stop", "stop ends the request of the same request id, and this has none")
        except RtpLlmError as e:
            sender.finish(failure(codes.message_of(e)))
            return
        except Exception:  # out of memory
            log.exception("a request could not be read")
            sender.finish(failure(codes.message_of(InternalError("the request could not be read"))))
            return
        finally:
            del request
        if stop:
            for running in self._running.get(name, ()):
                running.cancel()
            nothing = answer([b""], np.full((1, 1), -1, np.int32), [b""])
            sender.finish(nothing)
            return
        task = asyncio.current_task()
        assert task is not None
        self._running.setdefault(name, set()).add(task)
        self._watch.begin(sender, lambda: self._loop.call_soon_threadsafe(task.cancel))
        call = self._service.begin(
            name if SANE_ID.fullmatch(name) else uuid.uuid4().hex,
            "chat" if "messages" in tensors else "raw",
        )
        logs.request_id.set(call.id)
        status = 200
        try:
            asked = await self._service.text(lambda: read(tensors, parameters, self._service.settings))
            tensors.clear()
            final = await self._answer(call, asked, sender)
        except asyncio.CancelledError as e:
            call.error, status = e, CLIENT_GONE
            final = failure(codes.CANCELLED)
        except Exception as e:
            tell = told(e, call)
            final, status = failure(codes.message_of(tell)), tell.status
        finally:
            self._watch.end(sender)
            self._running[name].discard(task)
            if not self._running[name]:
                del self._running[name]
            self._service.end(call, "POST", self._name, status)
        sender.finish(final)  # after its place is free for the client's next

    async def _answer(self, call: Call, asked: Asked, sender: Sender) -> Any:
        """The last response; the others are sent."""
        service = self._service
        call.salt = asked.salt
        call.admit(answers_of(asked.config))
        prefix = ""
        if asked.echo and asked.messages is not None:
            messages = with_pictures(asked.messages)
            prefix, _ = await service.text(lambda: service.pipeline.render(messages), messages)
        elif asked.echo and asked.prompt is not None:
            prompt = asked.prompt
            if isinstance(prompt, list):
                prefix = await service.text(lambda: service.pipeline.decode(prompt), prompt)
            else:
                prefix = prompt
        if asked.image_embeds is not None:
            check_fingerprint(asked.fingerprint, service.pipeline.model.bundle)
        request = await service.prepare(
            call, asked.config, asked.prompt, asked.images or None, asked.messages, asked.image_embeds
        )
        asked.images.clear()
        check_size([request])
        deltas = Deltas(request.params.answers, prefix, request.params.return_output_ids)
        request.params = dataclasses.replace(
            request.params, return_output_ids=True, return_incremental=False
        )
        async with aclosing(service.generate(call, request)) as responses:
            async for response in responses:
                if response.finished:
                    break
                if asked.stream and deltas.news(response):
                    sender.send(deltas.response(response))
        return await service.text(lambda: deltas.response(response))
