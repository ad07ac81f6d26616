"""Prometheus metrics: what is counted, that a parser reads it, and that the dashboard shows all of it."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from rtp_llm.errors import GenerationTimeout, ImageDecodeError, InternalError, Overloaded
from rtp_llm.runtime.engine import Stats
from rtp_llm.runtime.request import AuxInfo
from rtp_llm.runtime.server import metrics
from rtp_llm.runtime.server.metrics import Metrics, outcome_of

DASHBOARD = Path(metrics.__file__).with_name("grafana.json")


def samples(of: Metrics) -> dict[str, float]:
    """name{label=value,…} → value, by Prometheus' own parser."""
    families = text_string_to_metric_families(of.render().decode())
    return {
        s.name + "".join(f"{{{k}={v}}}" for k, v in sorted(s.labels.items())): s.value
        for family in families
        for s in family.samples
    }


def test_a_request_is_counted_once_with_its_outcome_times_and_tokens() -> None:
    m = Metrics(lambda: None)
    m.started()
    m.started()
    assert samples(m)["rtp_llm_requests_in_flight"] == 2
    m.fetched(0.2)
    m.first_token(0.3)
    m.between_tokens(0.04)
    m.finished("ok", "chat", AuxInfo(wait_time=250.0, input_len=40), tokens=7, seconds=1.5)
    m.finished("user_error", "raw", None, tokens=0, seconds=0.01)
    found = samples(m)
    assert found["rtp_llm_requests_in_flight"] == 0
    assert found["rtp_llm_requests_total{kind=chat}{outcome=ok}"] == 1
    assert found["rtp_llm_requests_total{kind=raw}{outcome=user_error}"] == 1
    assert found["rtp_llm_requests_total{kind=chat}{outcome=internal}"] == 0
    sums = {
        "request_duration_seconds": 1.51,
        "queue_time_seconds": 0.25,
        "time_to_first_token_seconds": 0.3,
        "time_between_tokens_seconds": 0.04,
        "image_fetch_seconds": 0.2,
        "request_prompt_tokens": 40,
        "request_generated_tokens": 7,
    }
    for name, total in sums.items():
        assert found[f"rtp_llm_{name}_sum"] == pytest.approx(total), name
    assert found["rtp_llm_queue_time_seconds_count"] == 1, "a request that never ran has not queued"


def test_the_engine_is_read_at_each_scrape_and_may_not_be_there_yet() -> None:
    stats = Stats(running=3, blocks=100, blocks_retained=40, prompt_tokens=90, reused_tokens=60, image_hits=5)
    engines: list[SimpleNamespace] = []
    m = Metrics(lambda: engines[0] if engines else None)  # type: ignore[arg-type, return-value]
    assert samples(m)["rtp_llm_sequences_running"] == 0
    engines.append(SimpleNamespace(stats=lambda: stats))
    found = samples(m)
    assert found["rtp_llm_sequences_running"] == 3
    assert found["rtp_llm_cache_blocks"] == 100 and found["rtp_llm_cache_blocks_retained"] == 40
    assert found["rtp_llm_prompt_tokens_total"] == 90 and found["rtp_llm_prompt_tokens_reused_total"] == 60
    assert found["rtp_llm_image_cache_hits_total"] == 5


def test_every_number_of_the_engine_has_a_metric() -> None:
    assert {*metrics.GAUGES, *metrics.COUNTERS} == set(Stats.__dataclass_fields__)


def test_it_observes_the_engine() -> None:
    m = Metrics(lambda: None)
    m.step(rows=3, tokens=130, seconds=0.05)
    m.encoded(images=4, seconds=2.0)
    found = samples(m)
    assert found["rtp_llm_step_batch_sequences_sum"] == 3
    assert found["rtp_llm_step_tokens_sum"] == 130 and found["rtp_llm_step_seconds_sum"] == 0.05
    assert found["rtp_llm_image_encode_seconds_sum"] == 2
    assert found["rtp_llm_image_encode_batch_images_sum"] == 4


def test_clients_cannot_make_new_series() -> None:
    m = Metrics(lambda: None)
    before = set(samples(m))
    for i in range(50):
        m.started()
        m.finished(f"made-up-{i}", f"/path/{i}", None, 0, 0.1)
    assert set(samples(m)) == before
    assert samples(m)["rtp_llm_requests_total{kind=raw}{outcome=internal}"] == 50


def test_two_servers_in_one_process_do_not_share_numbers() -> None:
    one, two = Metrics(lambda: None), Metrics(lambda: None)
    one.started()
    assert samples(two)["rtp_llm_requests_in_flight"] == 0


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (None, "ok"),
        (asyncio.CancelledError(), "cancelled"),
        (GeneratorExit(), "cancelled"),
        (GenerationTimeout("late"), "timeout"),
        (Overloaded("full"), "overload"),
        (ImageDecodeError("damaged"), "user_error"),
        (InternalError("broken"), "internal"),
        (ValueError("broken"), "internal"),
        (type("HttpError", (Exception,), {"status_code": 503})(), "draining"),
        (type("HttpError", (Exception,), {"status_code": 401})(), "user_error"),
    ],
)
def test_an_error_is_the_outcome_that_its_kind_says(error: BaseException | None, outcome: str) -> None:
    assert outcome_of(error) == outcome and outcome in metrics.OUTCOMES


def test_names_have_base_units_and_help() -> None:
    units = ("_seconds", "_bytes", "_tokens", "_sequences", "_images")
    for family in text_string_to_metric_families(Metrics(lambda: None).render().decode()):
        if family.name.startswith("rtp_llm_"):
            assert family.documentation.endswith("."), family.name
            if family.type == "histogram":
                assert family.name.endswith(units), family.name
        assert not family.name.endswith("_created"), family.name


def queries() -> list[str]:
    board = json.loads(DASHBOARD.read_text())
    return [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]


def test_the_dashboard_shows_every_metric_and_no_other() -> None:
    rendered = {s.split("{")[0] for s in samples(Metrics(lambda: None))}
    drawn = {name for q in queries() for name in re.findall(r"\b(?:rtp_llm|process)_\w+", q)}
    assert sorted(drawn - rendered) == [], "drawn, but never sent"
    families = [n for n in rendered if n.startswith("rtp_llm_") and not n.endswith(("_sum", "_count"))]
    undrawn = [n for n in families if n not in drawn and n.removesuffix("_bucket") + "_sum" not in drawn]
    assert sorted(undrawn) == [], "sent, but never drawn"


def test_the_dashboard_is_importable() -> None:
    """What Grafana asks of a file: a title and uid, panels on its grid of 24 that do not overlap, each
    with a unit and the datasource that the person who imports it chooses."""
    board = json.loads(DASHBOARD.read_text())
    assert board["title"] and re.fullmatch(r"[\w-]{1,40}", board["uid"]) and board["schemaVersion"] >= 39
    assert board["id"] is None, "an id would overwrite another board"
    variable = board["templating"]["list"][0]
    assert (variable["name"], variable["type"], variable["query"]) == (
        "datasource",
        "datasource",
        "prometheus",
    )
    taken: set[tuple[int, int]] = set()
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in board["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}
        assert at["x"] + at["w"] <= 24 and not cells & taken, panel["title"]
        taken |= cells
        if panel["type"] == "row":
            continue
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        refs = [target["refId"] for target in panel["targets"]]
        assert refs and len(set(refs)) == len(refs), panel["title"]
