"""What is around the model: models, health, metrics, version, OpenAPI, the tokenizer's routes, the page."""

from __future__ import annotations

import json
import re

import jsonschema
import pytest
from serve_client import chat_body, refused, server
from serve_model import CONTEXT, HIDDEN, added_tokens, decode, encode, model_dir, tokenizer

ROUTES = {
    "/v1/chat/completions": "post",
    "/v1/chat/completions/render": "post",
    "/v1/completions": "post",
    "/v1/embeddings": "post",
    "/v1/models": "get",
    "/v1/responses": "post",
    "/tokenize": "post",
    "/detokenize": "post",
    "/tokenizer_info": "get",
    "/health": "get",
    "/metrics": "get",
    "/version": "get",
}
USER = [{"role": "user", "content": "Hello, 世界"}]


def test_health_is_a_status_object():
    answer = server().get("/health")
    assert answer.status_code == 200 and isinstance(answer.json()["status"], str)


def test_models_lists_one_full_card():
    answer = server().get("/v1/models").json()
    assert answer["object"] == "list" and len(answer["data"]) == 1
    card = answer["data"][0]
    assert {"id", "object", "created", "owned_by", "root", "parent", "max_model_len"} <= set(card)
    assert card["object"] == "model" and card["id"] == "tiny" and card["max_model_len"] == CONTEXT
    assert isinstance(card["created"], int) and isinstance(card["owned_by"], str)
    assert card["parent"] is None
    assert str(model_dir().parent) not in json.dumps(card), "no file paths to clients"


def test_one_model_by_name():
    card = server().get("/v1/models").json()["data"][0]
    assert server().get(f"/v1/models/{card['id']}").json() == card


@pytest.mark.parametrize("name", ["nobody", "gpt-4", "..", "%2e%2e%2fetc", "a/b", "tiny/"])
def test_unknown_model_card_is_404(name):
    response = server().get(f"/v1/models/{name}")
    if name in ("..", "tiny/", "a/b"):  # a client or router may take these for other paths
        assert response.status_code in (200, 404, 307)
        return
    refused(response, 404, code="model_not_found")


def test_version():
    version = server().get("/version").json()["version"]
    assert re.match(r"\d+\.\d+", version)


@pytest.mark.parametrize("path", ["/nowhere", "/v1", "/v1/chat", "/v1/completions/x", "/admin", "/v1/files"])
def test_unknown_route_is_a_json_404(path):
    refused(server().get(path), 404, code=None)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/chat/completions"),
        ("GET", "/v1/completions"),
        ("PUT", "/v1/embeddings"),
        ("DELETE", "/v1/models"),
        ("POST", "/health"),
        ("POST", "/metrics"),
        ("PATCH", "/tokenize"),
        ("POST", "/v1/models/tiny"),
    ],
)
def test_wrong_method_is_a_json_405(method, path):
    response = server().client.request(method, path)
    refused(response, 405, code=None)


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/nowhere", "/metrics"])
def test_every_answer_has_a_request_id(path):
    first, second = (server().get(path).headers["x-request-id"] for _ in range(2))
    assert first and second and first != second


def test_request_id_of_posts_and_refusals():
    for body in (chat_body(), chat_body(temperature=9), b"{"):
        assert server().post("/v1/chat/completions", body).headers["x-request-id"]


# ---------------------------------------------------------------------------------------------- OpenAPI


@pytest.fixture(scope="module")
def document():
    response = server().get("/openapi.json")
    assert response.status_code == 200
    return response.json()


@pytest.mark.parametrize("path", ROUTES)
def test_openapi_has_the_route(document, path):
    operation = document["paths"][path][ROUTES[path]]
    assert "200" in operation["responses"]


def test_openapi_declares_refusals_with_the_error_form(document):
    for path, method in ROUTES.items():
        if method != "post":
            continue
        responses = document["paths"][path][method]["responses"]
        wanted = {"400", "401", "413"} | ({"404", "429", "503"} if path.startswith("/v1/c") else set())
        assert wanted <= set(responses), path
        assert "422" not in responses
        schema = responses["400"]["content"]["application/json"]["schema"]
        text = json.dumps(_resolved(document, schema))
        assert all(name in text for name in ("message", "type", "param", "code"))


def test_openapi_declares_event_streams(document):
    for path in ("/v1/chat/completions", "/v1/completions"):
        assert "text/event-stream" in document["paths"][path]["post"]["responses"]["200"]["content"]


def test_openapi_references_resolve_and_schemas_are_valid(document):
    assert document["openapi"].startswith("3.")
    for reference in re.findall(r'"\$ref": "([^"]+)"', json.dumps(document)):
        node = document
        for part in reference.removeprefix("#/").split("/"):
            node = node[part.replace("~1", "/").replace("~0", "~")]
    for schema in document["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)


def test_openapi_declares_path_parameters(document):
    for path, item in document["paths"].items():
        for operation in item.values():
            declared = {p["name"] for p in operation.get("parameters", []) if p["in"] == "path"}
            assert declared == set(re.findall(r"{(\w+)(?::\w+)?}", path)), path


def test_openapi_bodies_are_open(document):
    body = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]
    schema = _resolved(document, body["schema"])
    assert schema.get("additionalProperties", True) is not False
    assert {"messages", "temperature", "stream"} <= set(schema["properties"])


def _resolved(document, schema):
    if "$ref" in schema:
        return document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    return schema


def test_docs_need_no_foreign_host():
    response = server().get("/docs")
    assert response.status_code in (200, 404)
    if response.status_code == 200:
        assert not re.search(r"""(src|href)=["'](https?:)?//""", response.text)


# ---------------------------------------------------------------------------------------------- metrics

GAUGES = ["num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"]
COUNTERS = [
    "num_preemptions_total",
    "prompt_tokens_total",
    "generation_tokens_total",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "admission_rejections_total",
]
HISTOGRAMS = [
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
]


def test_metrics_are_prometheus_text():
    server().chat()
    response = server().get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    sample = re.compile(r'[a-zA-Z_:][\w:]*(\{\w+="[^"]*"(,\w+="[^"]*")*,?\})? [-+\d.eInfNa]+')
    for line in response.text.splitlines():
        assert line.startswith(("# HELP ", "# TYPE ")) or sample.fullmatch(line), line


def test_metrics_parse():
    parser = pytest.importorskip("prometheus_client.parser")
    names = {family.name for family in parser.text_string_to_metric_families(server().get("/metrics").text)}
    assert {"kllm:num_requests_running", "kllm:prompt_tokens", "kllm:time_to_first_token_seconds"} <= names


@pytest.mark.parametrize("name", GAUGES + COUNTERS)
def test_metrics_have(name):
    server().stream_chat()
    assert re.search(rf"^kllm:{name}(\{{.*\}})? \d", server().get("/metrics").text, re.MULTILINE)


@pytest.mark.parametrize("name", HISTOGRAMS)
def test_metrics_have_the_histogram(name):
    server().stream_chat()
    text = server().get("/metrics").text
    assert f"# TYPE kllm:{name} histogram" in text
    count = server().metric(f"{name}_count")
    assert count > 0 and server().metric(f"{name}_bucket", le="+Inf") == count
    assert server().metric(f"{name}_sum") >= 0


def test_metrics_have_the_memory():
    assert re.search(
        r"^(kllm:)?process_resident_memory_bytes \d", server().get("/metrics").text, re.MULTILINE
    )


def test_metrics_count_what_usage_says():
    names = ("prompt_tokens_total", "generation_tokens_total")
    before = [server().metric(name) for name in names]
    usage = server().chat("count me", n=2, max_tokens=5)["usage"]
    after = [server().metric(name) for name in names]
    assert after[1] - before[1] == usage["completion_tokens"] == 10
    assert after[0] - before[0] in (usage["prompt_tokens"], 2 * usage["prompt_tokens"])


def test_metrics_count_finishes_by_reason():
    def counts(reason):
        return server().metric("request_success_total", finished_reason=reason)

    before = counts("length"), counts("stop")
    server().chat(max_tokens=1)
    server().chat(logit_bias={str(added_tokens()["<|im_end|>"]): 100})
    assert (counts("length"), counts("stop")) == (before[0] + 1, before[1] + 1)


def test_metrics_never_take_labels_from_requests():
    server().post("/v1/chat/completions", chat_body(model="evil-label"))
    server().get("/evil-path-label")
    assert "evil" not in server().get("/metrics").text


# ------------------------------------------------------------------------- tokenize, detokenize, tokenizer_info


@pytest.mark.parametrize("text", ["the cat", "", "囍🤖龘𠮷é한", " \n\t x ", "a" * 300])
def test_tokenize_gives_the_tokenizer_s_ids(text):
    answer = server().answer("/tokenize", {"prompt": text})
    assert answer["tokens"] == encode(text)
    assert answer["count"] == len(answer["tokens"]) and answer["max_model_len"] == CONTEXT


def test_tokenize_token_strings():
    answer = server().answer("/tokenize", {"prompt": "the cat", "return_token_strs": True})
    assert len(answer["token_strs"]) == answer["count"]
    assert not server().answer("/tokenize", {"prompt": "the cat"}).get("token_strs")


def test_tokenize_without_special_tokens():
    assert server().answer("/tokenize", {"prompt": "hi", "add_special_tokens": False})["tokens"] == encode(
        "hi"
    )


def test_tokenize_raw_prompt_parses_special_tokens():
    ids = server().answer("/tokenize", {"prompt": "a<|im_end|>b"})["tokens"]
    assert ids == encode("a<|im_end|>b") and added_tokens()["<|im_end|>"] in ids


def test_tokenize_messages_equals_the_rendered_prompt():
    ids = server().prompt_ids(USER)
    assert ids[0] == added_tokens()["<|im_start|>"]
    text = decode(ids)
    assert "Hello, 世界" in text and text.count("<|im_start|>") == 2
    assert server().chat(USER[0]["content"])["usage"]["prompt_tokens"] == len(ids)


def test_tokenize_messages_without_generation_prompt():
    whole, part = server().prompt_ids(USER), server().prompt_ids(USER, add_generation_prompt=False)
    assert whole[: len(part)] == part and len(part) < len(whole)


def test_tokenize_messages_with_tools_and_template_arguments():
    tools = [{"type": "function", "function": {"name": "find_cat", "parameters": {"type": "object"}}}]
    assert "find_cat" in decode(server().prompt_ids(USER, tools=tools))
    thinking = server().prompt_ids(USER, chat_template_kwargs={"enable_thinking": True})
    assert thinking != server().prompt_ids(USER)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"prompt": 5},
        {"prompt": None},
        {"messages": "x"},
        {"messages": []},
        {"messages": [{"role": "wizard", "content": "x"}]},
        {"prompt": "x", "model": "nobody"},
    ],
    ids=str,
)
def test_tokenize_refuses(body):
    response = server().post("/tokenize", body)
    refused(response, 404 if "model" in body else 400)


@pytest.mark.parametrize("text", ["the cat", "", "囍🤖龘𠮷é한", "<|im_start|>user\n<think>"])
def test_detokenize_is_the_inverse(text):
    assert server().answer("/detokenize", {"tokens": encode(text)}) == {"prompt": text}


@pytest.mark.parametrize(
    "tokens",
    [[tokenizer().get_vocab_size()], [-1], [10**12], [2**70], ["1"], [1.5], [True], "x", 5, None, [[1]]],
    ids=str,
)
def test_detokenize_refuses(tokens):
    refused(server().post("/detokenize", {"tokens": tokens}), 400)


def test_tokenizer_info():
    info = server().get("/tokenizer_info").json()
    assert info["eos_token"] == "<|im_end|>" and info["chat_template"]
    assert {"bos_token", "pad_token"} <= set(info)
    assert "im_start" in info["chat_template"]


def test_render_shows_prompt_and_ids():
    answer = server().answer("/v1/chat/completions/render", {"messages": USER})
    strings = [value for value in answer.values() if isinstance(value, str)]
    lists = [value for value in answer.values() if isinstance(value, list)]
    ids = server().prompt_ids(USER)
    assert decode(ids) in strings and ids in lists


def test_render_refuses_like_chat():
    refused(server().post("/v1/chat/completions/render", {"messages": []}), 400, param="messages")


def test_the_model_is_as_wide_as_the_tests_think():
    answer = server().answer("/v1/embeddings", {"input": "x"})
    assert len(answer["data"][0]["embedding"]) == HIDDEN
