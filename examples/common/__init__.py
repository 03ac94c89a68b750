"""Images, training, testing and teachers' weights, for the recipes and the benchmarks."""
