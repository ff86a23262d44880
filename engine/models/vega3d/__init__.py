"""VEGA-3D: a video generator's features fused into a multimodal language model."""
