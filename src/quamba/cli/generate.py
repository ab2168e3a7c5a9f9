"""``quamba generate`` and generate.py: continue a prompt."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from quamba.cli.console import Command, TqdmProgress, say
from quamba.cli.flags import (
    QuantizeFlags,
    device_option,
    graph_choice,
    graph_option,
    quantize_flags,
    seed_option,
)
from quamba.errors import QuambaError

if TYPE_CHECKING:
    from torch import Tensor

    from quamba.api import Model

DEFAULT_PROMPT = "My cat wrote all this code in one night, and"


@click.command(cls=Command)
@click.argument("model")
@click.option("--prompt", metavar="TEXT", help=f'Text to continue. Default: "{DEFAULT_PROMPT}".')
@click.option(
    "--promptlen",
    type=click.IntRange(min=1),
    help="Continue this many random tokens instead of a text.",
)
@click.option(
    "--batch_size",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Continuations at once, of the same text or of different random tokens.",
)
@click.option(
    "--genlen",
    type=click.IntRange(min=1),
    default=100,
    show_default=True,
    help="New tokens at most: the prompt's are not counted, so the result has up to prompt + genlen tokens."
    " An end-of-text token ends it earlier.",
)
@click.option("--temperature", type=float, default=1.0, show_default=True, help="0 is greedy.")
@click.option("--topk", type=int, default=1, show_default=True, help="1 is greedy, 0 is off.")
@click.option("--topp", type=float, default=1.0, show_default=True, help="1 is off.")
@click.option("--minp", type=float, default=0.0, show_default=True, help="0 is off.")
@click.option("--repetition_penalty", type=float, default=1.0, show_default=True, help="1 is off.")
@click.option("--streaming", is_flag=True, help="Print the text as it comes.")
@graph_option()
@click.option("--benchmark", is_flag=True, help="After that, time the same run --repeats times.")
@click.option(
    "--repeats", type=click.IntRange(min=1), default=100, show_default=True, help="For --benchmark."
)
@quantize_flags
@device_option()
@seed_option()
@click.option("--verbose", is_flag=True, help="Progress bars, even if stderr is no terminal.")
def command(model: str, **options: Any) -> None:
    """Continue a prompt with MODEL: a folder, a hub id, or a model stored under --pretrained_dir.

    The continuation is greedy unless --topk says otherwise. A float MODEL is quantized first with
    --quantize, and stored and used again as main.py does.
    """
    flags = QuantizeFlags.take(options)
    if options["prompt"] is not None and options["promptlen"] is not None:
        raise QuambaError("--prompt and --promptlen exclude each other: a text, or that many random tokens.")
    from quamba.cli.obtain import obtain
    from quamba.runtime.sampling import SamplingParams

    sampling = SamplingParams(
        temperature=options["temperature"],
        top_k=options["topk"],
        top_p=options["topp"],
        min_p=options["minp"],
        repetition_penalty=options["repetition_penalty"],
    )
    with TqdmProgress(options["verbose"]) as progress:
        got = obtain(
            model,
            flags,
            device=options["device"],
            backend=options["backend"],
            seed=options["seed"],
            progress=progress,
        )
    graph = graph_choice(options["cache_graph"], got.model.device)
    prompts = _prompts(
        got.model, options["prompt"], options["promptlen"], options["batch_size"], options["seed"]
    )
    generate = partial(
        got.model.generate,
        prompts,
        max_new_tokens=options["genlen"],
        sampling=sampling,
        seed=options["seed"],
        cuda_graph=graph,
    )
    if options["streaming"]:
        _stream(got.model, prompts, generate)
    else:
        _print(got.model, prompts, generate)
    if options["benchmark"]:
        _benchmark(got.model, generate, options["repeats"])


def _prompts(
    model: Model, prompt: str | None, random_length: int | None, batch: int, seed: int
) -> list[str] | Tensor:
    """The text, or random ids (batch, random_length) int64 of the model's vocabulary."""
    if random_length is None:
        if model.tokenizer is None:
            raise QuambaError(
                f"'{model.source}' has no tokenizer to read a prompt with, expected --promptlen N or a "
                "tokenizer.json in its folder."
            )
        return [DEFAULT_PROMPT if prompt is None else prompt] * batch
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (batch, random_length), generator=generator)


def _print(model: Model, prompts: list[str] | Tensor, generate: Callable[..., Any]) -> None:
    generations = generate()
    for i, generation in enumerate(generations):
        if i:
            click.echo()
        click.echo(_opening(model, prompts, i) + (generation.text or _numbers(model, generation.ids)))
    first = generations[0]
    seconds = first.prefill_seconds + first.decode_seconds
    say(
        f"{sum(len(g.prompt_ids) for g in generations)} prompt tokens, {first.tokens} new tokens in "
        f"{seconds:.2f} s ({first.tokens / seconds:.1f} tokens/s)."
    )


def _stream(model: Model, prompts: list[str] | Tensor, generate: Callable[..., Any]) -> None:
    from quamba.runtime.stream_text import stream_text

    if len(prompts) != 1:
        raise QuambaError(f"--streaming prints one continuation, not {len(prompts)}; use --batch_size 1.")
    steps = generate(stream=True)
    click.echo(_opening(model, prompts, 0), nl=False)
    if model.tokenizer is None:
        click.echo(" ".join(str(int(ids[0])) for ids in steps))
        return
    prompt = prompts[0]
    context = model.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt.tolist()
    for piece in stream_text(steps, model.tokenizer, context=context):
        click.echo(piece, nl=False)
    click.echo()


def _benchmark(model: Model, generate: Callable[..., Any], repeats: int) -> None:
    times_ms, tokens = [], 0
    if model.device.type == "cuda":
        generate()  # the second prompt of a length is when its graph is captured
    for _ in range(repeats):
        start = time.perf_counter()
        tokens = generate()[0].tokens
        times_ms.append(1e3 * (time.perf_counter() - start))
    mean_ms = statistics.fmean(times_ms)
    click.echo(
        f"{repeats} runs of prompt and {tokens} new tokens on {model.device}: mean {mean_ms:.1f} ms, "
        f"median {statistics.median(times_ms):.1f} ms, {1e3 * tokens / mean_ms:.1f} tokens/s."
    )


def _opening(model: Model, prompts: list[str] | Tensor, i: int) -> str:
    """The prompt as text, so that what is printed reads on."""
    if isinstance(prompts, list):
        return prompts[i]
    if model.tokenizer is not None:
        return model.tokenizer.decode(prompts[i].tolist())
    return _numbers(model, prompts[i].tolist()) + " "


def _numbers(model: Model, ids: list[int]) -> str:
    """The ids themselves, for a model without a tokenizer."""
    return " ".join(str(i) for i in ids) if model.tokenizer is None else ""
