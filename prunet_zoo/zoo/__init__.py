"""The zoo: published models by name, their weights downloaded, converted and checked."""

from prunet_zoo.zoo.index import ModelEntry, Preprocess, Weights, find_model, load_index

__all__ = ["ModelEntry", "Preprocess", "Weights", "find_model", "load_index"]
