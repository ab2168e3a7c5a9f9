"""Read the JSON that ``quamba evaluate``, ``main.py`` and ``quamba profile`` write."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quamba.errors import QuambaError
from quamba.reporting.measures import Metric, Run, Setting, Value

_WRITERS = "'quamba evaluate', 'main.py' or 'quamba profile' (--log_dir or --json)"
#: What --testing stands for, and the tokens of a task's text that are read without --max_length.
_TESTING_SAMPLES, _MAX_LENGTH = 100, 2048
_LARGEST = 1e300
_PERPLEXITIES = re.compile(r"perplexity|bits_per_byte|ppl", re.IGNORECASE)
_KINDS: dict[type[Any], str] = {dict: "an object", list: "a list", str: "a text"}
_SPEED = {"ttft": "TTFT", "tpot": "TPOT", "ttlt": "TTLT"}


@dataclass(frozen=True)
class Readings:
    """left_out: a sentence for each file of a folder that is no run."""

    runs: list[Run]
    left_out: list[str]


def read_runs(paths: Sequence[str | Path]) -> Readings:
    """The runs in files, and in all ``*.json`` of folders; every file once, in the order given.

    A named file that is no run is an error; in a folder it is left out, unless nothing remains.
    """
    runs: list[Run] = []
    left_out: list[str] = []
    seen: set[Path] = set()
    for given in paths:
        path = Path(given).expanduser()
        if not path.exists():
            raise QuambaError(f"There is no file or folder '{given}', expected a JSON of a run.")
        for file in _files(path):
            if file.resolve() in seen:
                continue
            seen.add(file.resolve())
            try:
                runs += read_run(file)
            except QuambaError as error:
                if not path.is_dir():
                    raise
                left_out.append(str(error))
        if path.is_dir() and not runs:
            reason = f" The first: {left_out[0]}" if left_out else ""
            raise QuambaError(
                f"The folder '{given}' holds no JSON of a run, expected what {_WRITERS} write.{reason}"
            )
    return Readings(runs, left_out)


def read_run(path: str | Path) -> list[Run]:
    """One run, or two where ``quamba profile --compare fp16`` measured the float model beside."""
    record = _Fields(str(path), _read_json(Path(path)))
    if isinstance(record.fields.get("model"), str) and "latency" in record.fields:
        return _profile_runs(record, _bare_profile(record))
    model = record.fields.get("model")
    if not isinstance(model, Mapping) or "source" not in model or "size_mib" not in record.fields:
        raise QuambaError(f"'{path}' is JSON, but of no run: expected a file that {_WRITERS} write.")
    run = _evaluated(record)
    if record.fields.get("profile") is None:
        return [run]
    return _profile_runs(record.inner("profile"), run)


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    return sorted(file for file in path.glob("*.json") if not file.name.startswith(".") and file.is_file())


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise QuambaError(f"'{path}' cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise QuambaError(f"'{path}' is no JSON ({error}), expected a run's.") from None
    if not isinstance(found, dict):
        raise QuambaError(f"'{path}' is JSON, but of no run: expected a file that {_WRITERS} write.")
    return found


@dataclass(frozen=True)
class _Fields:
    """Fields of one file; a wrong one is a sentence that names it."""

    file: str
    fields: Mapping[str, Any]
    prefix: str = ""

    def take(self, name: str, kind: type[Any], default: Any = None) -> Any:
        """None stands for a missing field, if ``default`` is given."""
        value = self.fields.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, kind) or isinstance(value, bool):
            raise self.wrong(name, value, _KINDS[kind])
        return value

    def number(self, name: str) -> float:
        """Infinity and NaN are texts in JSON."""
        value = self.fields.get(name)
        if value in ("inf", "-inf", "nan"):
            return float(value)
        if not isinstance(value, int | float) or isinstance(value, bool) or abs(value) > _LARGEST:
            raise self.wrong(name, value, "a number")
        return float(value)

    def optional(self, name: str) -> float | None:
        return None if self.fields.get(name) is None else self.number(name)

    def count(self, name: str) -> int:
        value = self.number(name)
        if not math.isfinite(value) or value != int(value):
            raise self.wrong(name, value, "a whole number")
        return int(value)

    def inner(self, name: str) -> _Fields:
        return _Fields(self.file, self.take(name, dict), f"{self.prefix}{name}.")

    def wrong(self, name: str, value: object, expected: str) -> QuambaError:
        shown = repr(value) if len(repr(value)) < 60 else f"{repr(value)[:60]}..."
        return QuambaError(f"'{self.file}': its '{self.prefix}{name}' is {shown}, expected {expected}.")


def _evaluated(record: _Fields) -> Run:
    """What every log says: the model, its size, texts and tasks."""
    model = record.inner("model")
    values: dict[Metric, Value] = {}
    _add(values, _SIZE, record.number("size_mib"), record)
    args = record.take("args", dict, default={})
    tokens = _add_texts(record, values)
    _add_tasks(record, args, values)
    stated = "recipe" in record.fields
    recipe = record.take("recipe", dict) if record.fields.get("recipe") is not None else None
    name = "float" if recipe is None else str(recipe.get("name", "no name"))
    versions = record.take("versions", dict, default={})
    return Run(
        file=record.file,
        source=model.take("source", str),
        precision=name if stated else None,
        recipe=recipe,
        calibration=record.take("calibration", dict, default={}),
        config=model.take("config", dict, default={}),
        complete=stated and (recipe is None or "calibration" in record.fields),
        values=values,
        facts={
            "device": model.take("device", str, default="not stated"),
            "lm_eval": versions.get("lm_eval"),
            "allow_leak": args.get("allow_leak") is True,
            "tokens": tokens,
        },
    )


_SIZE = Metric("size", "weights", "MiB", "lower")


def _add(values: dict[Metric, Value], metric: Metric, number: float, record: _Fields, **more: Any) -> None:
    values[metric] = Value(number, origin=record.file, **more)


def _add_texts(record: _Fields, values: dict[Metric, Value]) -> dict[str, int]:
    """Perplexities of texts; returns the tokens scored for each metric's name."""
    scored = record.take("scored", dict, default={})
    tokens = {}
    for text in scored:
        one = _Fields(record.file, record.inner("scored").take(text, dict), f"scored.{text}.")
        complete = one.fields.get("complete") is True
        windows = f"{'all' if complete else 'the first'} {one.count('windows'):,}"
        setting: Setting = (
            ("windows", windows),
            ("window_length", f"{one.count('window_length'):,}"),
            ("rule", one.take("rule", str)),
        )
        metric = Metric("perplexity", f"{text} perplexity", "", "lower", setting)
        _add(values, metric, one.number("perplexity"), record)
        tokens[metric.name] = one.count("tokens_scored")
    for text in record.take("ppl", dict, default={}):
        if text not in scored:
            metric = Metric(
                "perplexity",
                f"{text} perplexity",
                "",
                "lower",
                (("rule", "how it was scored is not stated"),),
            )
            _add(values, metric, record.inner("ppl").number(text), record)
    return tokens


def _add_tasks(record: _Fields, args: Mapping[str, Any], values: dict[Metric, Value]) -> None:
    for i, entry in enumerate(record.take("tasks", list, default=[])):
        if not isinstance(entry, Mapping):
            raise record.wrong("tasks", entry, "a list of objects")
        one = _Fields(record.file, entry, f"tasks[{i}].")
        name = one.take("metric", str)
        setting = _task_setting(one, args)
        task = one.take("task", str)
        if _PERPLEXITIES.search(name):
            metric = Metric("perplexity", f"{task} {name}", "", "lower", setting)
        else:
            metric = Metric("accuracy", f"{task} {name}", "", "higher", setting)
        _add(values, metric, one.number("value"), record, stderr=one.optional("stderr"))


def _task_setting(task: _Fields, args: Mapping[str, Any]) -> Setting:
    """Shots and samples; a group of tasks states none, so what was asked for stands for it."""
    limit = args.get("limit") or (_TESTING_SAMPLES if args.get("testing") else None)
    if task.fields.get("samples") is not None:
        samples = f"{task.count('samples'):,}"
    elif limit is not None:
        samples = f"the first {limit} of each task's"
    else:
        samples = "all" if args else "a not stated number of"
    if task.fields.get("shots") is not None:
        shots = str(task.count("shots"))
    elif args.get("fewshot") is not None:
        shots = str(args["fewshot"])
    else:
        shots = "each task's own" if args else "a not stated number of"
    setting: Setting = (("shots", shots), ("samples", samples))
    if args.get("max_length") not in (None, _MAX_LENGTH):
        setting += (("max_length", str(args["max_length"])),)
    return setting


def _bare_profile(record: _Fields) -> Run:
    """The model of ``quamba profile --json``, which names it and its precision only."""
    return Run(
        file=record.file,
        source=record.take("model", str),
        precision=_profiled_precision(record),
        recipe=None,
        calibration={},
        config={},
        complete=_profiled_precision(record) == "float",
        values={},
        facts={"device": record.take("device", str)},
    )


def _profiled_precision(record: _Fields) -> str:
    """A float model's precision is its dtype there."""
    name: str = record.take("precision", str)
    return "float" if re.fullmatch(r"b?float\d+", name) else name


def _profile_runs(record: _Fields, run: Run) -> list[Run]:
    """The run with what was profiled, and the float model's where that was measured too."""
    runs = [dataclasses.replace(run, values={**run.values, **_profiled(record)})]
    if record.fields.get("compare") is not None:
        other = dataclasses.replace(
            run,
            precision="float",
            recipe=None,
            calibration={},
            complete=True,
            values=_profiled(record.inner("compare")),
        )
        runs.append(other)
    return runs


def _profiled(record: _Fields) -> dict[Metric, Value]:
    """Size and times of one profiled model."""
    values: dict[Metric, Value] = {}
    if record.fields.get("size") is not None:
        size = record.inner("size")
        _add(values, _SIZE, size.inner("weights_bytes").number("total") / 2**20, record)
        cache = Metric("size", "cache of a sequence", "MiB", "lower")
        _add(values, cache, size.inner("cache_bytes_per_sequence").number("total") / 2**20, record)
    for mode, name in _SPEED.items():
        if mode not in record.take("latency", dict):
            continue
        found = record.inner("latency").inner(mode)
        setting = _speed_setting(record, mode)
        times = Metric("speed", name, "ms", "lower", setting)
        low, high = found.optional("p5_ms"), found.optional("p95_ms")
        _add(values, times, found.number("median_ms"), record, low=low, high=high)
    if "tpot" in record.take("latency", dict):
        found, setting = record.inner("latency").inner("tpot"), _speed_setting(record, "tpot")
        rate = Metric("speed", "decode", "tokens/s", "higher", setting)
        _add(values, rate, found.number("tokens_per_s"), record)
        if found.fields.get("mj_per_token") is not None:
            energy = Metric("speed", "decode energy", "mJ/token", "lower", setting)
            _add(values, energy, found.number("mj_per_token"), record)
    return values


def _speed_setting(record: _Fields, mode: str) -> Setting:
    spec = record.inner("spec")
    names = ("batch_size", "prompt_len", *(("gen_len",) if mode == "ttlt" else ()))
    place = record.take("hardware", str)
    if record.take("device", str) == "cpu":
        threads = record.count("threads")
        place += f", {threads} thread{'s' * (threads != 1)}"
    graphs = (("graphs", "CUDA graphs"),) if spec.fields.get("cuda_graph") is True else ()
    return (*((name, str(spec.count(name))) for name in names), ("hardware", place), *graphs)
