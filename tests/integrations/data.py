"""Images as Hugging Face's data sets give them, and small models of transformers."""

import torch


class Images(torch.utils.data.Dataset):
    """Rows of a data set, with the transform that was set."""

    def __init__(self, count, transform=None):
        self.count = count
        self.transform = transform

    def with_transform(self, transform):
        return Images(self.count, transform)

    def set_transform(self, transform):
        self.transform = transform

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return self.transform(index)


def image_rows(augmented):
    """A transform that makes a row of an index; the augmented one draws from torch's generator."""

    def transform(index):
        image = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(index))
        image = image.flip(-1) if augmented and torch.rand(()) < 0.5 else image
        return {"pixel_values": image, "labels": index % 3}

    return transform


def hf_model(transformers, width):
    """A ResNet of transformers with four small stages."""
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 8, 8, width], "depths": [1, 1, 1, 1]}
    config = transformers.ResNetConfig(**sizes, layer_type="basic", num_labels=3)
    return transformers.ResNetForImageClassification(config)
