"""What the server counts, and what it writes about each request."""

import logging

from lowrank_kernels.serving.engine import Times
from lowrank_kernels.serving.server import metrics as of_metrics
from tests.serving.server.asking import body


def test_metrics(client):
    client.post("/v1/completions", body("lora", 1))
    client.stream("/v1/completions", body("lora", 1))
    client.post("/v1/completions", body("nobody", 1))
    client.get("/nowhere")
    assert client.get("/health").json() == {"status": "ok"}
    lines = client.get("/metrics").text.splitlines()
    for line in (
        'lrk_requests_total{path="/v1/completions",status="200"} 2.0',
        'lrk_requests_total{path="/v1/completions",status="404"} 1.0',
        'lrk_requests_total{path="other",status="404"} 1.0',
        'lrk_prompt_tokens_total{model="lora"} 8.0',
        'lrk_generated_tokens_total{model="lora"} 8.0',
        'lrk_time_to_first_token_seconds_count{model="lora"} 2.0',
        'lrk_time_between_tokens_seconds_count{model="lora"} 2.0',
        'lrk_queue_seconds_count{model="lora"} 2.0',
        'lrk_row_seconds_bucket{le="+Inf",model="lora"} 2.0',
        "lrk_engine_generated_tokens_total 8.0",
        "lrk_waiting_rows 0.0",
        "lrk_adapters 6.0",
        "# TYPE lrk_requests_total counter",
        "# TYPE lrk_row_seconds histogram",
        "# TYPE lrk_adapters gauge",
        "# TYPE process_resident_memory_bytes gauge",
    ):
        assert line in lines, line
    assert client.get("/load").json() == {"server_load": 0}


def test_only_so_many_models_have_series_of_their_own(monkeypatch):
    monkeypatch.setattr(of_metrics, "MOST_NAMES", 2)
    metrics = of_metrics.Metrics(lambda: ())
    for name in ("a", "b", "c", "d", "a"):
        metrics.row(name, 1, 2, Times(0.0, 1.0, 2.0, 3.0))
    text = metrics.text().decode()
    assert 'lrk_prompt_tokens_total{model="a"} 2.0' in text and 'lrk_prompt_tokens_total{model="other"} 2.0' in text
    assert 'model="c"' not in text
    metrics.forget("a")
    metrics.row("c", 1, 2, Times(0.0, 1.0, 2.0, 3.0))
    text = metrics.text().decode()
    assert 'lrk_prompt_tokens_total{model="c"} 1.0' in text and 'model="a"' not in text


def test_a_line_for_each_request(client, caplog):
    caplog.set_level(logging.INFO, "lowrank_kernels.access")
    client.post("/v1/completions", body("lora", 1))
    client.stream("/v1/completions", body("dora", 1))
    client.get("/v1/models/a%0Ab")
    whole, stream, missing = (record.getMessage() for record in caplog.records)
    assert "POST /v1/completions 200 " in whole and whole.endswith("model=lora prompt=4 generated=4")
    assert stream.endswith("model=dora prompt=4 generated=4")
    assert "GET /v1/models/a%0Ab 404 " in missing
