"""Triton's /metrics shows what the HTTP server's shows, under the same names, while requests run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import requests

from rtp_llm.runtime.server.metrics import Metrics

from .calls import LONG, SECONDS, idle, metric, over_http, stream, streamed, until

ROOT = Path(__file__).parents[2]
CIRCLE = (ROOT / "tests" / "images" / "red_circle.png").read_bytes()


@pytest.fixture(scope="module")
def server(serve, qwen_bundle):
    server = serve(qwen_bundle, own=True)
    yield server
    server.stop()


def shown(server) -> str:
    return requests.get(f"http://{server.metrics}/metrics", timeout=SECONDS).text


def test_every_metric_of_the_http_server_is_there_with_its_type(server):
    text = shown(server)
    own = Metrics(lambda: None)
    for family in own.registry.collect():
        for name in {sample.name for sample in family.samples}:
            kind = "gauge" if family.type == "gauge" else "counter"
            assert f"# TYPE {name} {kind}" in text, name
            assert re.search(rf'^{name}{{.*version="1"', text, re.MULTILINE), name


def test_the_dashboards_queries_find_their_series(server):
    text = shown(server)
    dashboard = (ROOT / "runtime" / "server" / "grafana.json").read_text()
    for name in set(re.findall(r"rtp_llm_\w+", json.dumps(json.loads(dashboard)))):
        assert re.search(rf"^{name}{{", text, re.MULTILINE), name


def test_requests_are_counted_and_timed(server):
    until(lambda: idle(server))
    counts = ("time_to_first_token", "request_duration", "queue_time", "image_fetch")
    names = [*(f"{name}_seconds_count" for name in counts), "image_encode_batch_images_sum"]
    before = {name: metric(server, f"rtp_llm_{name}") for name in names}
    config = {"top_k": 1, "max_new_tokens": 20, "ignore_eos": True}
    tokens = metric(server, "rtp_llm_generated_tokens_total")
    for ask in (streamed, over_http):
        ask(server, text_input="<img/>What is this?", image=[CIRCLE], sampling_parameters=config)
    until(lambda: metric(server, "rtp_llm_generated_tokens_total") == tokens + 40, 2)
    wanted = dict.fromkeys(names, 2.0) | {"image_encode_batch_images_sum": 1.0}  # encoded once
    # histograms are copied every fourth time
    until(lambda: {n: metric(server, f"rtp_llm_{n}") - before[n] for n in names} == wanted, 4)
    buckets = metric(server, "rtp_llm_request_duration_seconds_bucket", le="+Inf")
    assert buckets == metric(server, "rtp_llm_request_duration_seconds_count")
    until(lambda: metric(server, "rtp_llm_requests_total", outcome="ok", kind="raw") >= 2, 2)


def test_what_runs_is_seen_while_it_runs(server):
    with stream(server) as one:
        for i in range(3):
            one.ask(str(i), text_input=f"hi {i}", sampling_parameters=LONG)
        until(lambda: metric(server, "rtp_llm_sequences_running") == 3, 2)
        until(lambda: metric(server, "rtp_llm_requests_in_flight") == 3, 2)
        until(lambda: metric(server, "rtp_llm_cache_blocks_running") >= 3, 2)
    until(lambda: idle(server), 2)
