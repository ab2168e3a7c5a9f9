"""Which tensors a float model has: name and shape of each, from its config alone."""

from __future__ import annotations

from quamba.models.config import Mamba2Config, MambaConfig, ModelConfig

Shape = tuple[int, ...]


def expected_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Canonical tensor names (``docs/architecture.md``) to shapes, in the order of the forward pass.

    ``lm_head.weight`` is there only when the head is not tied to the embedding.
    """
    table = (config.padded_vocab_size, config.d_model)
    mixer = _mamba2_mixer(config) if isinstance(config, Mamba2Config) else _mamba1_mixer(config)
    shapes: dict[str, Shape] = {"backbone.embedding.weight": table}
    for layer in range(config.n_layer):
        shapes.update(_norm(f"backbone.layers.{layer}.norm", config))
        for name, shape in mixer.items():
            shapes[f"backbone.layers.{layer}.mixer.{name}"] = shape
    shapes.update(_norm("backbone.norm_f", config))
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = table
    return shapes


def _norm(name: str, config: ModelConfig) -> dict[str, Shape]:
    """A LayerNorm (``rms_norm`` false) has a bias, an RMSNorm none."""
    leaves = ("weight",) if config.rms_norm else ("weight", "bias")
    return {f"{name}.{leaf}": (config.d_model,) for leaf in leaves}


def _mamba1_mixer(config: MambaConfig) -> dict[str, Shape]:
    """in_proj gives (x, z), x_proj gives (dt, B, C); ``bias`` is that of in_proj and out_proj."""
    inner, rank, state = config.d_inner, config.dt_rank, config.d_state
    return {
        **_projection("in_proj", 2 * inner, config.d_model, config.bias),
        **_convolution(config),
        "x_proj.weight": (rank + 2 * state, inner),
        "dt_proj.weight": (inner, rank),
        "ssm.A_log": (inner, state),
        "ssm.D": (inner,),
        "ssm.dt_bias": (inner,),
        **_projection("out_proj", config.d_model, inner, config.bias),
    }


def _mamba2_mixer(config: Mamba2Config) -> dict[str, Shape]:
    """in_proj gives (z, x, B, C, dt); the convolution runs over (x, B, C)."""
    inner, heads = config.d_inner, config.nheads
    return {
        **_projection("in_proj", inner + config.conv_dim + heads, config.d_model, config.bias),
        **_convolution(config),
        "ssm.A_log": (heads,),
        "ssm.D": (inner,) if config.D_has_hdim else (heads,),
        "ssm.dt_bias": (heads,),
        "norm.weight": (inner,),
        **_projection("out_proj", config.d_model, inner, config.bias),
    }


def _projection(name: str, out_features: int, in_features: int, bias: bool) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {f"{name}.weight": (out_features, in_features)}
    if bias:
        shapes[f"{name}.bias"] = (out_features,)
    return shapes


def _convolution(config: ModelConfig) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {"conv1d.weight": (config.conv_dim, config.d_conv)}
    if config.conv_bias:
        shapes["conv1d.bias"] = (config.conv_dim,)
    return shapes
