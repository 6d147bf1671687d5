"""Entry point of the command `heddle`: parses arguments, runs one command, turns its errors into one line and status 1."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Callable

from common.bus import Bus, BusError
from common.nats_server import NatsServerError
from common.parallel_plan import Machine
from services.cli.adapters import AdapterError, delete, export, import_folder, kind_of, list_adapters, show_adapters
from services.cli.convert import convert
from services.cli.distill import DistillOptions, distill
from services.cli.distill_data import DistillError
from services.cli.explain import ExplainError, explain_memory, explain_parallel
from services.cli.finetune import FinetuneError, FinetuneOptions, finetune
from services.cli.health import HealthError, check
from services.cli.layout import UpOptions
from services.cli.models import ModelError
from services.cli.nats_once import NatsUnreachableError, connect_once
from services.cli.parser import ROLES, build_parser, version_line
from services.cli.preflight import UpError
from services.cli.status import StatusError, fetch, show
from services.cli.supervisor import StartupError
from services.cli.up import up

EXPECTED = (
    UpError, StartupError, NatsServerError, NatsUnreachableError, ModelError, StatusError, AdapterError, HealthError, BusError,
    DistillError, ExplainError, FinetuneError,
)  # fmt: skip
LORA_OPTIONS = (
    "method", "rank", "alpha", "dropout", "target_modules", "feedforward_modules", "non_linearity", "learning_rate",
    "scheduler", "warmup_steps", "optimizer", "weight_decay", "max_grad_norm",
)  # fmt: skip
"""Options of `heddle finetune` that go into the job's `lora` block."""
DRAFTER_OPTIONS = ("vocabulary_size", "num_steps")
"""Those that a distillation has for itself."""
KEY_VARIABLES = ("HEDDLE_GATEWAY_API_KEY", "HEDDLE_API_KEY")


def main(arguments: list[str] | None = None) -> None:
    """Run `heddle`; exits with 1 and a reason when the command cannot do its work, with 130 after an interrupt."""
    options = build_parser().parse_args(arguments)
    try:
        COMMANDS[options.command](options)
        sys.stdout.flush()
    except EXPECTED as error:
        sys.exit(f"heddle: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # whoever read the output has seen enough; the interpreter would complain again at its exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def _up(options: argparse.Namespace) -> None:
    plurals = {f"{role}s" for role in ROLES}
    given = {key: value for key, value in vars(options).items() if key not in {"command", *plurals}}
    replicas = {role: getattr(options, f"{role}s") for role in ROLES}
    key_variable = next((variable for variable in KEY_VARIABLES if os.environ.get(variable)), None)
    up(UpOptions(**given, replicas=replicas, key_variable=key_variable))


def _status(options: argparse.Namespace) -> None:
    show(options.url, options.api_key, options.json)


def _convert(options: argparse.Namespace) -> None:
    print(convert(options.model, options.out))


def _distill(options: argparse.Namespace) -> None:
    given = {key: value for key, value in vars(options).items() if key != "command"}
    print(distill(DistillOptions(**given)))


def _adapters(options: argparse.Namespace) -> None:
    nats_url = options.nats or fetch(options.url, options.api_key)[0].nats_url
    asyncio.run(_with_bus(nats_url, options))


async def _with_bus(nats_url: str, options: argparse.Namespace) -> None:
    bus = Bus(await connect_once(nats_url))
    try:
        if options.action == "export":
            record = await export(bus, options.name, options.dir)
            kind = "bottleneck" if record.lora.method == "bottleneck" else "PEFT"
            print(f"{record.name}: a {kind} adapter for {record.base_model}, in {options.dir}")
            return
        if options.action == "import":
            record = await import_folder(bus, options.dir, options.name, options.base_model)
            print(f"{record.name}: served as an adapter of {record.base_model}, {kind_of(record.lora)}")
            return
        if options.action == "delete":
            print(f"{(await delete(bus, options.name)).name}: deleted")
            return
        show_adapters(await list_adapters(bus))
    finally:
        await bus.drain()


def _explain(options: argparse.Namespace) -> None:
    model, peft, num_tokens, dtype = options.model, options.peft, options.sequence_length, options.dtype
    if options.action == "memory":
        explain_memory(model, peft, num_tokens, dtype, options.recompute_share)
        return

    def machine_of(num_ranks: int) -> Machine:
        return Machine(
            num_ranks=num_ranks,
            flops_per_s=options.tflops * 1e12,
            link_bytes_per_s=options.link_gb * 1e9,
            latency_s=options.latency_us * 1e-6,
            passes_per_update=options.passes_per_update,
        )

    explain_parallel(model, peft, num_tokens, dtype, options.ranks, machine_of)


def _finetune(options: argparse.Namespace) -> None:
    given = {key: value for key, value in vars(options).items() if key != "command"}
    lora = {name: given.pop(name) for name in LORA_OPTIONS}
    if lora["target_modules"] == ["all-linear"]:
        lora["target_modules"] = "all-linear"
    drafter = {name: given.pop(name) for name in DRAFTER_OPTIONS}
    asked = [name for name, value in lora.items() if value is not None and name not in ("method", "learning_rate")]
    if lora["method"] == "distillation":
        if asked:
            raise FinetuneError(f"--{asked[0].replace('_', '-')} does not belong to --method distillation")
        finetune(FinetuneOptions(**given, lora={}, drafter={**drafter, "learning_rate": lora["learning_rate"]}))
        return
    if given["out"] is not None or any(value is not None for value in drafter.values()):
        raise FinetuneError("--out, --vocabulary and --ahead belong to --method distillation")
    finetune(FinetuneOptions(**given, lora=lora))


def _health(options: argparse.Namespace) -> None:
    host = "any" if options.anywhere else None
    print(f"{options.role} {asyncio.run(check(options.role, options.nats, host))} is ready")


def _version(_: argparse.Namespace) -> None:
    print(version_line())


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "up": _up,
    "status": _status,
    "convert": _convert,
    "distill": _distill,
    "adapters": _adapters,
    "explain": _explain,
    "finetune": _finetune,
    "health": _health,
    "version": _version,
}


if __name__ == "__main__":
    main()
