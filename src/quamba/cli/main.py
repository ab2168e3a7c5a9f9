"""The command ``quamba``."""

from __future__ import annotations

import click

from quamba import __version__
from quamba.cli.console import LazyGroup

_COMMANDS = {
    "quantize": ("quantize", "Quantize a float model by a recipe and save it."),
    "evaluate": ("evaluate", "Measure perplexity and lm-eval's tasks, float or quantized."),
    "generate": ("generate", "Continue a prompt."),
    "chat": ("chat", "Talk with a model that keeps its memory between turns."),
    "profile": ("profile", "Measure size and speed on this machine."),
    "compare": ("compare", "Show runs of several models side by side."),
    "analyze": ("analyze", "Show where a quantized model departs from its float model."),
    "search": ("search", "Choose the precision of each block under a budget."),
    "inspect": ("inspect", "Show what is quantized how, without loading weights."),
    "convert": ("convert", "Write a published checkpoint in our format."),
    "convert-megatron": ("convert_megatron", "Write a Megatron-LM checkpoint as a float model."),
    "export-zoo": ("export_zoo", "Write a quantized model in the published format."),
    "doctor": ("doctor", "Check that every kernel gives right results here."),
    "tune": ("tune", "Find the fastest launches of GPU kernels here."),
    "sweep": ("sweep", "Do many runs of main.py from one file."),
    "report": ("report", "Show what a sweep measured, against what was expected."),
    "recipes": ("recipes", "List the shipped recipes."),
    "demo": ("demo", "Quantize the bundled Mamba2 model, measure and run it."),
}


@click.group(cls=LazyGroup, commands_by_name=_COMMANDS)
@click.version_option(__version__, prog_name="quamba")
def main() -> None:
    """Post-training quantization of Mamba and Mamba2 language models, and running them in integers."""


if __name__ == "__main__":
    main()
