"""/health, /metrics, /version, /v1/models, /openapi.json."""

from __future__ import annotations

import re
from importlib.metadata import version

import pytest
from serve_support import ask, registry, server

from kllm.serve.app import create_app
from kllm.serve.metrics import Histogram
from kllm.serve.settings import Settings


def test_health() -> None:
    answer = ask("GET", "/health")
    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})
    assert ask("HEAD", "/health").status_code == 200


def test_a_dead_engine_is_no_health() -> None:
    models = registry()
    models.get(None).runtime._thread.dead = True
    app = create_app(models, Settings())
    answer = ask("GET", "/health", app=app)
    assert answer.status_code == 503 and answer.json()["status"] == "engine_dead"
    assert ask("GET", "/v1/models", app=app).json()["error"]["code"] == "engine_dead"


def test_version() -> None:
    assert ask("GET", "/version").json() == {"version": version("kllm")}


def test_models() -> None:
    body = ask("GET", "/v1/models").json()
    assert body["object"] == "list"
    assert body["data"] == [
        {
            "id": "base", "object": "model", "created": 5, "owned_by": "kllm", "root": "base", "parent": None,
            "max_model_len": 100,
        },
        {
            "id": "tuned", "object": "model", "created": 6, "owned_by": "kllm", "root": "base", "parent": "base",
            "max_model_len": 100,
        },
    ]  # fmt: skip
    assert ask("GET", "/v1/models/tuned").json() == body["data"][1]
    for name in ("nope", "a/b", "..%2fbase", "%00"):
        answer = ask("GET", f"/v1/models/{name}")
        assert answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found"


SAMPLE = re.compile(r'[a-z0-9:_]+(?:\{[a-z_]+="[^"]*"(?:,[a-z_]+="[^"]*")*\})? [0-9.e+-]+')


def test_metrics_are_prometheus_text() -> None:
    models = registry()
    models.get("base").metrics.prompt_tokens, models.get("tuned").metrics.generation_tokens = 11, 13
    answer = ask("GET", "/metrics", app=create_app(models, Settings()))
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = set()
    for line in answer.text.splitlines():
        if line.startswith("# "):
            families.add(line.split()[2])
        else:
            assert SAMPLE.fullmatch(line), line
            name = line.split("{")[0].split(" ")[0]
            assert name in families or re.sub("_(bucket|sum|count)$", "", name) in families
    assert {
        "kllm:num_requests_running", "kllm:num_requests_waiting", "kllm:kv_cache_usage_perc",
        "kllm:num_preemptions_total", "kllm:prompt_tokens_total", "kllm:generation_tokens_total",
        "kllm:prefix_cache_queries_total", "kllm:prefix_cache_hits_total", "kllm:request_success_total",
        "kllm:admission_rejections_total", "kllm:time_to_first_token_seconds", "kllm:inter_token_latency_seconds",
        "kllm:e2e_request_latency_seconds", "kllm:request_queue_time_seconds", "process_resident_memory_bytes",
    } <= families  # fmt: skip
    assert 'kllm:prompt_tokens_total{model_name="base"} 11' in answer.text
    assert 'kllm:generation_tokens_total{model_name="tuned"} 13' in answer.text
    assert 'kllm:prompt_tokens_total{model_name="tuned"} 0' in answer.text
    # what the engine has is said once, else sums over the names would be wrong
    assert 'kllm:kv_cache_usage_perc{model_name="base"} 0.1' in answer.text
    assert 'kllm:kv_cache_usage_perc{model_name="tuned"}' not in answer.text


def test_another_reader_understands_the_metrics() -> None:
    parser = pytest.importorskip("prometheus_client.parser")
    families = list(parser.text_string_to_metric_families(ask("GET", "/metrics").text))
    assert len(families) == 16
    assert {f.type for f in families} == {"gauge", "counter", "histogram"}


def test_histograms_are_cumulative() -> None:
    histogram = Histogram((0.1, 1.0))
    histogram.observe(0.05)
    histogram.observe(0.1)
    histogram.observe(0.5, 3)
    histogram.observe(9.0)
    assert list(histogram.lines("t", 'm="x"')) == [
        't_bucket{m="x",le="0.1"} 2',
        't_bucket{m="x",le="1"} 5',
        't_bucket{m="x",le="+Inf"} 6',
        't_sum{m="x"} 10.65',
        't_count{m="x"} 6',
    ]


def references(value: object) -> set[str]:
    if isinstance(value, dict):
        found = set().union(*map(references, value.values())) if value else set()
        return found | ({value["$ref"]} if isinstance(value.get("$ref"), str) else set())
    return set().union(*map(references, value)) if isinstance(value, list) and value else set()


def test_the_schema_is_whole_and_honest() -> None:
    document = ask("GET", "/openapi.json", app=server()).json()
    schemas = document["components"]["schemas"]
    assert references(document) <= {f"#/components/schemas/{name}" for name in schemas}
    assert "HTTPValidationError" not in schemas
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            answers = operation["responses"]
            assert "422" not in answers, path
            for status in ("401", "403", "404", "413", "429", "500", "503"):
                schema = answers[status]["content"]["application/json"]["schema"]
                assert schema == {"$ref": "#/components/schemas/Error"}, (path, method)
            if method == "post":
                body = operation["requestBody"]["content"]["application/json"]["schema"]
                assert body["additionalProperties"] is True
    assert "/v1/models" in document["paths"]


def test_there_is_no_page_with_foreign_scripts() -> None:
    assert ask("GET", "/docs").status_code == 404
    assert ask("GET", "/redoc").status_code == 404
