"""What settings are going to make of a model, before any long work: its packed matrices as an
engine's rules look at them, and the settings that the target cannot run."""

from qmoe.config import QuantConfig, Scheme
from qmoe.engines.check import engine
from qmoe.engines.contents import Contents, Form, Matrix
from qmoe.engines.rule import Setup, findings
from qmoe.errors import ConfigError
from qmoe.model.experts import matrices_of
from qmoe.model.schemes import stored_widths, weight_shapes
from qmoe.model.source import Source, schemes_of, widths_of
from qmoe.model.structure import Layer
from qmoe.model.tensor_names import matrices_in, matrix_names


def check_target(source: Source, config: QuantConfig) -> None:
    """Raises ConfigError for settings that the target cannot run, with the first matrix of every
    rule that is broken. One device is assumed to hold every layer."""
    if config.target == "qmoe":
        return
    found = findings(engine(config.target), contents_of(source, config), Setup())
    if found:
        said = "\n".join(f"  {finding}" for finding in found)
        raise ConfigError(
            f"target: {config.target} cannot run what these settings make; change them, or leave "
            f"out the target:\n{said}"
        )


def contents_of(source: Source, config: QuantConfig) -> Contents:
    """What a folder with these settings is going to hold."""
    settings = source.checkpoint.config
    if config.format == "exl3":
        return Contents(settings, "exl3", "exl3", [])
    matrices = [m for layer in source.structure.layers for m in _of_layer(source, layer, config)]
    if config.lm_head is not None and source.structure.lm_head is not None:
        matrices += _of_linear(source, source.structure.lm_head, config.lm_head)
    name = "pack-quantized-rotated" if config.rotated else "pack-quantized"
    return Contents(
        settings,
        "compressed-tensors",
        name,
        matrices,
        [name],
        source.unquantized_linears(config),
    )


def _of_layer(source: Source, layer: Layer, config: QuantConfig) -> list[Matrix]:
    found, widths = [], widths_of(layer, config)
    for name, scheme in schemes_of(source, layer, config).items():
        if name not in layer.experts:
            found += _of_linear(source, name, scheme)
            continue
        module = source.model.get_submodule(name)
        for target, (E, rows, inputs) in weight_shapes(source.model, name):
            parts = len(matrices_of(module, target.rpartition(".")[2]))
            own = stored_widths(source.model, target, widths.get(target) or (scheme.bits,) * E)
            for matrix, bits in own.items():
                form = Form(bits, scheme.group_size, scheme.symmetric)
                found.append(Matrix(matrix.removesuffix(".weight"), rows // parts, inputs, form))
    return found


def _of_linear(source: Source, name: str, scheme: Scheme) -> list[Matrix]:
    """A linear, which may be stored as several matrices."""
    ((target, (rows, inputs)),) = weight_shapes(source.model, name)
    count = matrices_in(source.model, target)
    form = Form(scheme.bits, scheme.group_size, scheme.symmetric)
    return [
        Matrix(stored.removesuffix(".weight"), rows // count, inputs, form)
        for stored in matrix_names(source.model, target, None, count)
    ]
