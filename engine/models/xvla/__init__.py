"""X-VLA: Florence-2's DaViT and BART encoder, and a soft-prompted transformer that denoises a chunk of actions."""
