"""TritonPipeline: Pipeline's calls, answered by the model `vlm` of a Triton Inference Server over gRPC."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import io
import json
import os
import threading
import time
import uuid
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..errors import (
    GenerationTimeout,
    ImageUnsupported,
    ImageWrongFormat,
    InternalError,
    MissingDependency,
    NotReady,
    RtpLlmError,
    UserError,
)
from ..pipeline import Pipeline, check_count, pictures_of
from .media import LoadedImage, MediaPolicy, is_url, read
from .preprocess import to_rgb
from .prompt import EncodedPrompt
from .request import DEFAULT_NEW_TOKENS, AuxInfo, GenerateOutput, GenerateResponse, Request, image_list
from .sequence import SamplingParams
from .tritonserver.codes import error_of

if TYPE_CHECKING:
    from tritonclient.grpc.aio import InferenceServerClient

    from ..export.bundle import Bundle

IN_FLIGHT = 32  # requests of `batch` at once
GRACE = 5.0  # seconds that a server has, after a request's own timeout_ms, to say that it is over
PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")
MEDIA = b"data:application/octet-stream;base64,"


class TritonPipeline(Pipeline):
    """A Pipeline whose model runs in a Triton Inference Server that `rtp-llm tritonserver` assembled.

    URLs are fetched by the server, under its policy; paths, bytes, file objects and PIL images are read here,
    under `media_policy` (one without `allow_local` leaves paths to the server).

    bundle: its prompt rules and tokenizer, for `encode`, `decode` and `render`, and to refuse wrong requests
    before they travel. headers: sent with every call. timeout: s for one whole answer. connection: TLS
    arguments of tritonclient.grpc.aio.InferenceServerClient (`ssl`, `root_certificates`, …). Threads share
    one connection, which comes back by itself after a restart of the server. Raises MissingDependency.
    """

    def __init__(
        self,
        url: str = "localhost:8001",
        *,
        bundle: str | os.PathLike[str] | Bundle | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,
        media_policy: MediaPolicy | None = None,
        **connection: Any,
    ):
        if bundle is not None:
            from ..export import bundle as bundles
            from ..model_factory import Model, open_tokenizer

            opened = bundle if isinstance(bundle, bundles.Bundle) else bundles.read(bundle)
            engine: Any = None  # it is the server's
            super().__init__(Model(opened, open_tokenizer(opened), engine))
        self.media_policy = media_policy or MediaPolicy()
        self._bundle = bundle is not None
        self._left = False
        self._headers, self._timeout = dict(headers or {}), timeout
        self._connection = _Connection(url, connection)
        weakref.finalize(self, self._connection.close)

    def prepare(
        self,
        prompt: str | list[int] | None = None,
        urls: Any = None,
        images: Any = None,
        *,
        messages: list[dict[str, Any]] | None = None,
        generate_config: Mapping[str, Any] | None = None,
        image_embeds: np.ndarray | None = None,
        salt: bytes = b"",
        max_images: int | None = None,
        arrived: float | None = None,
        abandoned: Callable[[], bool] = bool,
    ) -> RemoteRequest:
        """Check a request as far as that can be done here, and read its local pictures.

        `image_embeds` need the bundle, and a server that takes them.
        """
        images = pictures_of(prompt, urls, images, messages, image_embeds)
        if self._left:
            raise UserError("this Pipeline's `with` block was left: make a new Pipeline")
        if image_embeds is not None:
            self._need_bundle()
            images = list(range(len(image_embeds)))
        sources = list(image_list(images))
        encoded, defaults = None, {}
        if self._bundle:
            defaults = self.model.bundle.generation.defaults
            if messages is not None:
                encoded = self._prompts.encode_chat(messages, sources if sources else None)
            else:
                assert prompt is not None
                encoded = self._prompts.encode_prompt(prompt, sources)
            check_count(encoded, max_images)
        config = {k: v for k, v in (generate_config or {}).items() if v is not None}
        params = SamplingParams.from_config(config, defaults)
        config.pop("return_incremental", None)  # the collector's matter
        inputs: dict[str, Any] = {"sampling_parameters": [_json(config, "generate_config")]}
        if messages is not None:
            given = iter(sources)
            inputs["messages"] = [_json(self._portable(messages, given), "messages")]
            if left := len(list(given)):
                raise ImageWrongFormat(
                    f"{len(sources)} images were given, and messages have no parts for {left} of them"
                )
        elif isinstance(prompt, str):
            inputs["text_input"] = [_utf8(prompt)]
        else:
            inputs["input_ids"] = _ids(prompt)
        if image_embeds is not None:
            inputs["image_embeds"] = np.asarray(image_embeds, np.float32)
            inputs["image_embeds_fingerprint"] = [self.model.bundle.origin.fingerprint.encode()]
        elif messages is None:
            inputs |= self._pictures(sources)
        return RemoteRequest(self, params, inputs, encoded, salt)

    def batch(
        self, requests: Iterable[Mapping[str, Any]], in_flight: int | None = None
    ) -> Iterator[tuple[int, GenerateResponse | RtpLlmError]]:
        """As Pipeline's; at most `in_flight` [32] requests are at the server."""
        return super().batch(requests, in_flight or IN_FLIGHT)

    def encode(self, text: str) -> list[int]:
        self._need_bundle()
        return super().encode(text)

    def decode(self, ids: int | list[int]) -> str:
        self._need_bundle()
        return super().decode(ids)

    def render(self, messages: list[dict[str, Any]]) -> tuple[str, list[int]]:
        self._need_bundle()
        return super().render(messages)

    def stop(self) -> None:
        """Cancel what runs and close the connection; idempotent; a later call opens it again."""
        self._connection.close()

    def _need_bundle(self) -> None:
        if not self._bundle:
            raise UserError(
                "Triton serves no tokenizer: give the bundle's folder, TritonPipeline(…, bundle=PATH)"
            )

    # ------------------------------------------------------------------------------------ pictures

    def _pictures(self, sources: Iterable[Any]) -> dict[str, list[bytes]]:
        """The inputs that hold the pictures; `image` come first, so other orders travel as data: URIs."""
        read = [self._picture(source) for source in sources]
        kinds = [isinstance(one, bytes) for one in read]
        data = [one for one in read if isinstance(one, bytes)]
        if kinds != sorted(kinds, reverse=True):
            data = []
        urls = [_uri(one) for one in read[len(data) :]]
        return {name: found for name, found in (("image", data), ("image_url", urls)) if found}

    def _picture(self, source: Any) -> bytes | str:
        """A URL as it is; anything else as the bytes of a picture."""
        if isinstance(source, str):
            if is_url(source) or source[:5].lower() == "data:" or not self.media_policy.allow_local:
                return source
        if not isinstance(source, Image.Image):
            return read(source, self.media_policy)
        if self._bundle:  # of a PIL image references treat transparency and EXIF in another way
            picture = to_rgb(LoadedImage(source, from_pil=True), self.model.bundle.vision.loading)
        elif source.mode in PNG_MODES:
            picture = source
        else:
            try:
                picture = source.convert("RGB")
            except ValueError as e:
                raise ImageUnsupported(f"a PIL image of mode {source.mode} cannot become RGB: {e}") from e
        out = io.BytesIO()
        picture.save(out, "PNG", compress_level=1)
        return out.getvalue()

    def _portable(self, messages: Any, given: Iterator[Any]) -> Any:
        """Messages as JSON can hold them, `given` the pictures of parts without one; what is wrong with them
        the server tells."""
        if isinstance(messages, list | tuple):
            return [self._portable(one, given) for one in messages]
        if not isinstance(messages, Mapping):
            return messages
        kind, holder = messages.get("type"), messages.get("image_url")
        if kind == "image":
            found = next((s for k in ("image", "url", "path") if (s := messages.get(k)) is not None), None)
            source = next(given, None) if found is None else found
        elif kind == "image_url":
            source = holder.get("url") if isinstance(holder, Mapping) else holder
            source = source if isinstance(source, str) else None
        else:
            return {k: self._portable(v, given) if k == "content" else v for k, v in messages.items()}
        if source is None or (isinstance(source, str | bytes) and not source):
            return messages
        inner = dict(holder) if isinstance(holder, Mapping) else {}
        url = _uri(self._picture(source)).decode()
        return {"type": "image_url", "image_url": inner | {"url": url}}


def _uri(picture: bytes | str) -> bytes:
    return _utf8(picture) if isinstance(picture, str) else MEDIA + base64.b64encode(picture)


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as e:
        raise UserError(f"the text holds half a character (a lone surrogate) at {e.start}") from e


def _ids(prompt: Any) -> np.ndarray:
    try:
        ids = np.array(prompt)
        if ids.dtype.kind in "iu" and ids.ndim == 1 and ids.size:
            return ids.astype(np.int64)
    except (ValueError, OverflowError):
        pass
    raise UserError(f"the prompt is {type(prompt).__name__}, expected a string or a list of token ids")


def _json(value: Any, name: str) -> bytes:
    def refuse(part: Any) -> Any:
        raise UserError(f"{name} holds {type(part).__name__}, which JSON has no place for")

    try:
        return json.dumps(value, default=refuse, allow_nan=False).encode()
    except (ValueError, RecursionError) as e:  # NaN, a list in itself
        raise UserError(f"{name}: {e}") from e


# ------------------------------------------------------------------------------------- one request


class RemoteRequest(Request):
    """A request that is ready to be sent: what a Request is to its reader."""

    def __init__(
        self,
        pipeline: TritonPipeline,
        params: SamplingParams,
        inputs: Mapping[str, Any],
        encoded: EncodedPrompt | None,
        salt: bytes,
    ):
        self.params = params
        self.max_new_tokens = DEFAULT_NEW_TOKENS if params.max_new_tokens is None else params.max_new_tokens
        if encoded is not None:
            self.model = pipeline.model
            bundle = self.model.bundle
            prompt = len(encoded.ids) + bundle.vision.tokens * len(encoded.slots)
            self.max_new_tokens = max(0, min(self.max_new_tokens, bundle.model.max_seq_len - prompt))
        self._connection, self._headers = pipeline._connection, pipeline._headers
        self._timeout = pipeline._timeout
        if params.timeout_ms and (self._timeout is None or self._timeout * 1000 > params.timeout_ms):
            self._timeout = params.timeout_ms / 1000 + GRACE
        self._inputs, self._salt = inputs, salt
        self._running: Future[None] | None = None
        self._complete = False

    def start(self, publish: Callable[[tuple[int, Any, Any]], None]) -> None:
        self._running = self._connection.submit(lambda client: self._run(client, publish))

    def cancel(self) -> None:
        if self._running is not None and not self._complete:
            self._running.cancel()

    async def _run(
        self, client: InferenceServerClient, publish: Callable[[tuple[int, Any, Any]], None]
    ) -> None:
        from grpc import RpcError

        error: RtpLlmError | None = None
        try:
            await self._receive(client, publish)
            if not self._complete:
                error = InternalError("the server ended the stream before the answer")
        except asyncio.CancelledError:
            publish((0, None, UserError("the request was cancelled: the pipeline was stopped")))
            raise
        except RpcError as e:
            error = self._connection.error(e, self._timeout)
        except RtpLlmError as e:
            error = e
        except Exception as e:
            error = InternalError(f"{type(e).__name__}: {e}")
        if error is not None:
            publish((0, None, error))

    async def _receive(
        self, client: InferenceServerClient, publish: Callable[[tuple[int, Any, Any]], None]
    ) -> None:
        answers = [_Answer() for _ in range(self.params.answers)]
        responses = client.stream_infer(self._message(), stream_timeout=self._timeout, headers=self._headers)
        try:
            async for result, error in responses:
                if error is not None:
                    raise self._connection.told(error.message())
                usage, details = (_parsed(result, name) for name in ("usage", "details"))
                details = details or [{}] * len(answers)
                told = {name: result.as_numpy(name) for name in ("text_output", "token_ids", "finish_reason")}
                # the last response ends every answer
                self._complete = usage is not None
                for i, answer in enumerate(answers):
                    answer.add(told["text_output"][i].decode(), told["token_ids"][i], details[i])
                    if reason := told["finish_reason"][i].decode():
                        answer.output.finish_reason = reason
                    if usage is not None:
                        answer.end(usage["aux_info"][i])
                    publish((i, answer.snapshot(self.params), None))
        finally:
            responses.cancel()

    async def _message(self) -> AsyncIterator[dict[str, Any]]:
        from tritonclient.grpc import InferInput
        from tritonclient.utils import np_to_triton_dtype

        inputs = []
        for name, value in self._inputs.items():
            array = value if isinstance(value, np.ndarray) else np.array(value, np.object_)
            tensor = InferInput(name, array.shape, np_to_triton_dtype(array.dtype))
            inputs.append(tensor.set_data_from_numpy(array))
        message: dict[str, Any] = {"model_name": "vlm", "inputs": inputs}
        message["request_id"] = self.params.request_id or uuid.uuid4().hex
        if self._salt:
            message["parameters"] = {"cache_salt": self._salt.hex()}
        yield message


def _parsed(result: Any, name: str) -> Any:
    """The JSON of an output, None where there is none."""
    text = result.as_numpy(name)
    return None if text is None or not text[0] else json.loads(text[0])


class _Answer:
    """One answer as it grows."""

    def __init__(self) -> None:
        self.output = GenerateOutput()
        self._text = ""
        self._ids: list[int] = []
        self._logprobs: list[dict[str, Any]] = []
        self._began, self._first = time.monotonic(), 0.0

    def add(self, text: str, ids: np.ndarray, details: Mapping[str, Any]) -> None:
        self._text += text
        self._ids += ids[ids >= 0].tolist()
        if self._ids and not self._first:
            self._first = time.monotonic()
        for name, value in details.items():
            if name == "logprobs":
                self._logprobs += [e | {"top": [tuple(pair) for pair in e["top"]]} for e in value]
            else:
                setattr(self.output, name, _restored(name, value))

    def end(self, aux: Mapping[str, Any]) -> None:
        self.output.finished = True
        self.output.aux_info = AuxInfo(**aux)

    def snapshot(self, params: SamplingParams) -> tuple[str, GenerateOutput]:
        output = dataclasses.replace(self.output)
        if not output.finished:  # the server tells the rest at the end
            now = time.monotonic()
            output.aux_info = AuxInfo(
                cost_time=1000 * (now - self._began),
                first_token_cost_time=1000 * ((self._first or now) - self._began),
                output_len=len(self._ids),
            )
        if params.return_output_ids:
            output.output_ids = list(self._ids)
        if params.logprobs:
            output.logprobs = list(self._logprobs)
        return self._text, output


def _restored(name: str, value: Any) -> Any:
    """Details as the Pipeline gives them; JSON has null for a loss's NaN and a banned token's −inf."""
    if name in ("logits", "all_probs"):
        array = np.array(value, np.float64)
        return np.nan_to_num(array, nan=-np.inf).astype(np.float32) if name == "logits" else array
    if name == "loss" and isinstance(value, list):
        return np.array(value, np.float64)
    return value


# ---------------------------------------------------------------------------------- the connection


class _Connection:
    """A thread with the event loop on which the client of all calls lives; opened at the first call."""

    def __init__(self, url: str, options: Mapping[str, Any]):
        self.url = url
        try:
            from tritonclient.grpc.aio import InferenceServerClient
        except (ImportError, RuntimeError) as e:  # tritonclient's own, where grpc is not there
            raise MissingDependency(
                'a remote pipeline needs tritonclient: pip install "tritonclient[grpc]"'
            ) from e
        own = url.rpartition(":")[0].strip("[]") in ("localhost", "127.0.0.1", "::1")
        # HTTP_PROXY, which gRPC obeys, leads nowhere then
        channel = [*CHANNEL, ("grpc.enable_http_proxy", 0)] if own else CHANNEL
        self._open = lambda: InferenceServerClient(url, channel_args=channel, **options)
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def submit(self, work: Callable[[InferenceServerClient], Coroutine[Any, Any, None]]) -> Future[None]:
        with self._lock:
            if self._thread is None:
                ready: Future[Any] = Future()
                self._thread = threading.Thread(
                    target=lambda: asyncio.run(self._live(ready)), name="triton-client", daemon=True
                )
                self._thread.start()
                try:
                    self._loop, self._client, self._end = ready.result()
                except Exception as e:
                    self._thread = None
                    raise UserError(f"Triton at {self.url} cannot be connected to: {e}") from e
            return asyncio.run_coroutine_threadsafe(work(self._client), self._loop)

    async def _live(self, ready: Future[Any]) -> None:
        end = asyncio.Event()
        try:
            async with self._open() as client:
                ready.set_result((asyncio.get_running_loop(), client, end))
                await end.wait()
        except Exception as e:  # wrong TLS files
            ready.set_exception(e)

    def close(self) -> None:
        with self._lock:
            if self._thread is not None:
                self._loop.call_soon_threadsafe(self._end.set)
                if self._thread is not threading.current_thread():  # on which a pipeline may be collected
                    self._thread.join()
                self._thread = None

    def error(self, error: Any, timeout: float | None) -> RtpLlmError:
        """Ours, of what gRPC raised."""
        code, details = error.code().name, error.details() or ""
        if code == "DEADLINE_EXCEEDED":
            limit = f"{timeout:g} s" if timeout else "the time that a proxy on the way allows"
            return GenerationTimeout(f"{self.url} gave no whole answer within {limit}")
        if code == "UNAVAILABLE":
            return NotReady(f"no Triton server answers at {self.url} (its gRPC port): {details}")
        if code == "CANCELLED":
            return UserError("the request was cancelled: the pipeline was stopped")
        return self.told(details)

    def told(self, message: str) -> RtpLlmError:
        """The error that the server's message tells; Triton's own become one of ours."""
        if error := error_of(message):
            return error
        kind = UserError if "unknown model" in message else InternalError
        return kind(f"Triton at {self.url}: {message}")


# sizes are tritonclient's own; after a restart the server is found within half a second, not two minutes
CHANNEL = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
]
