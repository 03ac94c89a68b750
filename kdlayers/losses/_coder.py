"""The encoders of inheritance and exploration, and the training of the teacher's encoder."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from kdlayers._utils.distributed import all_sum, world_size
from kdlayers.errors import FitError, ShapeError
from kdlayers.losses._maps import check_map


class Coder(nn.Sequential):
    """Three 3x3 convolutions, in -> in -> out -> out, between leaky ReLUs (slope 0.1).

    The first layer is a leaky ReLU. Each convolution has stride 1, padding 1 and no bias; a batch
    norm and a leaky ReLU follow it. Weights are drawn from N(0, 2 / (9 out)), as in the authors'
    code.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        layers: list[nn.Module] = [nn.LeakyReLU(0.1)]
        for inputs, outputs in (
            (in_channels, in_channels),
            (in_channels, out_channels),
            (out_channels, out_channels),
        ):
            conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(outputs), nn.LeakyReLU(0.1)]
        super().__init__(*layers)
        self.reset()

    def reset(self, generator: torch.Generator | None = None) -> None:
        """Draw new weights, from ``generator`` if given, and reset the batch norms."""
        for layer in self:
            if isinstance(layer, nn.Conv2d):
                drawn = torch.empty(layer.weight.shape, dtype=torch.float32, device="cpu")
                drawn.normal_(0, (2 / (9 * layer.out_channels)) ** 0.5, generator=generator)
                layer.weight.data.copy_(drawn)
            elif isinstance(layer, nn.BatchNorm2d):
                layer.reset_parameters()

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # the name in nn.Sequential
        """Maps ``[B, in, H, W]`` of any real dtype to ``[B, out, H, W]`` in the weights' dtype."""
        maps = input.to(self.weight.dtype)
        for layer in self:
            maps = layer(maps)
        return maps

    @property
    def weight(self) -> Tensor:
        """The first convolution's weight ``[in, in, 3, 3]``, for its type and device."""
        weight: Tensor = self[1].weight  # type: ignore[assignment]
        return weight


class AutoEncoder(nn.Module):
    """The teacher's encoder and the decoder that is trained with it."""

    def __init__(self, channels: int, factor_channels: int) -> None:
        super().__init__()
        self.encoder = Coder(channels, factor_channels)
        self.decoder = Coder(factor_channels, channels)
        self.channels, self.factor_channels = channels, factor_channels

    @property
    def weight(self) -> Tensor:
        """A weight, for its type and device."""
        return self.encoder.weight

    def forward(self, maps: Tensor) -> Tensor:
        """The reconstruction of ``maps``."""
        reconstruction: Tensor = self.decoder(self.encoder(maps))
        return reconstruction


def reconstruction_error(rebuilt: Tensor, maps: Tensor, power: int) -> Tensor:
    """Mean absolute error for ``power`` 1, mean squared error for 2."""
    difference = rebuilt - maps
    return difference.abs().mean() if power == 1 else difference.square().mean()


def freeze(module: nn.Module) -> None:
    """Turn the parameters of ``module`` into buffers of the same names, so that none is trained."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            delattr(part, name)
            part.register_buffer(name, parameter.detach())


class AutoEncoderFitter:
    """Trains an auto-encoder of the teacher's maps, with one SGD step for each batch.

    Nesterov momentum 0.9 and weight decay 5e-4, as in the authors' code. Under
    ``torch.distributed`` each rank trains on its own data, and after every pass all ranks take the
    mean of the weights. The numbers of batches may differ.

    Args:
        make: returns the auto-encoder to train, given the first batch of maps.
        done: called with it after the last pass.
        epochs: number of passes.
        power: 1 for the mean absolute error, 2 for the mean squared one.
        lr: learning rate.
        seed: seed of the initial weights.
    """

    varied = True
    """Passes may differ in order and augmentation, as in any training."""

    def __init__(
        self,
        make: Callable[[Tensor], AutoEncoder],
        done: Callable[[AutoEncoder], None],
        *,
        epochs: int,
        power: int,
        lr: float,
        seed: int,
    ) -> None:
        self._make, self._done = make, done
        self._epochs, self._power, self._lr, self._seed = epochs, power, lr, seed
        self._coder: AutoEncoder | None = None
        self._passes = 0
        self._error, self._batches = torch.zeros((), device="cpu"), 0
        self.stage = f"auto-encoder 1/{epochs}"

    def update(self, teacher: Tensor, targets: Tensor | None) -> None:  # noqa: ARG002
        """One step on the reconstruction of a batch of maps ``[B, C, H, W]``."""
        check_map("teacher", teacher)
        coder = self._start(teacher) if self._coder is None else self._coder
        if teacher.shape[1] != coder.channels:
            raise ShapeError(
                f"the teacher's maps have {teacher.shape[1]} channels, but the auto-encoder is for "
                f"{coder.channels}; give all batches the maps of one teacher's point"
            )
        if teacher.numel() == teacher.shape[1]:
            return  # one position, as of a last batch of one image, has no batch statistics
        with torch.enable_grad(), torch.autocast(teacher.device.type, enabled=False):
            maps = teacher.detach().to(coder.weight)
            if maps.is_inference():
                maps = maps.clone()  # such tensors cannot be saved for a backward pass
            error = reconstruction_error(coder(maps), maps, self._power)
            self._optimiser.zero_grad()
            error.backward()
            self._optimiser.step()
        self._error = self._error + error.detach()
        self._batches += 1

    def _start(self, teacher: Tensor) -> AutoEncoder:
        # `reset` draws the weights again, from its own generator.
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            self._coder = self._make(teacher)
        self._error = self._error.to(self._coder.weight)
        generator = torch.Generator().manual_seed(self._seed)
        self._coder.encoder.reset(generator)
        self._coder.decoder.reset(generator)
        self._optimiser = torch.optim.SGD(
            self._coder.train().parameters(), self._lr, 0.9, weight_decay=5e-4, nesterov=True
        )
        return self._coder

    def end_pass(self) -> bool:
        """Report the pass; after the last one pass the auto-encoder to ``done``."""
        error, batches = all_sum(torch.stack([self._error, self._error.new_tensor(self._batches)]))
        if self._coder is None or not batches:
            raise FitError(
                "the auto-encoder of InheritExploreLoss needs batches of more than one position, "
                "but every batch had one image with a 1x1 map; use larger batches, or a point with "
                "larger maps"
            )
        if not error.isfinite():
            raise FitError(
                f"the reconstruction loss of the auto-encoder is {float(error)}: the teacher's "
                f"features have NaN or infinity, or fit_lr={self._lr} is too large"
            )
        for value in self._coder.state_dict().values():
            if world_size() > 1 and value.is_floating_point():
                value.copy_(all_sum(value) / world_size())
        self._passes += 1
        self.stage = (
            f"auto-encoder {min(self._passes + 1, self._epochs)}/{self._epochs}, "
            f"reconstruction loss {float(error / batches):.4f}"
        )
        self._error, self._batches = torch.zeros_like(self._error), 0
        if self._passes < self._epochs:
            return True
        self._done(self._coder)
        return False
