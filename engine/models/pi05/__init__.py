"""pi0.5: a SigLIP and Gemma prefix, and an action expert that denoises a chunk of actions."""
