"""The bundled world: small scenes of coloured shapes, their prompts, a renderer and an exact checker."""
