"""Tessera: text-supervised open-vocabulary semantic segmentation from cached tensors."""
