"""The command line of `heddle`: commands, options and their help. Imports nothing heavy, so that --help is quick."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_args

from common.messages import Role
from common.sharing import MAX_COHORTS
from common.sharing import SPELLINGS as SHARING_SPELLINGS
from common.speculation import SPELLINGS
from services.cli.values import drafts, path, rate, share, sharing, speculation, within

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
DEFAULT_URL = "http://127.0.0.1:8000"
ROLES: tuple[Role, ...] = get_args(Role)

EXAMPLES = """\
examples:
  heddle up                                            everything on this machine, on port 8000
  heddle up --port 8123 --state-dir /tmp/second        a second one beside it
  heddle up --model HuggingFaceTB/SmolLM2-360M-Instruct --dtype bfloat16
  heddle up --speculation none                         plain decoding, to compare with
  heddle up --nats nats://10.0.0.5:4222 --executors 2  join a NATS server that is already there
  heddle status                                        what runs, and how busy it is
  heddle finetune chats.jsonl --suffix mine --wait     train an adapter, with a progress bar
  heddle adapters export my-adapter ./my-adapter       a finetuned adapter as a PEFT folder
  heddle explain memory --peft adapter_config.json     what finetuning keeps in memory, and why
"""


if TYPE_CHECKING:
    Commands = argparse._SubParsersAction["_Parser"]


def default_state_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """heddle/ in the user's folder for state."""
    return Path(environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "heddle"


def build_parser() -> argparse.ArgumentParser:
    """The parser; its result has `command` and that command's options."""
    parser = _Parser(
        prog="heddle",
        description="Serves an LLM with a latency target per request, and finetunes LoRA adapters in the same iterations.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_ShowVersion, help="print the version")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    _add_up(_add(commands, "up", "start a NATS server and all five services; Ctrl-C stops them"))
    _add_status(_add(commands, "status", "show the running services and their load"))
    _add_convert(_add(commands, "convert", "turn a model into the folder of safetensors that executors read"))
    _add_distill(_add(commands, "distill", "train a drafter for a model, from its own answers"))
    _add_adapters(_add(commands, "adapters", "list, import, export or delete LoRA adapters"))
    _add_explain(_add(commands, "explain", "show what is planned for a model and a PEFT configuration"))
    _add_finetune(_add(commands, "finetune", "train a LoRA adapter on a chat JSONL, on a running system"))
    _add_health(_add(commands, "health", "exit with 0 if a service of this machine is ready, for containers"))
    _add(commands, "version", "print the version")
    return parser


class _Parser(argparse.ArgumentParser):
    """Says what is wrong first and where help is; argparse would print all options before it."""

    def error(self, message: str) -> NoReturn:
        """As ArgumentParser.error, with status 2."""
        self.exit(2, f"{self.prog}: {message}\n`{self.prog} --help` lists what there is\n")


class _ShowVersion(argparse.Action):
    """Looks the version up only when it is asked for."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**(options | {"nargs": 0, "dest": argparse.SUPPRESS, "default": argparse.SUPPRESS}))

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(version_line())
        parser.exit()


def version_line() -> str:
    """What `heddle --version` prints."""
    return f"heddle {version('heddle')}"


class _Style(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but not those that are None or said in the text."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False) or "default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


def _add(commands: Commands, name: str, summary: str) -> _Parser:
    return commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", formatter_class=_Style)


def _add_up(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Start everything, wait until it is ready, keep it running. Settings without an option here are environment"
        " variables, HEDDLE_<SERVICE>_<FIELD>; each service logs the ones it uses when it starts."
    )
    place = parser.add_argument_group("where")
    place.add_argument("--host", default="127.0.0.1", help="address the gateway listens on; 0.0.0.0 for all")
    place.add_argument("--port", type=within(1, 65535), default=8000, help="port the gateway listens on")
    place.add_argument("--state-dir", type=path, default=default_state_dir(), help="NATS data and logs; one `heddle up` each")
    server = place.add_mutually_exclusive_group()
    server.add_argument("--nats", metavar="URL", help="use this NATS server or cluster (with JetStream) and start none")
    server.add_argument("--nats-port", type=within(1, 65535), metavar="N", help="port of the NATS server (default: a free one)")

    model = parser.add_argument_group("model")
    model.add_argument("--model", default=DEFAULT_MODEL, help="a name, a folder, a .gguf file or a hub name (owner/name)")
    model.add_argument("--served-model-name", metavar="NAME", help="what clients call it (default: its own name)")
    model.add_argument("--dtype", choices=["auto", "bfloat16", "float32"], help="number format (default: auto)")
    model.add_argument("--kv-cache-tokens", type=within(1), metavar="N", help="size of the KV cache (default: the executor's)")
    model.add_argument(
        "--no-prefix-cache",
        dest="prefix_cache",
        action="store_false",
        help="compute each prompt anew (default: reuse prefixes)",
    )
    model.add_argument("--threads", type=within(1), metavar="N", help="CPU threads of one executor (default: all cores)")
    _add_policies(parser)
    _add_processes(parser)


def _add_policies(parser: argparse.ArgumentParser) -> None:
    drafting = parser.add_argument_group("speculation")
    drafting.add_argument(
        "--draft",
        type=drafts,
        default="auto",
        help="who guesses the next tokens: ngram, model:FOLDER, features:FOLDER, or several, with commas"
        " (default: auto, ngram and the trained drafter that ships for the model)",
    )
    drafting.add_argument(
        "--speculation",
        type=speculation,
        default="heddle",
        metavar="MODE",
        help=f"how draft trees are chosen: {SPELLINGS} (the same K tokens for every request); none: off",
    )
    drafting.add_argument(
        "--cohorts",
        type=within(1, MAX_COHORTS),
        metavar="N",
        help="2: half of the requests verifies while the other half is drafted for; pays where drafting takes longer"
        " than a pass of half of them (default: 1)",
    )
    finetuning = parser.add_argument_group("finetuning")
    finetuning.add_argument(
        "--finetune-sharing",
        type=sharing,
        metavar="POLICY",
        help=f"which iterations finetuning shares: {SHARING_SPELLINGS}; a mini-batch after N iterations of inference, or N by"
        " load, to compare with (default: token, all of them)",
    )


def _add_processes(parser: argparse.ArgumentParser) -> None:
    replicas = parser.add_argument_group("replicas", "with --nats, which may be another system's, 0 starts none")
    for role in ROLES:
        plural = f"{role}s"
        replicas.add_argument(f"--{plural}", type=within(0, 64), default=1, metavar="N", help=f"number of {plural}")

    logs = parser.add_argument_group("logs")
    logs.add_argument("--log-format", choices=["json", "console"], help="of the services' logs (default: json)")
    logs.add_argument(
        "--tensorboard-dir",
        type=path,
        metavar="DIR",
        help="metrics of finetuning jobs (default: tensorboard/ in --state-dir)",
    )
    logs.add_argument("--log-level", choices=["debug", "info", "warning", "error"], help="(default: info)")


def _add_status(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", default=DEFAULT_URL, help="a gateway")
    parser.add_argument("--json", action="store_true", help="everything, for programs")
    _add_api_key(parser)


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write a bfloat16 safetensors folder with tokenizer, once, into the cache (HEDDLE_CACHE_DIR, default ~/.cache/heddle),"
        " and print its path. A folder that is ready to use is printed as it is."
    )
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL, help="a name, a folder, a .gguf file or a hub name")
    parser.add_argument("--out", type=path, metavar="DIR", help="write here instead of into the cache; new or empty")


def _add_distill(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Ask a running server for greedy answers, train a drafter on the model's hidden states, and write it to a folder with a"
        " card. `heddle up --draft ngram,features:DIR` uses it. Answers are kept in DIR: run again after an interruption."
    )
    parser.add_argument("--model", default=DEFAULT_MODEL, help="the model that is served: a name, a folder, a .gguf file")
    parser.add_argument("--out", type=path, required=True, metavar="DIR", help="the drafter's folder; new, or with answers")
    parser.add_argument("--prompts", type=path, metavar="FILE", help="JSONL with messages or text (default: the model's ideas)")
    parser.add_argument(
        "--start", type=path, metavar="DIR", help="a drafter of this model that is trained on, with its vocabulary"
    )
    parser.add_argument("--tokens", type=within(1), default=300_000, dest="num_tokens", metavar="N", help="tokens of answers")
    parser.add_argument("--epochs", type=within(1), default=4, metavar="N", help="how often each answer is learned")
    parser.add_argument("--vocabulary", type=within(16), default=10_240, metavar="N", help="tokens that it can draft")
    parser.add_argument("--threads", type=within(1), metavar="N", help="CPU threads (default: all cores)")
    parser.add_argument("--seed", type=within(0), default=0, metavar="N", help="of prompts, order and noise")
    parser.add_argument("--served-model-name", metavar="NAME", help="what the server calls the model (default: its own name)")
    parser.add_argument("--url", default=DEFAULT_URL, help="a gateway that serves it")
    _add_api_key(parser)


def _add_adapters(parser: _Parser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION", title="actions")
    listing = _add(actions, "list", "list the adapters that the system serves")
    export = _add(actions, "export", "write one adapter as a Hugging Face PEFT folder")
    export.add_argument("name", help="the adapter's name, as in `heddle adapters list`")
    export.add_argument("dir", type=path, metavar="DIR", help="new or empty folder")
    importing = _add(actions, "import", "serve a Hugging Face PEFT folder as a model of its own, without restart")
    importing.add_argument("dir", type=path, metavar="DIR", help="folder with adapter_config.json, adapter_model.safetensors")
    importing.add_argument("--name", help="the adapter's name for clients (default: the folder's)")
    importing.add_argument(
        "--base-model", metavar="MODEL", help="the served base model (default: base_model_name_or_path of adapter_config.json)"
    )
    deleting = _add(actions, "delete", "serve an adapter no more, and delete its weights")
    deleting.add_argument("name", help="the adapter's name, as in `heddle adapters list`")
    for action in (listing, export, importing, deleting):
        action.add_argument("--nats", metavar="URL", help="the system's NATS server (default: asked from the gateway)")
        action.add_argument("--url", default=DEFAULT_URL, help="a gateway, asked for the NATS URL")
        _add_api_key(action)


def _add_explain(parser: _Parser) -> None:
    subjects = parser.add_subparsers(dest="action", required=True, metavar="SUBJECT", title="subjects")
    memory = _add(subjects, "memory", "show the activations that finetuning keeps, tensor by tensor")
    memory.add_argument(
        "--recompute-share",
        type=share,
        default=0.0,
        metavar="SHARE",
        help="part of a forward pass that may run again to keep less, as HEDDLE_EXECUTOR_MAX_RECOMPUTE_SHARE",
    )
    parallel = _add(subjects, "parallel", "show how each bypass could run beside a tensor-parallel model, and the cheapest way")
    ranks = "size of the tensor-parallel group (default: the most that divide the model, up to 4)"
    parallel.add_argument("--ranks", type=within(1, 1024), metavar="N", help=ranks)
    parallel.add_argument("--tflops", type=rate, default=150.0, help="of one rank, in TFLOP/s")
    parallel.add_argument("--link-gb", type=rate, default=200.0, metavar="GB", help="that one rank sends in a second, in GB")
    parallel.add_argument("--latency-us", type=rate, default=10.0, metavar="US", help="of one collective, in microseconds")
    parallel.add_argument(
        "--passes-per-update", type=within(1), default=8, metavar="N", help="passes between two optimizer steps"
    )
    for subject in (memory, parallel):
        subject.add_argument("--model", default=DEFAULT_MODEL, help="a name, or a folder with at least config.json")
        subject.add_argument("--peft", type=path, required=True, metavar="FILE", help="an adapter_config.json")
        subject.add_argument("--sequence-length", type=within(1, 1 << 20), default=1024, metavar="T", help="tokens at once")
        subject.add_argument(
            "--dtype", choices=["float16", "bfloat16", "float32"], help="of activations (default: the model's)"
        )


def _add_finetune(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Upload a chat JSONL, start a finetuning job, and print its id. What is not given has the trainer's default, which the"
        " job shows. --wait follows the job to its end: loss, tokens per second and time left."
    )
    parser.add_argument("data", type=path, metavar="DATA", help='rows: {"messages": [{"role": ..., "content": ...}, ...]}')
    parser.add_argument("--validation", type=path, metavar="FILE", help="rows that are scored after each epoch")
    parser.add_argument("--model", help="the base model (default: the one that is served)")
    parser.add_argument("--suffix", help="part of the adapter's model name")
    parser.add_argument("--seed", type=within(0, 2**31 - 1), metavar="N", help="of the order, the first weights and dropout")
    parser.add_argument("--wait", action="store_true", help="follow the job until it has ended")
    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=within(1), metavar="N", help="passes over the data")
    training.add_argument("--batch-size", type=within(1), metavar="N", help="rows per optimizer step")
    training.add_argument("--learning-rate", type=float, metavar="X", help="at its peak")
    training.add_argument("--scheduler", choices=["constant", "linear", "cosine"], help="of the learning rate")
    training.add_argument("--warmup-steps", type=within(0), metavar="N", help="steps until the peak")
    training.add_argument("--optimizer", choices=["adamw", "sgd"])
    training.add_argument("--weight-decay", type=float, metavar="X")
    training.add_argument("--max-grad-norm", type=float, metavar="X", help="gradients are clipped to it; 0: never")
    adapter = parser.add_argument_group("adapter")
    methods = ["lora", "rslora", "ia3", "bottleneck", "distillation"]
    adapter.add_argument("--method", choices=methods, help="of an adapter, or distillation: train a drafter in its place")
    adapter.add_argument("--rank", type=within(1), metavar="N", help="also a bottleneck's size")
    adapter.add_argument("--alpha", type=float, metavar="X")
    adapter.add_argument("--dropout", type=float, metavar="P", help="of the adapter's inputs")
    adapter.add_argument("--target-modules", nargs="+", metavar="NAME", help="q_proj, k_proj, ...; all-linear")
    adapter.add_argument("--feedforward-modules", nargs="*", metavar="NAME", help="of ia3: targets whose input is scaled")
    adapter.add_argument("--non-linearity", choices=["relu", "gelu"], help="of a bottleneck")
    drafter = parser.add_argument_group("drafter", "of --method distillation")
    drafter.add_argument("--out", type=path, metavar="DIR", help="wait for the job, and write the drafter's folder here")
    drafter.add_argument("--vocabulary", type=within(16), dest="vocabulary_size", metavar="N", help="tokens it can draft")
    drafter.add_argument("--ahead", type=within(1, 6), dest="num_steps", metavar="N", help="tokens ahead it is trained for")
    parser.add_argument("--url", default=DEFAULT_URL, help="a gateway")
    _add_api_key(parser)


def _add_health(parser: argparse.ArgumentParser) -> None:
    server = os.environ.get("HEDDLE_NATS_URL", "nats://127.0.0.1:4222")
    parser.add_argument("role", choices=ROLES, help="the service")
    parser.add_argument("--nats", metavar="URL", default=server, help="the NATS server")
    parser.add_argument("--anywhere", action="store_true", help="count instances on other hosts too")


def _add_api_key(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--api-key", metavar="KEY", default=os.environ.get("HEDDLE_API_KEY"), help="the gateway's key (default: HEDDLE_API_KEY)"
    )
