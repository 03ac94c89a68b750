"""Inserts the KD layers of a saved student into a new model, after a check that they fit."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdlayers._leaving.student_file import LayerDescription, SavedStudent
from kdlayers._models.wrappers import plain_name, plainly_named
from kdlayers._step.sites import home_of, place
from kdlayers._step.slot import SLOT, Slot
from kdlayers._step.tape import Tape
from kdlayers._utils.archives import tensors_in
from kdlayers._utils.plain_tensors import finite, why_hollow
from kdlayers.errors import CheckpointError

_ADVICE = "pass a model of the class and sizes that the student was made with"


@dataclass(frozen=True)
class Place:
    """The place of one KD layer in the model."""

    layer: LayerDescription
    home: nn.Module
    prefix: str
    """Prefix of the keys of the layer's tensors."""
    others: tuple[str, ...] = ()
    """Further prefixes, if the model has the module under several names."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the layer's tensors, by their keys in the state."""
        with torch.device("meta"):
            tensors = make_slot(self.layer).state_dict()
        return {
            prefix + key: tuple(value.shape)
            for prefix in (self.prefix, *self.others)
            for key, value in tensors.items()
        }


def make_slot(layer: LayerDescription) -> Slot:
    """A KD layer of these sizes; its values will be overwritten."""
    with torch.random.fork_rng(devices=[]):
        slot = Slot(
            layer.in_channels,
            layer.num_templates,
            alpha=layer.alpha,
            channel_dim=layer.channel_dim,
            memory=layer.memory,
        )
    slot.norm.eps = layer.eps
    return slot


def slot_keys() -> set[str]:
    """The names of a KD layer's tensors."""
    with torch.device("meta"):
        return set(Slot(1, 1).state_dict())


def find_places(model: nn.Module, saved: SavedStudent) -> list[Place]:
    """Find the places of the layers in ``model``, without changing it.

    Raises:
        CheckpointError: if the file's layers or weights do not fit the model.
    """
    names = dict(plainly_named(model))
    places = [_place(model, names, layer, saved.state) for layer in saved.layers]
    if len({place.prefix for place in places}) < len(places):
        raise CheckpointError("the file is damaged: two of its KD layers are at the same module")
    _check_state(model, saved.state, places)
    return places


def _place(
    model: nn.Module, names: dict[str, nn.Module], layer: LayerDescription, state: dict[str, Any]
) -> Place:
    if layer.name not in names:
        raise CheckpointError(
            f"the file has a KD layer at {layer.name!r}, but this {type(model).__name__} has no "
            f"module with that name; {_ADVICE}"
        )
    home = home_of(model, layer.name)
    every = model.named_modules(remove_duplicate=False)
    plain = [plain_name(at) for at, module in every if module is home]
    prefix, *others = (f"{at}.{SLOT}." if at else f"{SLOT}." for at in plain)
    weight = state.get(f"{prefix}head.weight")
    sizes = (layer.num_templates, layer.in_channels)
    # Check before allocating memory: a wrong size must not exhaust it.
    if not isinstance(weight, Tensor) or tuple(weight.shape) != sizes:
        found = tuple(weight.shape) if isinstance(weight, Tensor) else "missing"
        raise CheckpointError(
            f"the KD layer at {layer.name!r} is described with (templates, channels) {sizes}, but "
            f"its weights are {found}: the file is damaged"
        )
    return Place(layer, home, prefix, tuple(others))


def _check_state(model: nn.Module, theirs: dict[str, Any], places: list[Place]) -> None:
    """Compare keys, types and shapes before anything is allocated or changed."""
    own = model.state_dict()
    for key, value in own.items():
        if isinstance(value, Tensor) and value.is_meta:
            raise CheckpointError(
                f"{key} of this {type(model).__name__} is on the meta device, where values cannot "
                'be loaded; call model.to_empty(device="cpu") first'
            )
    ours = {key: _form(value) for key, value in own.items()}
    for item in places:
        ours |= {key: f"shape {shape}" for key, shape in item.shapes().items()}
    found = {key: _form(value) for key, value in theirs.items()}
    for key, value in theirs.items():
        why = next((why for t in tensors_in(value) if (why := why_hollow(t)) is not None), None)
        found[key] = found[key] if why is None else f"{found[key]} but {why}"
    wrong = [
        *(f"{key} is missing" for key in ours if key not in found),
        *(f"{key} is unknown" for key in found if key not in ours),
        *(f"{k} has {found[k]}, not {ours[k]}" for k in ours if found.get(k, ours[k]) != ours[k]),
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(
            f"the file's weights do not fit this {type(model).__name__}: "
            f"{'; '.join(wrong[:3])}{more}; {_ADVICE}"
        )


def _form(value: Any) -> str:
    """Description of the properties that two entries must share."""
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    kinds = {
        "no values (meta)": value.is_meta,
        "a sparse layout": value.layout is not torch.strided,
        "quantized values": value.is_quantized,
        "complex values": value.is_complex(),
    }
    return " and ".join(
        [f"shape {tuple(value.shape)}", *(kind for kind, yes in kinds.items() if yes)]
    )


def insert(model: nn.Module, places: list[Place], state: dict[str, Any]) -> None:
    """Insert the layers, with the devices and dtypes of ``model``, and load ``state``.

    Raises:
        CheckpointError: if the model fails to load its state.
    """
    own, tape = model.state_dict(), Tape(armed=False)
    for item in places:
        slot = _fitted_to(model, item, own, state)
        place(model, item.layer.name, slot, item.layer.path, tape)
    try:
        model.load_state_dict(state)
    except Exception as error:  # a module's own loading may fail in any way
        raise CheckpointError(
            f"this {type(model).__name__} failed to load the file's weights: {error}; {_ADVICE}"
        ) from error
    _check_range(model, state)


def _fitted_to(model: nn.Module, item: Place, own: dict[str, Any], state: dict[str, Any]) -> Slot:
    """Create the slot. Each dtype of the file becomes the one that ``model`` has in its place."""
    near = item.prefix.removesuffix(f"{SLOT}.")
    floats = {k: v for k, v in own.items() if isinstance(v, Tensor) and v.is_floating_point()}
    dtypes: dict[torch.dtype, torch.dtype] = {}
    for key in sorted(floats, key=lambda key: not key.startswith(near)):
        dtypes.setdefault(state[key].dtype, floats[key].dtype)
    with torch.device("cpu"):  # whatever the default device
        slot = make_slot(item.layer)
    like = next((t for t in (*item.home.parameters(), *model.parameters(), *model.buffers())), None)
    slot.to(None if like is None else like.device)
    for key, tensor in slot.state_dict(keep_vars=True).items():
        saved = state[item.prefix + key].dtype
        tensor.data = tensor.data.to(dtypes.get(saved, saved))
    return slot.train(item.home.training)


def _check_range(model: nn.Module, state: dict[str, Any]) -> None:
    """Raise an error for values that overflow the model's dtype, such as 1e5 for float16."""
    for key, value in model.state_dict().items():
        saved = state[key]
        changed = isinstance(value, Tensor) and value.dtype != saved.dtype
        if changed and not finite(value) and finite(saved):
            raise CheckpointError(
                f"{key} has values that {value.dtype} cannot hold: load the file into the model in "
                f"{saved.dtype}, and convert it afterwards"
            )
