"""Networks of the benchmarks: ``from models.cifar_resnet import resnet, wide_resnet, make``."""
