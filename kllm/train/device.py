"""Where a run computes: device, precision, processes, seeding, compilation, peak speed."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from kllm.errors import UserError


@dataclass(frozen=True)
class Runtime:
    """The device of this process and its place among the others."""

    device: torch.device
    dtype: torch.dtype = torch.float32
    """Precision of the forward pass; parameters are always float32."""
    rank: int = 0
    world: int = 1

    @property
    def main(self) -> bool:
        """This process writes files and lines."""
        return self.rank == 0

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """Mixed precision where `dtype` asks for it."""
        if self.dtype == torch.float32:
            yield
            return
        with torch.autocast(self.device.type, dtype=self.dtype):
            yield

    def seed(self, seed: int, step: int) -> None:
        """Makes all randomness of a step a function of (seed, step, rank): nothing to save for a resume."""
        torch.manual_seed((seed * 1_000_003 + step) * 4099 + self.rank)

    def sums(self, values: list[Any]) -> list[float]:
        """Element-wise sums over all processes, as floats."""
        if self.world == 1:
            return [float(v) for v in values]
        tensor = torch.tensor([float(v) for v in values], dtype=torch.float64)
        # MPS and some backends have no float64; the control values travel on the CPU where they can
        if dist.get_backend() == "nccl":
            tensor = tensor.to(self.device)
        dist.all_reduce(tensor)
        return [float(v) for v in tensor.tolist()]

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Averages gradients over all processes, of parameters outside a distributed wrapper."""
        if self.world == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
            parameter.grad /= self.world

    def barrier(self) -> None:
        """All processes wait for each other."""
        if self.world > 1:
            dist.barrier()


def pick_device(name: str) -> torch.device:
    """`auto` takes CUDA, then MPS, then the CPU; a device that is not there is a UserError."""
    if name == "auto":
        if torch.cuda.is_available():
            name = "cuda"
        elif torch.backends.mps.is_available():
            name = "mps"
        else:
            name = "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(
            f"unknown device {name!r}", where="device", hint="auto, cpu, cuda, cuda:1, mps"
        ) from None
    missing = (device.type == "cuda" and not torch.cuda.is_available()) or (
        device.type == "mps" and not torch.backends.mps.is_available()
    )
    if missing:
        raise UserError(f"device {name!r} is not available here", where="device", hint="use --device auto")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on a GPU that computes it, float32 elsewhere."""
    if name == "float32":
        return torch.float32
    if name == "bfloat16":
        return torch.bfloat16
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        return torch.bfloat16
    return torch.float32


def make_runtime(device: str = "auto", dtype: str = "float32") -> Runtime:
    """The runtime of this process; joins the others when torchrun started it."""
    picked = pick_device(device)
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if world > 1:
        if picked.type == "cuda":
            picked = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(picked)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if picked.type == "cuda" else "gloo")
        if picked.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    if picked.type == "cuda":
        torch.set_float32_matmul_precision("high")
    return Runtime(picked, pick_dtype(dtype, picked), rank, world)


def wrap_model(model: nn.Module, runtime: Runtime) -> nn.Module:
    """DistributedDataParallel when there are several processes."""
    if runtime.world == 1:
        return model
    ids = [runtime.device] if runtime.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)


def sync_context(model: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
    """Gradients are exchanged on the last micro-batch of a step only."""
    if last or not isinstance(model, nn.parallel.DistributedDataParallel):
        return contextlib.nullcontext()
    return model.no_sync()


_PEAKS: dict[tuple[str, torch.dtype], float] = {}


def peak_flops(runtime: Runtime, seconds: float = 0.25) -> float | None:
    """FLOP/s of a large matrix product on this device in the training precision, measured once."""
    key = (str(runtime.device), runtime.dtype)
    if key not in _PEAKS:
        n = 8192 if runtime.device.type == "cuda" else 1024
        a = torch.randn(n, n, device=runtime.device, dtype=runtime.dtype)
        best, began = float("inf"), time.perf_counter()
        while time.perf_counter() - began < seconds:
            start = time.perf_counter()
            (a @ a).sum().item()
            best = min(best, time.perf_counter() - start)
        _PEAKS[key] = 2 * n**3 / best
    return _PEAKS[key] * runtime.world


def peak_memory(device: torch.device) -> float:
    """Bytes: the device's own peak on CUDA, the process's resident peak elsewhere."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    try:
        import resource
        import sys

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return float(peak if sys.platform == "darwin" else peak * 1024)
    except ImportError:  # Windows
        return 0.0


COMPILE_SECONDS = 60.0
COMPILE_GAIN = 0.13


def worth_compiling(choice: str, *, step_seconds: float, steps: int, moe: bool, device: torch.device) -> bool:
    """`auto`: when the time saved is at least twice the warm-up (both measured on a CPU; see README)."""
    if choice != "auto":
        return choice == "on"
    if moe or device.type == "mps" or (device.type == "cpu" and shutil.which("g++") is None):
        return False
    return steps * step_seconds * COMPILE_GAIN > 2 * COMPILE_SECONDS


def compile_blocks(model: Any) -> None:
    """Compiles each block around the packed attention, whose shapes change from batch to batch."""
    from kllm.model.attention import packed_attention

    attend = torch.compiler.disable(packed_attention)
    for block in model.model.layers:
        block.self_attn.attend = attend
        block.compile()
