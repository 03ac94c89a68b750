"""The methods of the benchmark: each is a recipe of plain values, which `attach` puts to work."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from common.training import Recipe
from torch import nn

import kdlayers
from kdlayers import (
    CodebookTargets,
    DecisionTargets,
    DistillLoss,
    KDHandle,
    KDPoint,
    TemplateHead,
    attach_kd,
)
from kdlayers.schedules import Cosine, LinearWarmup, Schedule


def option(default: Any, text: str) -> Any:
    """A field of `Options`, with its help text."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Options:
    """The options of the methods; the defaults were tuned on the validation images."""

    student: str = option("resnet8", "network of the student, also mobilenet_v2 or vgg")
    width: float = option(8.0, "channels of the student's first stage")
    first: str = option("layer3.0", "point of letKD-2's first layer, NAME or STUDENT:TEACHER")
    last: str = option("last", "point of the last layer and of the losses on features")
    templates: int = option(64, "number of templates K of the last layer")
    temperature: float = option(0.3, "factor of the squared distances in the codebook's softmax")
    subclasses: int = option(8, "sub-classes of each class, for letKD-2's first layer")
    components: int = option(9, "discriminant directions, for letKD-2's first layer")
    alpha_first: float = option(1.0, "value ratio of letKD-2's first layer")
    alpha_last: float = option(1.0, "value ratio of the last layer")
    head_scale: float = option(3.0, "initial scale of the scores of all layers")
    layer_weight: float = option(3.0, "weight of the layers' losses")
    layer_weight_beside: float = option(3.0, "weight of the layers' losses beside another loss")
    layer_epochs: int = option(20, "epochs over which this weight falls to 0, if falling")
    ce_weight: float = option(1.0, "weight of cross-entropy if KDLoss is added")
    kd_weight: float = option(1.0, "weight of KDLoss")
    kd_temperature: float = option(4.0, "temperature of all losses on logits")
    dkd_weight: float = option(1.0, "weight of DKDLoss after its warm-up")
    dkd_beta: float = option(2.0, "beta of DKDLoss and AEKTLoss")
    aekt_weight: float = option(0.2, "weight of AEKTLoss after its warm-up")
    aekt_clip: float = option(10.0, "ratio_clip of AEKTLoss")
    aekt_gamma: float = option(1.0, "gamma of AEKTLoss; the form ratio gets a tenth of it")
    warmup: int = option(4, "epochs over which the weight of DKDLoss and AEKTLoss rises to 1")
    skd_grad_scale: float = option(0.01, "simplifier_grad_scale of StudentFriendlyKDLoss")
    fitnet_weight: float = option(10.0, "weight of FitNetLoss")
    feature_weight: float = option(1.0, "weight of FeatureLoss, with its default distance")
    at_weight: float = option(1000.0, "weight of AttentionTransferLoss at each stage")
    iekd_weight: float = option(2000.0, "inherit_weight and explore_weight of InheritExploreLoss")
    iekd_epochs: int = option(10, "epochs of InheritExploreLoss's auto-encoder")
    width_parameters: float = option(0.0, "width with letKD-2's number of parameters; 0: search")
    width_macs: float = option(0.0, "width with letKD-2's number of multiply-adds; 0: search")


def add_options(parser: Any) -> None:
    """Add all `Options` to a command line."""
    group = parser.add_argument_group("recipe of the methods")
    for entry in fields(Options):
        name, text = entry.name.replace("_", "-"), entry.metadata["help"]
        kind = type(entry.default)
        group.add_argument(
            f"--{name}", type=kind, default=entry.default, help=f"{text}; default: %(default)s"
        )


def chosen(args: Any) -> Options:
    """The `Options` of a parsed command line."""
    return Options(**{entry.name: getattr(args, entry.name) for entry in fields(Options)})


# ------------------------------------------------------------------ recipes


def codebook(o: Options, **changes: Any) -> Recipe:
    """The layer at the last point."""
    return {
        "at": o.last,
        "targets": "codebook",
        "templates": o.templates,
        "temperature": o.temperature,
        "alpha": o.alpha_last,
    } | changes


def decisions(o: Options) -> Recipe:
    """The layer at the first point."""
    return {
        "at": o.first,
        "targets": "decisions",
        "subclasses": o.subclasses,
        "components": o.components,
        "alpha": o.alpha_first,
    }


def kd(o: Options) -> Recipe:
    return {"loss": "KDLoss", "temperature": o.kd_temperature, "weight": o.kd_weight}


def dkd(o: Options) -> Recipe:
    return {
        "loss": "DKDLoss",
        "temperature": o.kd_temperature,
        "beta": o.dkd_beta,
        "weight": o.dkd_weight,
        "ramp": o.warmup,
    }


def aekt(o: Options, form: str) -> Recipe:
    changes = {"loss": "AEKTLoss", "form": form, "weight": o.aekt_weight, "ratio_clip": o.aekt_clip}
    # The authors' summary has no weights; the form ratio diverges with a gamma of 1.
    return dkd(o) | changes | {"gamma": o.aekt_gamma * (0.1 if form == "ratio" else 1.0)}


def skd(o: Options, base: Recipe) -> Recipe:
    """The simplifier in front of another loss; weight and ramp move from it to the whole."""
    inner = {key: value for key, value in base.items() if key not in ("weight", "ramp")}
    outer = {key: value for key, value in base.items() if key in ("weight", "ramp")}
    scale = o.skd_grad_scale
    return {"loss": "StudentFriendlyKDLoss", "simplifier_grad_scale": scale, "base": inner} | outer


def attention(o: Options) -> list[Recipe]:
    stages = ("layer1", "layer2", o.last)
    loss = {"loss": "AttentionTransferLoss", "weight": o.at_weight}
    return [loss | {"at": at} for at in stages]


def fitnet(o: Options) -> Recipe:
    return {"loss": "FitNetLoss", "at": o.last, "weight": o.fitnet_weight}


def feature(o: Options) -> Recipe:
    return {"loss": "FeatureLoss", "at": o.last, "weight": o.feature_weight}


def iekd(o: Options) -> Recipe:
    return {
        "loss": "InheritExploreLoss",
        "at": o.last,
        "inherit_weight": o.iekd_weight,
        "explore_weight": o.iekd_weight,
        "epochs": o.iekd_epochs,
        "weight": 1.0,
    }


def recipes(o: Options, classes: int = 10) -> dict[str, Recipe]:
    """The recipes of all methods by name, in the order in which the methods are run.

    Args:
        o: options of the methods.
        classes: number of classes.
    """
    both = [decisions(o), codebook(o)]
    free, falling = {"supervised": False}, {"falling": True}
    parts: dict[str, Recipe] = {
        "labels only": {},
        "KD": {"losses": [kd(o)]},
        "letKD-1": {"layers": [codebook(o)]},
        "letKD-2": {"layers": both},
        "letKD-2, falling": {"layers": both} | falling,
        "QuEST": {"layers": [codebook(o, alpha=0.0)]},
        "layers only (2)": {"layers": both} | free,
        "letKD-2 + KD": {"layers": both, "losses": [kd(o)]},
        "letKD-2 + KD, falling": {"layers": both, "losses": [kd(o)]} | falling,
        "layers only (2) + KD": {"layers": both, "losses": [kd(o)]} | free,
        "DKD": {"losses": [dkd(o)]},
        "AEKT chi2": {"losses": [aekt(o, "chi2")]},
        "SKD + KD": {"losses": [skd(o, kd(o))]},
        "IE-KD": {"losses": [iekd(o)]},
        "AT": {"losses": attention(o)},
        "FitNet": {"losses": [fitnet(o)]},
        "FeatureLoss": {"losses": [feature(o)]},
        "wider, same parameters": {"width": o.width_parameters},
        "wider, same MACs": {"width": o.width_macs},
        "wider, same parameters + KD": {"width": o.width_parameters, "losses": [kd(o)]},
        "wider, same MACs + KD": {"width": o.width_macs, "losses": [kd(o)]},
        "QuEST + KD": {"layers": [codebook(o, alpha=0.0)], "losses": [kd(o)]},
        "letKD-1 + KD": {"layers": [codebook(o)], "losses": [kd(o)]},
        "letKD-2 + DKD": {"layers": both, "losses": [dkd(o)]},
        "letKD-2 + FitNet": {"layers": both, "losses": [fitnet(o)]},
        "FitNet + KD": {"losses": [fitnet(o), kd(o)]},
        "layers only (1)": {"layers": [codebook(o)]} | free,
        "AEKT ratio_sq": {"losses": [aekt(o, "ratio_sq")]},
        "AEKT ratio": {"losses": [aekt(o, "ratio")]},
        "AEKT is": {"losses": [aekt(o, "is")]},
        "SKD + DKD": {"losses": [skd(o, dkd(o))]},
    }
    return {name: completed(part, o, classes) for name, part in parts.items()}


def completed(part: Recipe, o: Options, classes: int) -> Recipe:
    """The recipe with all settings that ``part`` does not give."""
    losses = part.get("losses", [])
    plain_kd = any("KDLoss" in (x["loss"], x.get("base", {}).get("loss")) for x in losses)
    layers, supervised = part.get("layers", []), part.get("supervised", True)
    recipe: Recipe = {
        "student": o.student,
        "width": part.get("width", o.width),
        "ce_weight": o.ce_weight if plain_kd else 1.0,
        "losses": losses,
    }
    if layers:
        if not supervised:  # without targets; only the number of templates is kept
            layers = [free_layer(layer, classes) for layer in layers]
        recipe |= {"layers": layers, "supervised": supervised, "head_scale": o.head_scale}
    if layers and supervised:
        recipe["layer_weight"] = o.layer_weight_beside if losses else o.layer_weight
        if part.get("falling"):
            recipe["layer_epochs"] = o.layer_epochs
    return recipe


def free_layer(layer: Recipe, classes: int) -> Recipe:
    """A layer of the same size and with the same initial weights, without targets."""
    templates = layer["templates"] if "templates" in layer else layer["subclasses"] * classes
    return {"at": layer["at"], "templates": templates, "alpha": layer["alpha"]}


# ------------------------------------------------------------------ attaching


def attach(
    recipe: Recipe,
    student: nn.Module,
    teacher: nn.Module,
    example: torch.Tensor,
    steps: int,
    classes: int | None = None,
) -> KDHandle | None:
    """Attach a method to ``student``; returns ``None`` if the method needs no teacher.

    Args:
        recipe: recipe of the method.
        student: the student, without KD layers.
        teacher: the trained teacher.
        example: two images.
        steps: number of batches in an epoch, for the warm-ups.
        classes: number of the student's classes, if the teacher has other classes.
    """
    layers, losses = parts(recipe, steps, classes)
    if layers and not recipe["supervised"]:
        attach_kd(student, at=layers, example=example).detach()
        layers = []
    kd = None
    if layers or losses:
        kd = attach_kd(student, teacher, layers, losses=losses, example=example)
    with torch.no_grad():
        for module in student.modules():
            if isinstance(module, TemplateHead):
                module.scale.fill_(recipe["head_scale"])
    return kd


def parts(
    recipe: Recipe, steps: int, classes: int | None = None
) -> tuple[list[KDPoint], list[DistillLoss]]:
    """The points and the losses of a recipe, with the arguments of `attach`."""
    weight: float | Schedule = recipe.get("layer_weight", 1.0)
    if "layer_epochs" in recipe:
        weight = weight * Cosine(recipe["layer_epochs"], steps_per_epoch=steps)
    layers = [point(layer, weight, classes) for layer in recipe.get("layers", [])]
    return layers, [loss(part, steps) for part in recipe["losses"]]


def point(layer: Recipe, weight: float | Schedule, classes: int | None = None) -> KDPoint:
    """A KD layer with its targets, or without if the recipe has only a number of templates."""
    targets: CodebookTargets | DecisionTargets | None = None
    if layer.get("targets") == "codebook":
        targets = CodebookTargets(layer["templates"], sharpness=layer["temperature"])
    elif layer.get("targets") == "decisions":
        targets = DecisionTargets(
            layer["subclasses"], components=layer["components"], num_classes=classes
        )
    number = layer["templates"] if targets is None else None
    at = names(layer["at"])
    both = (at, None) if isinstance(at, str) else at
    return KDPoint(
        *both, targets=targets, num_templates=number, alpha=layer["alpha"], weight=weight
    )


def names(at: str) -> str | tuple[str, str]:
    """Split ``STUDENT:TEACHER``; a point without a colon has the same name in both networks."""
    student, _, teacher = at.partition(":")
    return (student, teacher) if teacher else student


def loss(part: Recipe, steps: int) -> DistillLoss:
    """Create a loss from its recipe: class, arguments, and the ramp of its weight."""
    arguments = {k: v for k, v in part.items() if k not in ("loss", "ramp", "base", "weight")}
    if "at" in part:
        arguments["at"] = names(part["at"])
    if "base" in part:
        arguments["base"] = loss(part["base"], steps)
    weight = part.get("weight", 1.0)
    if "ramp" in part:
        # In epoch e, counted from 0, min((e + 1) / epochs, 1), as in the code of DKD's authors.
        epochs = part["ramp"]
        ramp = LinearWarmup(epochs - 1, start=1 / epochs, steps_per_epoch=steps)
        arguments["weight"] = weight * ramp
    else:
        arguments["weight"] = weight
    return getattr(kdlayers, part["loss"])(**arguments)
