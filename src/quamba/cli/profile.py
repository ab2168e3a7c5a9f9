"""``quamba profile`` and profile_mamba.py: size and speed of a model on this machine."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quamba.cli.console import Command, NearestChoice, TqdmProgress, mib, say, table
from quamba.cli.flags import (
    QuantizeFlags,
    device_option,
    graph_choice,
    graph_option,
    quantize_flags,
    seed_option,
)
from quamba.cli.memory import check_prompt_memory
from quamba.errors import QuambaError

if TYPE_CHECKING:
    from quamba.api import Model
    from quamba.cli.obtain import Obtained
    from quamba.profiling.latency import Latency
    from quamba.profiling.profile import ProfileReport
    from quamba.profiling.size import FileSize, SizeReport
    from quamba.profiling.spec import ProfileSpec
    from quamba.profiling.trace import Trace

_MODES = ("size", "ttft", "tpot", "ttlt")
_TOP_OPS = 10
_TRACES = "torch_profile"
_POSITIVE = click.IntRange(min=1)


@click.command(cls=Command)
@click.argument("model")
@click.option("--size", is_flag=True, help="Bytes of weights by kind, and of the caches.")
@click.option("--ttft", is_flag=True, help="Time to the first token: one prefill, logits of the last token.")
@click.option("--tpot", is_flag=True, help="Time per output token: one decode step after the prompt.")
@click.option("--ttlt", is_flag=True, help="Time to the last token: prefill and --gen_len - 1 decode steps.")
@click.option("--prompt_len", type=_POSITIVE, default=1024, show_default=True, help="Tokens of a prompt.")
@click.option("--gen_len", type=_POSITIVE, default=128, show_default=True, help="New tokens, --ttlt only.")
@click.option("--batch_size", type=_POSITIVE, default=1, show_default=True, help="Sequences at once.")
@click.option("--repeats", type=_POSITIVE, default=100, show_default=True, help="Timed runs of each mode.")
@click.option(
    "--max_seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=60.0,
    show_default=True,
    help="Stop a mode after so long, warm-ups included, with however many runs are done.",
)
@graph_option()
@click.option(
    "--compare",
    type=NearestChoice(["fp16"]),
    help="Measure the float model that MODEL was made from too (float32 on a CPU).",
)
@click.option(
    "--torch_profile",
    metavar="[DIR]",
    is_flag=False,
    flag_value=_TRACES,
    help=f"Write traces (for Perfetto and TensorBoard) and tables of operators into DIR; without DIR, into"
    f" '{_TRACES}'.",
)
@click.option("--plot", metavar="FILE.png", help="Draw sizes and times (.png, .svg or .pdf).")
@click.option("--log_dir", metavar="DIR", help="Write a JSON log of the run into DIR.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@quantize_flags
@device_option()
@seed_option()
@click.option("--verbose", is_flag=True, help="Progress bars, even if stderr is no terminal.")
@click.pass_context
def command(ctx: click.Context, model: str, **options: Any) -> None:
    """Size and speed of MODEL: a folder, a hub id, or a model stored under --pretrained_dir.

    Measures what --size, --ttft, --tpot and --ttlt name, or all four. The prompts are random tokens. A float
    MODEL is quantized first with --quantize, and stored and used again as main.py does.
    """
    flags = QuantizeFlags.take(options)
    _check_outputs(options)
    check_prompt_memory(options["batch_size"], options["prompt_len"], "--prompt_len")
    # torch's profiler would otherwise print its own starts and stops.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from quamba.api import load
    from quamba.cli.obtain import obtain
    from quamba.profiling.profile import profile
    from quamba.profiling.trace import trace

    spec = _spec(options)
    with TqdmProgress(options["verbose"]) as progress:
        got = obtain(
            model,
            flags,
            device=options["device"],
            backend=options["backend"],
            seed=options["seed"],
            progress=progress,
        )
        progress.close()
        float_source = _float_source(got.model) if options["compare"] else None
        graph = graph_choice(options["cache_graph"], got.model.device)
        spec = dataclasses.replace(spec, cuda_graph=graph)
        report = profile(got.model.network, spec, progress=progress)
        progress.close()
        traces: list[Trace] = []
        if options["torch_profile"] is not None:
            traces = [trace(got.model.network, m, spec, options["torch_profile"]) for m in spec.timed_modes]
        baseline = None
        if float_source is not None:
            baseline = profile(load(float_source, options["device"]).network, spec, progress=progress)
    for line in _notes(report, baseline):
        say(line)
    file = _file(got, model, flags) if report.size is not None else None
    record = _record(got.model, report, baseline, traces)
    if file is not None:
        record["file"] = file.to_dict()
    if options["as_json"]:
        click.echo(json.dumps(record, indent=2))
    else:
        _print(got.model, report, baseline, file)
        for found in traces:
            _print_trace(found)
    _keep(got.model, report, baseline, record, options, dict(ctx.params))


def _check_outputs(options: dict[str, Any]) -> None:
    """Refuse files and folders that cannot be written, before the work that would be lost."""
    from quamba.cli.log import check_log_dir

    check_log_dir(options["log_dir"])
    for name in ("log_dir", "torch_profile"):
        if options[name] is not None:
            _check_folder(f"--{name}", Path(options[name]).expanduser())
    if options["plot"] is None:
        return
    from quamba.profiling.plot import require_plot

    require_plot(options["plot"])
    path = Path(options["plot"]).expanduser()
    if path.is_dir():
        raise QuambaError(f"--plot '{options['plot']}' is a folder, expected a file to write.")
    if not path.parent.is_dir():
        raise QuambaError(
            f"--plot '{options['plot']}' is in no folder that exists; make '{path.parent}' first."
        )
    _check_folder("--plot", path.parent)


def _check_folder(option: str, folder: Path) -> None:
    """Refuse a folder that is not there and cannot be made, and one that cannot be written."""
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    if not existing.is_dir():
        raise QuambaError(f"{option} '{folder}' cannot be made: '{existing}' is a file, expected a folder.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise QuambaError(f"{option} '{folder}' cannot be written: '{existing}' does not let you.")


def _spec(options: dict[str, Any]) -> ProfileSpec:
    from quamba.profiling.spec import ProfileSpec

    sizes = ("batch_size", "prompt_len", "gen_len", "repeats", "max_seconds", "seed")
    modes: Any = tuple(mode for mode in _MODES if options[mode]) or _MODES
    return ProfileSpec(modes=modes, **{name: options[name] for name in sizes})


def _float_source(model: Model) -> str:
    """The float model that a quantized one was made from, known to be there."""
    from quamba.checkpoints.quantized import is_quantized
    from quamba.checkpoints.source import resolve as resolve_source

    if model.plan is None:
        raise QuambaError(
            f"--compare fp16 is for quantized models, and '{model.source}' is float; "
            "add --quantize to compare it with itself quantized."
        )
    try:
        folder = resolve_source(model.source)
    except QuambaError as error:
        raise QuambaError(
            f"--compare fp16 needs '{model.source}', the float model that this one was made from: {error}"
        ) from None
    if is_quantized(folder):
        raise QuambaError(
            f"--compare fp16 needs the float model that this one was made from, but '{model.source}' is "
            "quantized now."
        )
    return model.source


def _notes(report: ProfileReport, baseline: ProfileReport | None) -> list[str]:
    """What ended early, if anything."""
    limit = f"--max_seconds {report.spec.max_seconds:g}"
    return [
        f"{mode}{suffix}: {latency.runs} of {latency.repeats} runs, ended by {limit}."
        for found, suffix in ((report, ""), (baseline, " of the float model"))
        if found is not None
        for mode, latency in found.latencies.items()
        if latency.runs < latency.repeats
    ]


def _record(
    model: Model, report: ProfileReport, baseline: ProfileReport | None, traces: Sequence[Trace]
) -> dict[str, Any]:
    from quamba.profiling.profile import speedups

    record: dict[str, Any] = {
        "model": model.source,
        "precision": _precision(model, report),
        **report.to_dict(),
        "compare": None,
    }
    if baseline is not None:
        compared = baseline.to_dict()
        del compared["peak_memory"]  # the other model is still in memory
        record["compare"] = {"speedup": dict(speedups(report, baseline)), **compared}
    if traces:
        record["torch_profile"] = [found.to_dict() for found in traces]
    return record


def _precision(model: Model, report: ProfileReport) -> str:
    """The recipe's name; of a float model its dtype."""
    return report.dtype if model.recipe is None else model.recipe.name


def _file(got: Obtained, argument: str, flags: QuantizeFlags) -> FileSize | None:
    """Of the files that the model was read from; None for one that is kept in memory only."""
    from quamba.checkpoints.source import resolve as resolve_source
    from quamba.cli.store import find_model
    from quamba.profiling.size import file_size

    folder = got.folder
    if folder is None and got.model.plan is None:
        folder = resolve_source(find_model(argument, flags.pretrained_dir, flags.output_subdir))
    return None if folder is None else file_size(got.model.network, folder)


def _print(
    model: Model, report: ProfileReport, baseline: ProfileReport | None, file: FileSize | None
) -> None:
    spec = report.spec
    threads = f", threads: {report.threads}" if report.device == "cpu" else ""
    click.echo(f"{model.source}: {_precision(model, report)} on {report.device} ({report.hardware}{threads})")
    if report.size is not None:
        names = (_precision(model, report), "" if baseline is None else baseline.dtype)
        _print_size(report.size, None if baseline is None else baseline.size, names)
        if file is not None:
            click.echo(_file_sentence(file, report.size))
    if report.latencies:
        click.echo(
            f"\nBatch {spec.batch_size}, prompts of {spec.prompt_len} random tokens, "
            f"{spec.gen_len} new tokens in ttlt{', CUDA graphs' if spec.cuda_graph else ''}:"
        )
        _print_latencies(report, baseline)
    for line in _facts(report):
        click.echo(line)


def _print_size(size: SizeReport, other: SizeReport | None, names: Sequence[str]) -> None:
    """MiB of each part; ``other`` is the float model's in a second column, ``names`` the precisions."""
    columns = [_size_rows(found) for found in (size, other) if found is not None]
    header = ["part", *(f"{name} MiB" for name in names[: len(columns)])]
    shown = [part for part in columns[0] if any(column[part] for column in columns)]
    click.echo("\n" + table(header, [[part, *(f"{mib(c[part]):.3f}" for c in columns)] for part in shown]))
    if size.tied_head:
        click.echo("The head is the embedding table.")


def _file_sentence(file: FileSize, size: SizeReport) -> str:
    """What adds up to the file's bytes: the weights of the table, or the same kinds as they are stored."""
    stored = {kind: count for kind, count in file.weights.items() if count}
    if stored == {kind: count for kind, count in size.weights.items() if count}:
        parts = [f"{size.weight_bytes:,} of the weights above"]
    else:
        parts = [f"{count:,} {kind}" for kind, count in stored.items()]
    return f"The file: {file.total_bytes:,} bytes = {' + '.join(parts)} + {file.header:,} of header."


def _size_rows(size: SizeReport) -> dict[str, int]:
    """Bytes by the name of the line."""
    return {
        **{f"weights: {kind}": count for kind, count in size.weights.items()},
        "weights: total": size.weight_bytes,
        "cache of a sequence: conv": size.conv_state,
        "cache of a sequence: ssm": size.ssm_state,
        f"caches, batch of {size.batch_size}": size.cache_bytes,
    }


def _print_latencies(report: ProfileReport, baseline: ProfileReport | None) -> None:
    from quamba.profiling.profile import speedups

    latencies = list(report.latencies.values())
    energy = any(latency.mj_per_token is not None for latency in latencies)
    header = ["mode", "median ms", "mean ms", "p5 ms", "p95 ms", "tokens/s", "runs", "warm-ups"]
    header += ["mJ/token"] * energy
    rows = [_cells(latency, energy) for latency in latencies]
    if baseline is not None:
        header += [f"{baseline.dtype} ms", "speed-up"]
        factors = speedups(report, baseline)
        for row, latency in zip(rows, latencies, strict=True):
            row += [f"{baseline.latencies[latency.mode].median_ms:.2f}", f"{factors[latency.mode]:.2f}"]
    click.echo(table(header, rows))


def _cells(latency: Latency, energy: bool) -> list[str]:
    times = (latency.median_ms, latency.mean_ms, latency.p5_ms, latency.p95_ms)
    cells = [latency.mode, *(f"{ms:.2f}" for ms in times), f"{latency.tokens_per_s:.1f}"]
    cells += [str(latency.runs), str(latency.warmups)]
    if energy:
        cells.append("-" if latency.mj_per_token is None else f"{latency.mj_per_token:.2f}")
    return cells


def _facts(report: ProfileReport) -> list[str]:
    lines = []
    if report.arithmetic is not None:
        done = report.arithmetic
        operations, speed = done.operations, done.gop_per_s
        unit = "GFLOP" if operations.integer_share == 0 else "Gop"
        kind = "" if unit == "GFLOP" else f" ({100 * operations.integer_share:.0f}% of them on integers)"
        lines.append(
            f"Prefill: {operations.count / 1e9:.3g} {unit}{kind}, {speed:.3g} {unit}/s, "
            f"{100 * done.share_of_matmul:.0f}% of the {done.matmul_gop_per_s:.3g} GFLOP/s of a "
            f"{done.matmul_dtype} matrix product here."
        )
    if report.traffic is not None:
        t = report.traffic
        lines.append(
            f"Decode step: {mib(t.step_bytes):.1f} MiB of weights and state, {t.gb_per_s:.3g} GB/s, "
            f"{100 * t.share_of_copy:.0f}% of the {t.copy_gb_per_s:.3g} GB/s of a memory copy here."
        )
    if report.peak is not None:
        lines.append(f"Peak memory: {mib(report.peak.size_bytes):.0f} MiB, {report.peak.covers}.")
    return lines


def _print_trace(found: Trace) -> None:
    runs = "1 run" if found.runs == 1 else f"{found.runs} runs"
    on_device = any(op.self_device_ms for op in found.ops)
    header = ["operator", "calls", "own CPU ms", "CPU ms", *(["own GPU ms", "GPU ms"] * on_device)]
    rows = []
    for op in found.ops[:_TOP_OPS]:
        times = [op.self_cpu_ms, op.cpu_ms, *([op.self_device_ms, op.device_ms] if on_device else [])]
        rows.append([op.name[:60], str(op.calls), *(f"{ms:.3f}" for ms in times)])
    click.echo(f"\n{found.mode}, {runs} under the profiler: '{found.trace}', '{found.table}'")
    click.echo(table(header, rows))


def _keep(
    model: Model,
    report: ProfileReport,
    baseline: ProfileReport | None,
    record: dict[str, Any],
    options: dict[str, Any],
    args: dict[str, Any],
) -> None:
    """The picture and the log, as far as they are asked for."""
    if options["plot"] is not None:
        from quamba.profiling.plot import plot

        reports = {_precision(model, report): report}
        if baseline is not None:
            reports[f"float ({baseline.dtype})"] = baseline
        spec = report.spec
        title = (
            f"{model.source} on {report.hardware}: batch {spec.batch_size}, "
            f"prompt {spec.prompt_len}, {spec.gen_len} new tokens"
        )
        say(f"Plot: '{plot(reports, options['plot'], title)}'.")
    if options["log_dir"] is not None:
        from quamba.cli.evaluate import describe_run
        from quamba.cli.log import write_log
        from quamba.cli.store import model_name

        log = {**describe_run(model, args), "profile": record}
        name = f"{model_name(model.source)}_{_precision(model, report)}_profile"
        say(f"Log: '{write_log(options['log_dir'], name, log)}'.")
