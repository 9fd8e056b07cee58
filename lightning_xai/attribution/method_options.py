"""Attribution methods by their names, built with the options that the command line gives."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from jsonargparse import ArgumentParser

from lightning_xai.attribution.base import AttributionMethod
from lightning_xai.attribution.registry import ALL, METHODS
from lightning_xai.models.at_layer import UnsupportedTowerError, first_layer
from lightning_xai.models.encoder import TwoTowerEncoder
from lightning_xai.registry import resolve_options

__all__ = [
    "ALL",
    "ChosenMethod",
    "at_layers",
    "check_at_inputs",
    "check_method",
    "choose_method",
    "choose_methods",
    "inputs_hint",
]

_LAYERS = ("image_layer", "text_layer")
# Where one pair is looked at, its numbers may cost more than those of a preset that is made for thousands.
_AT_INPUTS = {"rule": "midpoint", "steps": 10}


@dataclass(frozen=True)
class ChosenMethod:
    """A method of a model, ready to be used.

    Attributes:
        name: as the command line knows it.
        method: the method itself.
        options: every option and its value, those left at their defaults or to the method included.
        layers: those of image and text tower that are attributed to; None for methods without.
        where: these layers in words: `"inputs of both towers (layers 0, 0)"`.
        several: whether it is one of several readings of the method, at other layers each.
    """

    name: str
    method: AttributionMethod
    options: dict[str, Any]
    layers: tuple[int, int] | None = None
    where: str = ""
    several: bool = False

    @property
    def label(self) -> str:
        """Its name, and its layers where there are several readings: `"feature_pair,0,0"`."""
        return f"{self.name},{self.layers[0]},{self.layers[1]}" if self.several and self.layers else self.name


def choose_methods(
    encoder: TwoTowerEncoder, name: str, options: Mapping[str, Any]
) -> tuple[list[ChosenMethod], dict[str, str]]:
    """Build a method by its name, or all of them.

    Args:
        encoder: the model to explain.
        name: of the method; `"all"` for all that serve the model.
        options: those of the method. For all methods an option counts for each that has one of its name, and
            `{"rise": {...}}` holds options for a single one.

    Returns:
        The methods, and the names of those that cannot serve the model with the reason.

    Raises:
        ValueError: an unknown method or option, a value of another type, or a method that cannot serve the model
            (unless all were asked for).
    """
    if name != ALL:
        return [choose_method(encoder, name, options)], {}
    chosen, missing = [], {}
    for each, own in _shared_out(options).items():
        values = _resolved(each, own)
        try:
            chosen.append(_built(encoder, each, values))
        except UnsupportedTowerError as error:
            missing[each] = str(error)
    return chosen, missing


def choose_method(encoder: TwoTowerEncoder, name: str, options: Mapping[str, Any]) -> ChosenMethod:
    """Build one method by its name.

    Args:
        encoder: the model to explain.
        name: of the method.
        options: of the method.

    Raises:
        ValueError: an unknown method (all methods together are none) or option, a value of another type, or a method
            that cannot serve the model.
    """
    check_method(name)
    if name == ALL:
        raise ValueError(f"expected one method, got {ALL!r}; give each by its name: {', '.join(METHODS)}")
    values = _resolved(name, options)
    try:
        return _built(encoder, name, values)
    except UnsupportedTowerError as error:
        others = ", ".join(other for other in METHODS if other != name)
        raise UnsupportedTowerError(f"{error}; other methods: {others}") from error


def _built(encoder: TwoTowerEncoder, name: str, values: Mapping[str, Any]) -> ChosenMethod:
    method = METHODS[name](encoder, **values)
    return ChosenMethod(name, method, {**values, **method.resolved_options})


def at_layers(chosen: ChosenMethod, given: Mapping[str, Any], *, at_inputs: bool = False) -> list[ChosenMethod]:
    """A method that integrates between layers of both towers, with these layers named.

    At the inputs, or the first layers that the towers have, 10 midpoints are used unless you chose others: with as many
    points their completeness error there is a seventh of the paper's rule's (0.002 and 0.013 at a similarity of 0.65,
    the demo's model at 10 points), at the same cost.

    Args:
        chosen: the method.
        given: the options that you gave. With a layer among them, the method is read there alone.
        at_inputs: read it at the inputs of both towers as well.

    Returns:
        The inputs' first, if wanted; the method alone where it is not read at layers, or where these are the first
        already.
    """
    options, encoder = chosen.options, chosen.method.encoder
    if not options.keys() >= {*_LAYERS} or None in (options[name] for name in _LAYERS) or not encoder.has_image_tower:
        return [chosen]
    if not at_inputs or not _integrates(options) or _layers_among(given, chosen.name):
        return [_at(chosen, options)]
    firsts = _first_layers(encoder)
    last = _at(chosen, options, firsts)
    if last.layers == firsts:
        return [last]
    first = dict(zip(_LAYERS, firsts, strict=True))
    names = {*given, *_own(given, chosen.name)}
    accurate = {name: value for name, value in _AT_INPUTS.items() if name in options and name not in names}
    values = options | first | accurate | ({"preset": "inputs"} if "preset" in options else {})
    inputs = replace(chosen, method=METHODS[chosen.name](encoder, **values), options=values)
    return [replace(each, several=True) for each in (_at(inputs, values, firsts), last)]


def check_at_inputs(name: str, given: Mapping[str, Any]) -> None:
    """Raise a ValueError where a method cannot be read at the inputs as well as at its own layers.

    Args:
        name: of the method; `"all"` for all that can.
        given: the options that you gave.
    """

    def able(each: str) -> bool:
        return _integrates(_names(_parser(each)))

    if name != ALL and not able(name):
        others = ", ".join(each for each in METHODS if able(each))
        raise ValueError(f"--at-inputs needs a method that integrates between layers ({others}); got --method {name}")
    for each in METHODS if name == ALL else [name]:
        if able(each) and (layers := _layers_among(given, each)):
            raise ValueError(
                f"--at-inputs adds the inputs to the layers that {each} reads by itself; --options.{layers[0]} says "
                "where to read instead: give one of them"
            )


def inputs_hint(chosen: Iterable[ChosenMethod], given: Mapping[str, Any]) -> str:
    """The sentence that names --at-inputs, where a method that was chosen is read at later layers; else empty.

    Args:
        chosen: the methods, at their layers.
        given: the options that you gave.
    """
    for each in chosen:
        reads_inputs = each.layers is None or not any(each.layers)
        if not reads_inputs and _integrates(each.options) and not _layers_among(given, each.name):
            return (
                f"{each.name} is read at the {each.where}; --at-inputs adds the inputs of both towers (or the first "
                "layers that can be read), where maps mostly agree better with perturbed inputs, and takes longer."
            )
    return ""


def _layers_among(given: Mapping[str, Any], name: str) -> list[str]:
    """The options that say where a method reads the towers, as they were given: for all methods, or for it."""
    found = [option for option in _LAYERS if given.get(option) is not None]
    return found + [f"{name}.{option}" for option in _LAYERS if _own(given, name).get(option) is not None]


def _own(given: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    own = given.get(name)
    return own if isinstance(own, Mapping) else {}


def _integrates(options: Collection[str]) -> bool:
    """True if a method with these options integrates between a layer of each tower and the embeddings."""
    return {*_LAYERS, "rule"} <= {*options}


def _first_layers(encoder: TwoTowerEncoder) -> tuple[int, int]:
    return first_layer(encoder.image_at_layer), first_layer(encoder.text_at_layer)


def _at(chosen: ChosenMethod, options: Mapping[str, Any], firsts: tuple[int, int] | None = None) -> ChosenMethod:
    """A method with the layers of its options, in numbers and in words.

    Args:
        chosen: the method.
        options: its options.
        firsts: the first layers that the towers have, where they are known: finding them runs the towers.
    """
    encoder = chosen.method.encoder
    towers = encoder.image_at_layer(options["image_layer"]), encoder.text_at_layer(options["text_layer"])
    image, text = layers = towers[0].layer, towers[1].layer
    where = f"layers ({image}, {text})"
    if layers == (0, 0):
        where = "inputs of both towers (layers 0, 0)"
    elif layers == firsts:
        where = f"first layers ({image}, {text})"
    elif all(tower.layer == tower.layers[-1] for tower in towers):
        where = f"last blocks ({image}, {text})"
    elif all(tower.layer == tower.reading_layer for tower in towers):
        where = f"reading layers ({image}, {text})"
    elif firsts is None and layers == _first_layers(encoder):
        where = f"first layers ({image}, {text})"
    return replace(chosen, layers=layers, where=where)


def check_method(
    name: str, *, pairwise: str | None = None, intra_modal: str | None = None, compares_images: str | None = None
) -> None:
    """Raise a ValueError that lists the methods where there is none of that name, or it lacks a capability.

    Args:
        name: of the method.
        pairwise: the option, where one was given, that asks for a map of a phrase within its caption.
        intra_modal: the option, where one was given, that asks for a comparison of two images or two captions.
        compares_images: the option, where one was given, that asks for a comparison of two images.
    """
    if name != ALL and name not in METHODS:
        raise ValueError(f"unknown method {name!r}; there are {', '.join(METHODS)}, and {ALL}")
    needs = {
        ("pairwise",): (pairwise, "a method with token-patch attributions"),
        ("intra_modal",): (intra_modal, "a method that compares two images or two captions"),
        ("intra_modal", "compares_images"): (compares_images, "a method that compares two images"),
    }
    for flags, (option, what) in needs.items():
        if option is None or (name != ALL and any(getattr(METHODS[name], flag) for flag in flags)):
            continue
        able = [each for each, method in METHODS.items() if any(getattr(method, flag) for flag in flags)]
        if name not in able:
            raise ValueError(f"{option} needs {what} ({', '.join(able)}); got --method {name}")


def _shared_out(options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """For each method its own part of the options."""
    common = {key: value for key, value in options.items() if key not in METHODS}
    parsers = {name: _parser(name) for name in METHODS}
    unknown = common.keys() - {key for name in METHODS for key in _names(parsers[name])}
    if unknown:
        raise ValueError(f"no method has the option {', '.join(sorted(unknown))}; see --method NAME --options.x 1")
    shares = {}
    for name, parser in parsers.items():
        own = options.get(name, {})
        if not isinstance(own, Mapping):
            raise ValueError(f"--options.{name} holds options of the method {name}; got {own!r}")
        shares[name] = {key: value for key, value in common.items() if key in _names(parser)} | dict(own)
    return shares


def _parser(name: str) -> ArgumentParser:
    """Knows a method's options and their types from its signature."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(METHODS[name], skip={"encoder"}, sub_configs=False)
    return parser


def _names(parser: ArgumentParser) -> list[str]:
    return list(parser.get_defaults().as_dict())


def _resolved(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """All options of a method, with values of the right types."""
    return resolve_options(_parser(name), options, name, f"--options of {name}")
