"""Prompts that cannot fit are refused before the system ends the process for them."""

from __future__ import annotations

from quamba.errors import QuambaError

# An id as a Python integer in a list, and in the tensors made of it.
_ID_BYTES = 48


def check_prompt_memory(batch: int, length: int, option: str) -> None:
    """Refuse random prompts whose ids alone need more memory than is free; ``option`` gave the length."""
    from quamba.quantization.memory import free_bytes

    free, needed = free_bytes(), _ID_BYTES * batch * length
    if free is not None and needed > free:
        raise QuambaError(
            f"{option} {length} needs at least {needed / 2**30:,.1f} GiB for {batch:,} "
            f"prompt{'' if batch == 1 else 's'}, and {free / 2**30:,.1f} GiB are free; "
            f"expected at most {free // (_ID_BYTES * batch):,} tokens."
        )
