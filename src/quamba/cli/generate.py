"""``quamba generate`` and generate.py: continue prompts."""

from __future__ import annotations

import json
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
from quamba.cli.generation import Results, Rows, benchmark, benchmark_table
from quamba.cli.prompts import (
    DEFAULT_PROMPT,
    as_text,
    check_prompt_flags,
    random_ids,
    read_texts,
    require_reader,
)
from quamba.errors import QuambaError

if TYPE_CHECKING:
    from quamba.api import Model
    from quamba.runtime.sampling import SamplingParams

# Rows at once where --batch_size does not say.
_AT_ONCE = 8


@click.command(cls=Command)
@click.argument("model")
@click.option("--prompt", metavar="TEXT", help=f'Text to continue. Default: "{DEFAULT_PROMPT}".')
@click.option(
    "--prompt_file",
    metavar="FILE|-",
    help="Continue every line of a text file, or of standard input (-); blank lines are passed over.",
)
@click.option(
    "--promptlen",
    type=click.IntRange(min=1),
    help="Continue this many random tokens instead of a text.",
)
@click.option(
    "--batch_size",
    type=click.IntRange(min=1),
    help="Continuations at once. Of --prompt_file so many lines (default: 8); else so many continuations of"
    " the same text, or of different random tokens (default: 1).",
)
@click.option(
    "--num_return",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Continuations of each prompt; they differ with --topk other than 1.",
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
@click.option(
    "--stop",
    multiple=True,
    metavar="TEXT",
    help="End a continuation before this text; may be given several times. A line break is $'\\n' in bash.",
)
@click.option("--streaming", is_flag=True, help="Print the text as it comes.")
@graph_option()
@click.option(
    "--benchmark",
    is_flag=True,
    help="After that, time the same run --repeats times: prefill and decoding apart.",
)
@click.option(
    "--repeats", type=click.IntRange(min=1), default=100, show_default=True, help="For --benchmark."
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print JSON: texts, tokens, timings and --benchmark's numbers."
)
@quantize_flags
@device_option()
@seed_option()
@click.option("--verbose", is_flag=True, help="Progress bars, even if stderr is no terminal.")
def command(model: str, **options: Any) -> None:
    """Continue prompts with MODEL: a folder, a hub id, or a model stored under --pretrained_dir.

    The continuation is greedy unless --topk says otherwise. A float MODEL is quantized first with
    --quantize, and stored and used again as main.py does.
    """
    flags = QuantizeFlags.take(options)
    _check(options)
    from quamba.cli.obtain import obtain
    from quamba.runtime.sampling import SamplingParams

    sampling = SamplingParams(
        temperature=options["temperature"],
        top_k=options["topk"],
        top_p=options["topp"],
        min_p=options["minp"],
        repetition_penalty=options["repetition_penalty"],
    )
    texts = None if options["promptlen"] else read_texts(options["prompt"], options["prompt_file"])
    with TqdmProgress(options["verbose"]) as progress:
        got = obtain(
            model,
            flags,
            device=options["device"],
            backend=options["backend"],
            seed=options["seed"],
            progress=progress,
        )
    rows = _rows(got.model, texts, sampling, options)
    if options["streaming"]:
        _stream(got.model, rows, options["stop"])
        results = None
    else:
        results = rows.run()
    measured = None
    if results is not None and not options["as_json"]:
        _print(got.model, rows, results)
    if options["benchmark"]:
        # On a GPU the second prompt of a length is when its graph is captured.
        measured = benchmark(rows, options["repeats"], warmups=1 if got.model.device.type == "cuda" else 0)
    if results is not None and options["as_json"]:
        record = _record(got.model, rows, results, sampling, options)
        click.echo(json.dumps({**record, "benchmark": measured}, indent=2))
    elif measured is not None:
        click.echo(
            f"\n{measured['repeats']} runs after {measured['warmups']} untimed on {got.model.device}, "
            f"each of {measured['prompt_tokens']} prompt tokens and {measured['new_tokens']} new ones:"
        )
        click.echo(benchmark_table(measured))


def _check(options: dict[str, Any]) -> None:
    """What can be refused from the flags alone."""
    check_prompt_flags(options["prompt"], options["prompt_file"], options["promptlen"])
    if options["streaming"] and options["as_json"]:
        raise QuambaError("--streaming and --json exclude each other, expected one of them.")
    if "" in options["stop"]:
        raise QuambaError("--stop is empty, expected some text.")
    if options["num_return"] > 1 and (options["topk"] == 1 or options["temperature"] == 0):
        say("The choice is greedy, so all continuations of a prompt are the same; --topk 0 draws them.")


def _rows(model: Model, texts: list[str] | None, sampling: SamplingParams, options: dict[str, Any]) -> Rows:
    """Every continuation that is asked for."""
    batch = options["batch_size"] or 1
    prompts: list[Any]
    if texts is None:
        prompts = random_ids(model, batch, options["promptlen"], options["seed"])
    else:
        require_reader(model)
        prompts = texts if options["prompt_file"] is not None else texts * batch
    prompts = [prompt for prompt in prompts for _ in range(options["num_return"])]
    if options["streaming"] and len(prompts) != 1:
        raise QuambaError(
            f"--streaming prints one continuation, not {len(prompts)}; use --batch_size 1, --num_return 1 "
            "and one prompt."
        )
    generate = partial(
        model.generate,
        max_new_tokens=options["genlen"],
        sampling=sampling,
        stop=options["stop"],
        cuda_graph=graph_choice(options["cache_graph"], model.device),
    )
    return Rows(prompts, options["batch_size"] or _AT_ONCE, options["seed"], generate)


def _print(model: Model, rows: Rows, results: Results) -> None:
    for i, (prompt, generation) in enumerate(zip(rows.prompts, results.generations, strict=True)):
        if i:
            click.echo()
        click.echo(as_text(model, prompt) + (generation.text or _numbers(model, generation.ids)))
    timings = results.timings
    say(
        f"{timings.prompt_tokens} prompt tokens, {timings.new_tokens} new tokens in "
        f"{timings.seconds:.2f} s ({timings.new_tokens / timings.seconds:.1f} tokens/s)."
    )


def _stream(model: Model, rows: Rows, stop: tuple[str, ...]) -> None:
    from quamba.runtime.stream_text import stream_text

    prompt = rows.prompts[0]
    steps: Any = rows.generate([prompt], seed=rows.seed, stream=True)
    click.echo(as_text(model, prompt), nl=False)
    if model.tokenizer is None:
        click.echo(" ".join(str(int(ids[0])) for ids in steps))
        return
    context = model.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    for piece in stream_text(steps, model.tokenizer, stop, context=context):
        click.echo(piece, nl=False)
    click.echo()


def _record(
    model: Model, rows: Rows, results: Results, sampling: SamplingParams, options: dict[str, Any]
) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "model": model.source,
        "recipe": None if model.recipe is None else model.recipe.name,
        "device": str(model.device),
        "seed": options["seed"],
        "sampling": asdict(sampling),
        "generations": [
            {
                "prompt": prompt if isinstance(prompt, str) else None,
                "prompt_ids": generation.prompt_ids,
                "text": generation.text,
                "ids": generation.ids,
                "finished": generation.finished,
            }
            for prompt, generation in zip(rows.prompts, results.generations, strict=True)
        ],
        "timings": results.timings.to_dict(),
    }


def _numbers(model: Model, ids: list[int]) -> str:
    """The ids themselves, for a model without a tokenizer."""
    return " ".join(str(i) for i in ids) if model.tokenizer is None else ""
