"""``quamba convert-megatron`` and ``convert_mamba2_8b_to_hf.py``: the float 8B of NVIDIA in our reach."""

from __future__ import annotations

import click

from quamba.cli.console import Command, TqdmProgress, say


@click.command(cls=Command)
@click.argument("checkpoint", metavar="CKPT")
@click.argument("vocabulary", metavar="VOCAB")
@click.option("--out", required=True, metavar="DIR", help="The folder to write.")
@click.option("--force", is_flag=True, help="Replace a model in DIR.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(checkpoint: str, vocabulary: str, out: str, force: bool, as_json: bool) -> None:
    """Write CKPT, a Mamba2 checkpoint of Megatron-LM such as nvidia/mamba2-8b-3t-4k, as a float model.

    CKPT is the file model_optim_rng.pt, its folder mp_rank_00 or any folder above it; the tensor-parallel
    ranks mp_rank_00, mp_rank_01, ... beside each other are merged. VOCAB is the SentencePiece model of the
    tokenizer. Weights stream from disk to disk, in the dtypes that they have, and nothing that the
    checkpoint's pickle names is run.
    """
    _convert(checkpoint, vocabulary, out, force, as_json)


@click.command(cls=Command)
@click.argument("source_pt", metavar="SOURCE_PT")
@click.argument("vocab_file", metavar="VOCAB_FILE")
@click.option(
    "--model_save_path",
    default="./mamba2-8b-3t-4k_converted",
    show_default=True,
    metavar="DIR",
    help="The folder to write.",
)
@click.option("--force", is_flag=True, help="Replace a model in DIR.")
def published_command(source_pt: str, vocab_file: str, model_save_path: str, force: bool) -> None:
    """Write SOURCE_PT, the Megatron checkpoint of nvidia/mamba2-8b-3t-4k, as a float model.

    VOCAB_FILE is its tokenizer, mt_nlg_plus_multilingual_ja_zh_the_stack_frac_015_256k.model. `quamba
    convert-megatron --help` says more.
    """
    _convert(source_pt, vocab_file, model_save_path, force, as_json=False)


def _convert(checkpoint: str, vocabulary: str, out: str, force: bool, as_json: bool) -> None:
    import json
    import time
    from pathlib import Path

    from quamba.checkpoints.megatron.convert import open_megatron, write_megatron
    from quamba.cli.store import check_replaceable

    folder = Path(out).expanduser()
    check_replaceable(folder, force)
    begin = time.perf_counter()
    found = open_megatron(checkpoint, vocabulary)
    config, size = found.config, found.size_bytes
    say(
        f"Mamba2 of {config.n_layer} layers, width {config.d_model}, vocabulary {config.vocab_size}, from "
        f"{len(found.ranks)} rank{'s' if len(found.ranks) > 1 else ''}: {_text(size)} to write."
    )
    with TqdmProgress() as progress:
        progress.stage("Converting (MB)", size // 10**6)
        done = 0

        def written(count: int) -> None:
            nonlocal done
            progress.step((done + count) // 10**6 - done // 10**6)
            done += count

        write_megatron(found, folder, overwrite=force, written=written)
    seconds = time.perf_counter() - begin
    if as_json:
        result = {
            "folder": out,
            "config": config.to_dict(),
            "ranks": len(found.ranks),
            "iteration": found.ranks.iteration,
            "size_bytes": size,
            "seconds": round(seconds, 3),
        }
        click.echo(json.dumps(result, indent=2))
        return
    click.echo(f"{checkpoint}: {_text(size)} converted to '{out}' in {seconds:.1f} s.")


def _text(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes >= 10**9 else f"{size_bytes / 1e6:.2f} MB"
