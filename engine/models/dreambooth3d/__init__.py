"""3DreamBooth: a video diffusion transformer personalised from a handful of photos (arXiv 2603.18524)."""
