"""Networks of the benchmarks and recipes: ``from models.cifar_resnet import make``."""
