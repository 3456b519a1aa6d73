"""Render a benchmark report as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

BenchmarkReport = Mapping[str, Any]

GIB = 2**30


def markdown(report: BenchmarkReport) -> str:
    """Render the complete report."""
    sides = report["sides"]
    parts = [
        f"# Benchmark: {', '.join(side['label'] for side in sides)}",
        conditions(report),
        "## Images, milliseconds",
        images(sides, report["batch"]),
    ]
    if report["ratios"]:
        parts += [
            "## Comparison",
            comparisons(report["ratios"]),
            "Ratios are of medians over interleaved rounds, with 95% bootstrap intervals.",
        ]
    parts += [
        "## Stages, median milliseconds",
        stages(sides),
    ]
    if counted := [side for side in sides if side["tflop"]]:
        parts += ["## Operations per image", operations(counted)]
    if any(side["cold"] for side in sides):
        parts += ["## First image in a new process", cold(sides)]
    return "\n\n".join(parts) + "\n"


def conditions(report: BenchmarkReport) -> str:
    """List weights, hardware and versions."""
    machine, product = report["machine"], report["matrix_product"]
    gpu = machine.get("gpu")
    hardware = f"{machine['cpu']}, {machine['torch_threads']} threads of {machine['usable_cores']} cores"
    if gpu:
        driver = gpu.get("driver_version", "unknown")
        hardware = f"{gpu['name']}, {gpu['memory_gib']} GiB, driver {driver}, CUDA {gpu['cuda']}; {hardware}"
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    return "\n".join(
        [
            f"- weights: **{report['weights']}**; batch {report['batch']}, {report['repeats']} rounds"
            + ("" if report["photo"] else "; the identity is random, without a photo"),
            f"- hardware: {hardware}",
            f"- measured matrix product: {product['tflops']:.3g} TFLOP/s ({product['dtype']}, "
            f"size {product['side']})",
            f"- {versions}; commit {machine['commit'] or 'unknown'}",
        ]
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Render a Markdown table; the first column is text, the others are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def images(sides: Sequence[BenchmarkReport], batch: int) -> str:
    """Render percentiles of the total time and of the denoising loop."""
    head = ["side", "p50", "p90", "p99", "loop p50", "loop p90", "UNet samples", "first image"]
    if batch > 1:
        head[1:6] = [f"{name} of {batch}" for name in head[1:6]]
    rows = [
        [
            f"{side['label']} ({side['dtype']}, VAE {side['vae_dtype']})",
            *(number(side["total_ms"][p]) for p in ("p50", "p90", "p99")),
            *(number(side["loop_ms"][p]) for p in ("p50", "p90")),
            str(side["unet_samples"]),
            number(side["first_ms"]),
        ]
        for side in sides
    ]
    return table(head, rows)


def comparisons(ratios: Sequence[BenchmarkReport]) -> str:
    """Render ratios with their confidence intervals."""
    rows = []
    for ratio in ratios:
        error = ratio["latents_relative_l2"]
        rows.append(
            [
                f"{ratio['of']} / {ratio['to']}",
                interval(ratio["loop"]),
                interval(ratio["total"]),
                "" if error is None else f"{error:.1e}",
            ]
        )
    return table(["", "denoising loop", "end to end", "latents, relative L2"], rows)


def interval(ratio: Mapping[str, float]) -> str:
    """Format a ratio, for example `1.32 (1.30 to 1.35)`."""
    return f"{ratio['value']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"


def stages(sides: Sequence[BenchmarkReport]) -> str:
    """Render the median time of each stage, one column per side."""
    names = list(dict.fromkeys(name for side in sides for name in side["stages_ms"]))
    rows = [
        [
            name,
            *(number(side["stages_ms"][name]["p50"]) if name in side["stages_ms"] else "" for side in sides),
        ]
        for name in names
    ]
    return table(["stage", *(side["label"] for side in sides)], rows)


def operations(sides: Sequence[BenchmarkReport]) -> str:
    """Render operations, and the share of the measured matrix rate that each side reaches."""
    rows = [
        [
            side["label"],
            *(f"{side['tflop'][stage]:.3g}" for stage in ("text", "identity", "unet", "vae")),
            f"{side['share_of_rate']['loop']:.0%}",
            f"{side['share_of_rate']['total']:.0%}",
        ]
        for side in sides
    ]
    head = [
        "side",
        "text",
        "identity",
        "UNet",
        "VAE, TFLOP",
        "loop, share of rate",
        "end to end, share of rate",
    ]
    return table(head, rows)


def cold(sides: Sequence[BenchmarkReport]) -> str:
    """Render the seconds since the process was started, and its peak memory."""
    rows = []
    for side in sides:
        if cold_start := side["cold"]:
            seconds, device = cold_start["seconds"], cold_start["device_peak_bytes"]
            rows.append(
                [
                    side["label"],
                    *(f"{seconds[name]:.2f}" for name in ("imported", "built", "first_picture")),
                    f"{cold_start['process_peak_bytes'] / GIB:.2f}",
                    "" if device is None else f"{device['allocated'] / GIB:.2f}",
                ]
            )
    head = [
        "side",
        "imported, s",
        "models ready, s",
        "first image, s",
        "process peak, GiB",
        "device peak, GiB",
    ]
    return table(head, rows)


def number(milliseconds: float) -> str:
    """Format with three significant digits and no exponent."""
    return f"{milliseconds:.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"
