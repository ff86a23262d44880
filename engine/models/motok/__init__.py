"""MoTok: text and joint constraints become motion tokens, a guided diffusion decoder makes motion of them."""
