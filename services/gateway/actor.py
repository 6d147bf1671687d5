"""The gateway's actor: wires doors, fleet and core together. Decides nothing itself."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import structlog

from common import subjects
from common.bus import Bus
from common.chat import ChatTokenizer
from common.fleet import Fleet
from common.messages import Beat
from common.service import Vitals, redacted
from services.gateway.admission_client import AdmissionClient
from services.gateway.config import GatewayConfig
from services.gateway.core import Core
from services.gateway.errors import unavailable
from services.gateway.executor_watch import ExecutorWatch
from services.gateway.files import FileStore, file_routes
from services.gateway.finetuning import Trainer, finetuning_routes
from services.gateway.fleet_metrics import FleetCollector
from services.gateway.generation import Generations
from services.gateway.http import HttpServer, build_app
from services.gateway.metrics import Metrics
from services.gateway.models import Catalog, follow_adapters
from services.gateway.nats_door import NatsDoor
from services.gateway.plan import Limits
from services.gateway.routes_adapters import adapter_routes, deletion_route
from services.gateway.routes_inference import inference_routes
from services.gateway.routes_ops import ops_routes

log = structlog.get_logger()


class GatewayActor:
    """One gateway process. State is soft: connections and the tokens so far of live requests."""

    def __init__(self, config: GatewayConfig) -> None:
        self._config = config
        self._tokenizer = ChatTokenizer.load(Path(config.model_dir))
        self._fleet = Fleet()
        self._watch = ExecutorWatch(self._fleet, config.heartbeat_s)
        self._folder = str(Path(config.model_dir).resolve())
        self._catalog = Catalog(config.model_name, self._folder, self._fleet)
        self._metrics = Metrics(config.model_name)
        self._metrics.registry.register(FleetCollector(self._fleet))
        self.url = ""

    async def start(self, bus: Bus, tasks: asyncio.TaskGroup) -> None:
        """Open both doors; from now on requests are taken."""
        config = self._config
        self._admission = AdmissionClient(bus, config.admission_timeout_s)
        self._core = self._build_core()
        await bus.subscribe(subjects.ALL_BEATS, Beat, self._on_beat)
        bus.on_reconnect.append(self._watch.lose_all)
        tasks.create_task(self._watch.run(bus))
        tasks.create_task(follow_adapters(bus, self._catalog))
        self._door = NatsDoor(self._core, bus)
        await self._door.open()
        trainer = Trainer(bus)
        routers = [
            inference_routes(self._core),
            ops_routes(self._core, self._fleet, redacted(config.nats_url)),
            file_routes(FileStore(bus, config.max_file_bytes), trainer),
            finetuning_routes(trainer),
            deletion_route(bus, self._catalog),
        ]
        if config.allow_runtime_lora_updating:
            routers.append(adapter_routes(bus, self._catalog, config.lora_dir, config.max_file_bytes, self._folder))
        self._http = HttpServer(config, build_app(config, routers))
        self._serving = tasks.create_task(self._http.run())
        self.url = self._http.url
        log.info("gateway.listening", url=self.url, model=config.model_name)

    async def drain(self) -> None:
        """Refuse new requests, let streams run on for the grace period, then end them with an error."""
        self._core.is_draining = True
        await self._door.close()
        try:
            await asyncio.wait_for(self._watch.wait_idle(), self._config.drain_grace_s)
        except TimeoutError:
            self._core.fail(unavailable("This gateway is shutting down.", "draining"))
        self._http.stop()
        await self._serving

    def vitals(self) -> Vitals:
        """Counts of requests and of what became of them."""
        counters = {} if not self.url else self._core.counters + self._core.generations.counters + self._admission.counters
        return Vitals(
            url=self.url,
            counters={name: float(count) for name, count in counters.items()},
            gauges={"live_streams": float(len(self._watch.live))},
        )

    def _build_core(self) -> Core:
        config = self._config
        generations = Generations(
            self._admission,
            self._watch,
            gateway_id=config.instance_id,
            open_wait_s=config.open_wait_s,
            migration_limit=config.migration_limit,
            migration_wait_s=config.migration_wait_s,
        )
        return Core(
            tokenizer=self._tokenizer,
            catalog=self._catalog,
            generations=generations,
            metrics=self._metrics,
            limits=Limits(max_n=config.max_n, max_tokens_limit=config.max_tokens_limit, vocab_size=self._tokenizer.vocab_size),
            default_slo=config.default_slo,
            request_timeout_s=config.request_timeout_s,
        )

    async def _on_beat(self, beat: Beat) -> None:
        self._watch.observe(beat, time.monotonic())
