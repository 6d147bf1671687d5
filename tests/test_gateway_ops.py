"""Health, metrics, status and drain."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from common import subjects
from common.fleet import Fleet
from common.messages import Beat
from common.nats_server import free_port
from services.gateway.fleet_metrics import FleetCollector
from tests.fakes import MODEL, SAID, FakeExecutor, write_tiny_model
from tests.gateway_stage import Connect, Stage, running_gateway, staged, until

BODY = {"model": MODEL, "prompt": "one", "max_tokens": 64}
WAIT_S = 10


def is_ok(health: Any) -> bool:
    """Whether GET /health says that all is well."""
    return bool(health == {"status": "ok"})


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


async def samples(stage: Stage) -> dict[str, dict[frozenset[tuple[str, str]], float]]:
    """All samples of /metrics: name -> labels -> value."""
    text = (await stage.http.get("/metrics")).text
    found: dict[str, dict[frozenset[tuple[str, str]], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[frozenset(sample.labels.items())] = sample.value
    return found


async def test_metrics_have_vllms_names(connect: Connect, model_dir: Path) -> None:
    counters = {"drafts": 10.0, "draft_tokens": 40.0, "accepted_tokens": 25.0, "iterations": 77.0}
    counters |= {"accepted_tokens_at_0": 9.0, "accepted_tokens_at_12": 1.0}
    counters |= {"prefix_cache_queries": 50.0, "prefix_cache_hits": 32.0}
    async with staged(connect, model_dir, fake={"counters": counters, "gauges": {"pages in-use": 4.0}}) as stage:
        before = await samples(stage)
        assert before["vllm:prompt_tokens_total"] == {frozenset({("model_name", MODEL)}): 0}
        await stage.http.post("/v1/completions", json=BODY | {"slo": {"tpot_ms": 10_000, "ttft_ms": 0.001}})
        found = await samples(stage)
        model = frozenset({("model_name", MODEL)})
        engine = model | {("engine", "executor-1")}
        assert found["vllm:num_requests_running"] == {engine: 2}
        assert found["vllm:num_requests_waiting"] == {engine: 1}
        assert found["vllm:kv_cache_usage_perc"] == {engine: 0.25}
        assert found["vllm:prompt_tokens_total"] == {model: len(stage.executor.requests[0].prompt_tokens)}
        assert found["vllm:generation_tokens_total"] == {model: len(stage.executor.reply)}
        assert found["vllm:request_success_total"] == {model | {("finished_reason", "stop")}: 1}
        assert found["vllm:time_to_first_token_seconds_count"] == {model: 1}
        assert found["vllm:inter_token_latency_seconds_count"] == {model: len(stage.executor.reply) - 1}
        assert found["vllm:e2e_request_latency_seconds_count"] == {model: 1}
        assert found["vllm:spec_decode_num_drafts_total"] == {engine: 10}
        assert found["vllm:prefix_cache_queries_total"] == {engine: 50}
        assert found["vllm:prefix_cache_hits_total"] == {engine: 32}
        assert found["vllm:spec_decode_num_draft_tokens_total"] == {engine: 40}
        assert found["vllm:spec_decode_num_accepted_tokens_total"] == {engine: 25}
        assert found["vllm:spec_decode_num_accepted_tokens_per_pos_total"] == {
            engine | {("position", "0")}: 9,
            engine | {("position", "12")}: 1,
        }
        assert found["heddle_executor_iterations_total"] == {frozenset({("instance", "executor-1")}): 77}
        assert found["heddle_executor_pages_in_use"] == {frozenset({("instance", "executor-1")}): 4}
        verdicts = found["heddle_slo_requests_total"]
        assert verdicts == {
            model | {("target", "tpot"), ("attained", "true")}: 1,
            model | {("target", "ttft"), ("attained", "false")}: 1,
        }


def read_by_bench_serve(text: str) -> tuple[Counter[str], Counter[int]]:
    """Counters and accepted tokens by position, as `vllm bench serve` (0.32) reads them for its speculation report: from lines
    of which the name begins with vllm:spec_decode and ends with _total, the value comes after the first space, and the
    position, a whole number, is in a label `position` in double quotes. It adds up what has the same name.
    """
    totals, by_position = Counter[str](), Counter[int]()
    for line in text.splitlines():
        name, _, value = line.partition(" ")
        kind = name.partition("{")[0]
        if not kind.startswith("vllm:spec_decode") or not kind.endswith("_total"):
            continue
        if "num_accepted_tokens_per_pos" in kind:
            by_position[int(name.partition('position="')[2].partition('"')[0])] += int(float(value))
        else:
            (key,) = [key for key in ("num_drafts", "num_draft_tokens", "num_accepted_tokens") if kind.endswith(f"{key}_total")]
            totals[key] += int(float(value))
    return totals, by_position


async def test_vllm_bench_serve_finds_its_speculation_report(connect: Connect, model_dir: Path) -> None:
    """Of two executors, before anything was drafted and after; each label set is vLLM's."""
    counters = {"drafts": 10.0, "draft_tokens": 40.0, "accepted_tokens": 25.0}
    counters |= {"accepted_tokens_at_0": 15.0, "accepted_tokens_at_1": 9.0, "accepted_tokens_at_10": 1.0}
    async with staged(connect, model_dir) as stage:
        other = FakeExecutor(await connect(), (1, 2), executor_id="executor-2")
        await other.start()
        before = read_by_bench_serve((await stage.http.get("/metrics")).text)
        assert before == (Counter(num_drafts=0, num_draft_tokens=0, num_accepted_tokens=0), Counter())
        for executor in (stage.executor, other):
            executor.counters = counters
            await executor.beat()
        while (after := read_by_bench_serve((await stage.http.get("/metrics")).text))[0]["num_drafts"] != 20:
            await executor.beat()
        assert after == (Counter(num_drafts=20, num_draft_tokens=80, num_accepted_tokens=50), Counter({0: 30, 1: 18, 10: 2}))
        found = await samples(stage)
        for name, labels in {name: {frozenset(dict(each)) for each in found[name]} for name in found}.items():
            if name.startswith("vllm:spec_decode"):
                extra = {"position"} if "per_pos" in name else set()
                assert labels == {frozenset({"model_name", "engine"} | extra)}, name
        await other.kill()


def test_a_counter_and_a_gauge_of_one_name_do_not_mix() -> None:
    fleet = Fleet()
    for role, instance in (("planner", "p1"), ("planner", "p2"), ("trainer", "t1")):
        beat = Beat(
            role=role,  # type: ignore[arg-type]
            instance_id=instance,
            state="ready",
            sent_at=0.0,
            period_s=1.0,
            counters={"trees_total": 1.0, "load": 2.0},
            gauges={"load": 3.0},
        )
        fleet.observe(beat, time.monotonic())
    families = {family.name: family for family in FleetCollector(fleet).collect()}
    assert [sample.value for sample in families["heddle_planner_load"].samples] == [2.0, 2.0]
    assert [sample.name for sample in families["heddle_planner_trees"].samples] == ["heddle_planner_trees_total"] * 2
    assert "heddle_trainer_trees" in families


async def test_health_follows_the_executors(connect: Connect, model_dir: Path) -> None:
    bus = await connect()
    async with running_gateway(await connect(), model_dir) as gateway, httpx.AsyncClient(base_url=gateway.url) as http:
        none = await http.get("/health")
        assert (none.status_code, none.json()["status"]) == (503, "unavailable")
        refused = await http.post("/v1/completions", json=BODY)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "no_executor")
        for path in ("/live", "/ping"):
            assert (await http.get(path)).status_code == 200
        executor = await FakeExecutor(bus, [5], state="starting").start()
        await until(http, "/status", lambda status: len(status["services"]) == 1)
        assert (await http.get("/health")).status_code == 503
        executor.state = "ready"
        await until(http, "/health", is_ok)
        executor.model = "another model"
        await until(http, "/health", lambda health: health["status"] == "unavailable")
        no_admission = await http.post("/v1/completions", json=BODY)
        assert (no_admission.status_code, no_admission.json()["error"]["code"]) == (503, "no_executor")
        executor.model = MODEL
        await until(http, "/health", is_ok)
        no_admission = await http.post("/v1/completions", json=BODY)
        assert (no_admission.status_code, no_admission.json()["error"]["code"]) == (503, "no_admission")
        assert no_admission.headers["retry-after"] == "1"
        await executor.kill()


async def test_status_lists_every_service_without_credentials(connect: Connect, model_dir: Path) -> None:
    async with staged(connect, model_dir, fake={"counters": {"iterations": 5.0}, "gauges": {"jobs": 1.0}}) as stage:
        beat = Beat(role="planner", instance_id="p1", state="ready", sent_at=time.time(), period_s=5.0, url="")
        await stage.bus.publish(subjects.beat("planner", "p1"), beat)
        await stage.until("/status", lambda status: len(status["services"]) == 2)
        status = (await stage.http.get("/status")).json()
        assert (status["nats_url"], status["model"]) == ("nats://nats:4222", MODEL)
        executor, planner = status["services"]
        assert (executor["name"], executor["id"], executor["state"]) == ("executor", "executor-1", "ready")
        assert (executor["load"]["iterations"], executor["load"]["jobs"]) == (5.0, 1.0)
        assert executor["load"]["executor"]["max_model_len"] == 512
        assert planner == {"name": "planner", "id": "p1", "state": "ready", "url": "", "load": {}}


async def test_models_show_what_benchmark_clients_read(connect: Connect, model_dir: Path) -> None:
    async with staged(connect, model_dir) as stage:
        listing = (await stage.http.get("/v1/models")).json()
        (card,) = listing["data"]
        assert listing["object"] == "list"
        assert (card["id"], card["object"], card["root"], card["parent"]) == (MODEL, "model", str(model_dir), None)
        assert card["max_model_len"] == 512
        assert (await stage.http.get("/version")).json()["version"]


async def test_draining_lets_streams_finish_and_refuses_new_ones(connect: Connect, model_dir: Path) -> None:
    async with staged(connect, model_dir, fake={"stall_at": 2}, drain_grace_s=WAIT_S) as stage:
        asking = asyncio.create_task(stage.http.post("/v1/completions", json=BODY))
        await asyncio.wait_for(stage.executor.stalled.wait(), WAIT_S)
        draining = asyncio.create_task(stage.gateway.actor.drain())
        await stage.until("/health", lambda health: health["status"] == "draining")
        assert (await stage.http.get("/live")).status_code == 200
        refused = await stage.http.post("/v1/completions", json=BODY)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert not draining.done()
        stage.executor.resume.set()
        assert (await asyncio.wait_for(asking, WAIT_S)).json()["choices"][0]["text"] == SAID
        await asyncio.wait_for(draining, WAIT_S)
        with pytest.raises(httpx.ConnectError):
            await stage.http.get("/live")


async def test_after_the_grace_streams_end_with_an_error(connect: Connect, model_dir: Path) -> None:
    async with staged(connect, model_dir, fake={"stall_at": 2}, drain_grace_s=0.1) as stage:
        asking = asyncio.create_task(stage.http.post("/v1/completions", json=BODY | {"stream": True}))
        await asyncio.wait_for(stage.executor.stalled.wait(), WAIT_S)
        await asyncio.wait_for(stage.gateway.actor.drain(), WAIT_S)
        lines = (await asyncio.wait_for(asking, WAIT_S)).text.split("\n\n")
        assert json.loads(lines[-3].removeprefix("data: "))["error"]["code"] == "draining"
        await asyncio.wait_for(stage.executor.cancelled.get(), WAIT_S)


async def test_gateways_can_share_a_port(connect: Connect, model_dir: Path) -> None:
    port = free_port()
    settings = {"port": port, "reuse_port": True}
    async with (
        running_gateway(await connect(), model_dir, **settings) as first,
        running_gateway(await connect(), model_dir, **settings) as second,
        httpx.AsyncClient() as http,
    ):
        assert first.url == second.url == f"http://127.0.0.1:{port}"
        assert (await http.get(f"{first.url}/live")).status_code == 200
        with pytest.raises(BaseExceptionGroup):
            async with running_gateway(await connect(), model_dir, port=port):
                pass
