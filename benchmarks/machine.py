"""The machine that a figure comes from."""

import platform
from pathlib import Path

import torch


def describe_machine(device: str = "cpu") -> str:
    """Processor and torch threads, or the accelerator's name."""
    if torch.device(device).type == "cpu":
        where = f"{_processor()}, {torch.get_num_threads()} threads"
    else:
        where = torch.cuda.get_device_name(device)
    return where


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return (names or [platform.processor() or platform.machine()])[0]
