"""A script that compiles every kernel for an architecture, 90 (Hopper) or 80, without a GPU: launches become compilations.

Prints a line per compiled kernel: its name, bytes of shared memory, matrix instructions of a warpgroup, registers of a thread,
bytes of its stack: what did not fit into registers is spilled there.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernel_case import Sizes
from benchmarks.kernel_cases import Cases
from kernels.segments import AttentionPlan, AttentionSegment, LoraSegment
from kernels.triton_ops.attention_tables import attention_tables
from kernels.triton_ops.drop import drop
from kernels.triton_ops.lora_tables import segment_tables
from kernels.triton_ops.ragged_attention import ragged_attention
from kernels.triton_ops.rms_norm import add_rms_norm, rms_norm_backward
from kernels.triton_ops.rope_and_cache import rope_backward
from kernels.triton_ops.segmented_lora import segmented_lora_gradients
from kernels.triton_ops.tree_accept import tree_accept

TYPES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.int32: "i32", torch.int64: "i64"}
SIZES = Sizes(
    rows=(2,), hidden=4096, intermediate=14336, vocabulary=1000, context=1200, decodes=(1,), prefill=160, adapters=(2,),
    layers=1, moved=4,
)  # fmt: skip


def compile_launch(kernel: Any, *values: Any, grid: object, warmup: bool, **named: Any) -> None:
    """Stands for the launch of a kernel: compiles it for its arguments' types and alignment."""
    names = [parameter.name for parameter in kernel.params]
    bound = dict(zip(names, values, strict=False)) | {name: named.pop(name) for name in names if name in named}
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], object] = {}
    attributes: dict[tuple[int, ...], list[list[object]]] = {}
    for i, parameter in enumerate(kernel.params):
        value = bound[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[i,] = "constexpr", value
            continue
        signature[parameter.name] = type_name(value)
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[i,] = [["tt.divisibility", 16]]
    compiler = importlib.import_module("triton.compiler")
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", int(sys.argv[1]), 32)
    source = compiler.ASTSource(kernel, signature, constants, attributes)
    compiled = compiler.compile(source, target=target, options=named)
    count = compiled.asm["ptx"].count("wgmma.mma")
    print(kernel.__name__, compiled.metadata.shared, count, *registers_and_stack(compiled.asm["cubin"]))


def registers_and_stack(cubin: bytes) -> tuple[int, int]:
    """As the assembler wrote them into what it made."""
    folder = Path(importlib.import_module("triton").__file__ or "").parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(folder / "cuobjdump"), "--dump-resource-usage", file.name]
        told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", told)
    assert found is not None, told
    return int(found[1]), int(found[2])


def type_name(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"*{TYPES[value.dtype]}"
    if isinstance(value, float):
        return "fp32"
    return "i32" if isinstance(value, int) and -(2**31) <= value < 2**31 else "i64"


def main() -> None:
    importlib.import_module("triton.runtime.jit").JITFunction.run = compile_launch
    for case in Cases(SIZES, torch.bfloat16, torch.device("cpu")):
        case.run()
    beyond_the_benchmark()


def beyond_the_benchmark() -> None:
    x, nodes = torch.zeros(2, 4096, dtype=torch.bfloat16), torch.zeros(8, dtype=torch.int64)
    a_RI, b_OR = (torch.zeros(shape, dtype=torch.bfloat16) for shape in ((16, 4096), (4096, 16)))
    segments = [LoraSegment(start=0, end=2, a_RI=a_RI, b_OR=b_OR, scale=1.0)]
    rms_norm_backward(x, x, x[0], 1e-5)
    add_rms_norm(x, x, x[0], 1e-5)
    rope_backward(x.view(2, 32, 128), x[:, :128], x[:, :128])
    drop(x, torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.float64), 3)
    tables = segment_tables(segments)
    segmented_lora_gradients(None, x, x, [(a_RI.clone(), b_OR.clone())], tables, 4096)
    a_RI, b_OR = torch.zeros(64, 4096), torch.zeros(4096, 64)
    trained = [LoraSegment(start=0, end=2, a_RI=a_RI, b_OR=b_OR, scale=1.0)]
    segmented_lora_gradients(x.clone(), x, x, [(a_RI.clone(), b_OR.clone())], segment_tables(trained), 4096)
    tree = AttentionSegment(start=0, end=2, slots_L=torch.arange(1000), mask_nn=torch.ones(2, 2).bool())
    for window in (None, 600):
        cache = torch.zeros(1000, 8, 128, dtype=torch.bfloat16)
        ragged_attention(x.view(2, 32, 128), cache, cache, attention_tables(AttentionPlan([tree]), 4, window), 1.0)
    tree_accept(nodes, nodes, nodes, torch.tensor([0, 8]), 8)


if __name__ == "__main__":
    main()
