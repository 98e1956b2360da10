"""Engines apply an optimizer to a denoiser's trainable weights; the trainer knows only `backward` and `step`."""
